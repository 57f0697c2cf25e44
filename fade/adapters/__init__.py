"""Adapters: save, load, stack, switch off, and give the base its bits back."""
