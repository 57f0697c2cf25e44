"""Step ``saliency``: how much each module, neuron or weight of the denoiser has to do with the concept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fade.files import writing
from fade.methods.fade.saliency import (
    NoisyGroup,
    accumulate_saliency,
    contrast,
    expected_decrement,
    expected_gain,
    noisy_groups,
    random_saliency,
)
from fade.methods.fade.targeting import power_law
from fade.models.denoiser import autocast
from fade.models.family import load_base
from fade.spec import load_spec
from fade.steps.encoded import check_told_apart, prompts_apart, split_rows

FEW_GROUPS, MANY_GROUPS = 1, 8
"""Whole modules are told apart by few examples: of the 62 that gain chose from one group, at most 2 were others than
from 8, about as with another seed (canvas; cat, neon, oil). Finer parts and the other scores take more."""


def saliency(folder: Path) -> dict[str, Tensor]:
    """Write ``saliency.safetensors``, at the granularity that the mask asks for."""
    spec = load_spec(folder)
    settings, granularity = spec.saliency, spec.mask.granularity
    torch.set_num_threads(spec.threads)
    # Where nothing is ranked, what is forgotten is read, to see that the base tells it from its target.
    read = prompts_apart(spec, folder, splits="forget" if settings.score == "random" else "*", further=False)
    base = load_base(spec.base, expected_sha256=spec.base_sha256, weights=spec.weights, prompts=read)
    check_told_apart(base, spec, folder)
    if settings.gradient_checkpointing:
        base.network.enable_gradient_checkpointing()

    options: dict[str, Any] = {"granularity": granularity, "at_once": settings.at_once}

    whole = granularity in ("module", "none")

    def groups(*splits: str, power: float = 1.0) -> list[NoisyGroup]:
        return noisy_groups(
            split_rows(base, spec, folder, *splits),
            groups=settings.groups or (FEW_GROUPS if whole and settings.score == "gain" else MANY_GROUPS),
            group_size=settings.group_size,
            timesteps=power_law(base.denoiser.path.steps, power),
            seed=settings.seed,
        )

    with autocast(settings.precision, base.device.type):
        if settings.score == "random":
            scores = random_saliency(base.network, granularity, seed=settings.seed, fused=base.denoiser.fused())
        elif settings.score == "gain":
            # The pictures and timesteps that training will see.
            drawn = groups("forget", "surrogate", power=spec.distill.timestep_power)
            scores = expected_gain(base.denoiser, drawn, **options)
        elif settings.score == "decrement":
            power = spec.distill.timestep_power
            forget, retain = groups("forget", "surrogate", power=power), groups("retain", power=power)
            scores = expected_decrement(base.denoiser, forget, retain, seed=settings.seed, **options)
        else:
            against = "teacher" if settings.score == "distillation" else "noise"
            scores = accumulate_saliency(base.denoiser, groups("forget"), against=against, **options)
        if settings.score == "contrast":
            scores = contrast(scores, accumulate_saliency(base.denoiser, groups("retain"), against="noise", **options))
    with writing(folder / "saliency.safetensors") as temporary:
        save_file({name: scores[name].contiguous() for name in sorted(scores)}, temporary, metadata={"format": "pt"})
    return scores
