"""For whoever runs it: what is wrong here, backup and restore."""
