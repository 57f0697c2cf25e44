"""Interference told beforehand: which kept concepts an erasure will hurt, from the text's states alone   (ours).

What a kept concept loses it loses because its captions read like those that are overwritten. So the closed form is
solved over all that is erased, with all that is kept retained (``fade.methods.closed_form``), and asked how far it
moves the states of each kept concept's captions, as the denoiser's projections read them:

    m(k) = sqrt( E_k |W D r|^2 / E_f |W (s - f)|^2 )

W are all projections through which text enters; the divisor is how far the erased concepts' captions are to move. It
takes a second for a hundred concepts, draws nothing, and ranks; it is no forecast of a rate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fade.concepts import CAPTION_TEMPLATE, Concept, caption
from fade.errors import MaskMismatchError
from fade.methods.closed_form import held, paired, text_moments
from fade.models.base import Base
from fade.models.deltas import plain_modules

BESIDE = 4
"""Captions of a concept in each sentence: with so many of the other domain."""


def interference(
    base: Base,
    pairs: Sequence[tuple[Concept, Concept | None]],
    kept: Sequence[Concept],
    beside: Sequence[Concept],
    *,
    templates: Sequence[str] = (CAPTION_TEMPLATE,),
    retain_weight: float = 1.0,
    ridge: float = 1e-3,
) -> dict[str, float]:
    """Name of each kept concept to how far an erasure would move its captions' states, m(k); the most moved first.

    Args:
        pairs: what is erased, each with its surrogate; None is *nothing*.
        kept: of which it is asked; of the kinds that are erased.
        beside: concepts of both domains that captions may name besides.

    Raises:
        MaskMismatchError: no projection of this base reads the text's states alone.
    """
    sites = base.denoiser.text_sites()
    if not sites:
        raise MaskMismatchError("No layer of this base reads the text's states alone: interference cannot be foretold.")

    def captions(concept: Concept, name: str) -> list[str]:
        others = [one.name for one in beside if one.kind != concept.kind][:BESIDE]
        said = [(name, other) if concept.kind == "object" else (other, name) for other in others]
        return [caption(*both, template) for template in templates for both in said]

    told = [one for concept, _ in pairs for one in captions(concept, concept.name)]
    instead = [
        one if other is not None else ""
        for concept, other in pairs
        for one in captions(concept, concept.name if other is None else other.name)
    ]
    mine, theirs = paired(base.denoiser, base.encode_prompts(told), base.encode_prompts(instead))
    states = {}
    for one in kept:
        read = base.encode_prompts(captions(one, one.name))
        states[one.name] = held(base.denoiser.read(read.states), read.mask)
    moments = text_moments(mine, theirs, torch.cat([*states.values()]), retain_weight=retain_weight, ridge=ridge)
    change = torch.linalg.solve(moments.metric, moments.towards.T).T
    modules = plain_modules(base.network)
    weights = [modules[name].weight.detach().double().cpu() for name in sites]
    metric = sum((weight.T @ weight for weight in weights), torch.zeros(()))
    whole = _energy((theirs - mine).double(), metric)
    found = {name: float((_energy(part.double() @ change.T, metric) / whole).sqrt()) for name, part in states.items()}
    return dict(sorted(found.items(), key=lambda row: -row[1]))


def _energy(states: Tensor, metric: Tensor) -> Tensor:
    """Mean over captions and positions of |W x|^2."""
    return ((states @ metric) * states).sum(dim=-1).mean()
