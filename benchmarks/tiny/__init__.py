"""Untrained bases of every family, small, of the real classes, and how the stock pipeline of each is called."""
