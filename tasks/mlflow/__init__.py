"""MLflow: its client, runs, the registry, pages, and what it keeps of an erasure."""
