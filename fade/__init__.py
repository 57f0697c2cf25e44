"""FADE: make a text-to-image diffusion model forget a concept, reversibly.

The method and its domain, a library of its own: it needs torch, diffusers and peft, and knows no
orchestrator, tracker or data versioning (those live in ``tasks`` and ``flows``).
"""

__version__ = "0.1.0"
