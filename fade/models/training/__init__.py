"""Training of small bases from scratch: their networks, and the loop."""
