"""Flows compose tasks; the command line starts them."""
