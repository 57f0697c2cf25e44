"""What is shown afterwards: audits, evidence, and that what was to be deleted is gone."""
