"""Surrogates of many concepts: each the kept one that its captions have the shortest way to   (ours).

An adapter for many has little room for each. What it has to do for one concept is to move what the denoiser's
projections W read of its captions, f, to what they read of the surrogate's, s. So each gets the surrogate of

    min over kept s of  E |W (s - f)|^2

over captions that differ in the name alone. No erased concept is among them, so that none is another's surrogate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fade.concepts import CAPTION_TEMPLATE, Concept, caption
from fade.errors import ConfigError
from fade.evaluation.neighbours import choose_surrogate
from fade.models.base import Base
from fade.models.deltas import plain_modules

BESIDE = 3


def assigned(
    base: Base,
    erased: Sequence[Concept],
    candidates: Sequence[Concept],
    beside: Sequence[Concept],
    *,
    template: str = CAPTION_TEMPLATE,
) -> dict[str, Concept]:
    """Name of each erased concept to its surrogate.

    Args:
        candidates: what may be one: kept, nobody's face, not protected.
        beside: concepts of both domains that captions may name besides.

    Raises:
        ConfigError: of a kind that is erased there is no candidate.
    """
    sites = base.denoiser.text_sites()
    if not sites:  # no layer reads the text's states alone: as near as the states themselves say
        return {one.name: choose_surrogate(base, one, candidates, protected=()) for one in erased}
    modules = plain_modules(base.network)
    weights = [modules[name].weight.detach().double().cpu() for name in sites]
    values, vectors = torch.linalg.eigh(sum((weight.T @ weight for weight in weights), torch.zeros(())))
    root = vectors * values.clamp(min=0).sqrt()

    def read(some: Sequence[Concept]) -> Tensor:
        """(n, captions x positions x D), such that distances are those of what is read."""
        rows = []
        for one in some:
            others = [other.name for other in beside if other.kind != one.kind][:BESIDE]
            said = [(one.name, name) if one.kind == "object" else (name, one.name) for name in others]
            rows += [caption(*both, template) for both in said]
        states = base.denoiser.read(base.encode_prompts(rows).states).double() @ root
        return states.reshape(len(some), -1)

    found: dict[str, Concept] = {}
    for kind in dict.fromkeys(one.kind for one in erased):
        mine = [one for one in erased if one.kind == kind]
        free = [one for one in candidates if one.kind == kind]
        if not free:
            raise ConfigError(
                f"No surrogate is left: every {kind} of the catalog is erased, protected or a person. Erase fewer, or "
                "name surrogates (nothing: what the empty prompt gives)."
            )
        nearest = torch.cdist(read(mine), read(free)).argmin(dim=1)
        found |= {one.name: free[i] for one, i in zip(mine, nearest.tolist(), strict=True)}
    return found
