"""Plain FADE: the paper's settings (arXiv:2602.07058 and the authors' package), made by our own code.

Whole modules by the denoising loss' gradient, half of them; LoRA of rank 16, alpha 4; learning rate 6e-4; forget
pictures alone, timesteps uniform; forget weight 0.3, retain weight 1. What differs: the learning rate falls as a
cosine where theirs is constant, and gradients are clipped at 5 where theirs mean to be. Their 1550 steps (512 px)
are 400 here; 1000 of their own program on the canvas erased nothing either.
"""

from __future__ import annotations

from typing import Any

PAPER_SETTINGS: dict[str, Any] = {
    "saliency.score": "denoising",
    "mask.granularity": "module",
    "mask.density": 0.5,
    "mask.within": "all",
    "distill.start": "zero",
    "distill.depth": "name",
    "distill.steps": 400,
    "distill.batch": 12,
    "distill.rank": 16,
    "distill.alpha": 4.0,
    "distill.learning_rate": 6e-4,
    "distill.clip_norm": 5.0,
    "distill.forget_weight": 0.3,
    "distill.retain_weight": 1.0,
    "distill.timesteps": "uniform",
    "distill.pictures": "forget",
    "distill.surrogate_share": 0.0,
    "distill.empty_caption_share": 0.0,
}
"""Changes of the section ``erasure`` of params.yaml, by dotted name."""
