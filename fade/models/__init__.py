"""Diffusion models: families, the forward process, generation, and a small base trained here."""
