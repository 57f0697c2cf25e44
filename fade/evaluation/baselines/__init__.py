"""Baselines: published ways to erase a concept, our own implementations, each one file.

Each leaves a full difference of weights on the denoiser, which is stored as an adapter like any other, so that what
measures ours measures them.
"""
