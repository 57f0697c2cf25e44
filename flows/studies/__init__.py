"""Many erasures compared: over settings, concepts and methods."""
