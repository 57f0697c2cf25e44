"""Loaders: what a picture set of each kind holds, read from its own layout; a file each."""
