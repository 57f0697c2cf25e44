"""Deletion requests: their states, the ledger that keeps them, and how they come in."""
