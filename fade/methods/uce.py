"""UCE, Unified Concept Editing (Gandikota et al., arXiv:2308.14761). Own implementation.

Cross-attention reads the prompt through linear maps alone. Each key and value projection is solved anew so that the
concept's text states give what the surrogate's gave, and those of prompts to preserve give what they gave:

    W = ( e sum_i W* s_i c_i' + p sum_j W* r_j r_j' + l W* ) ( e sum_i c_i c_i' + p sum_j r_j r_j' + l I )^-1

c: states of the concept's captions, s: of the same with the surrogate's name, r: of captions to preserve, W*: the
base's (equation 7; the l terms are the authors' damping towards W*). Every token position counts, paired one to one.
The authors pair the last tokens of bare names; whole captions are used here, as all methods are given the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fade.methods.closed_form import held, paired
from fade.methods.method import Material, Method, MethodSettings
from fade.methods.trained_difference import Losses, modules_of, solved_difference
from fade.models.base import Base
from fade.models.deltas import plain_modules
from fade.models.told import Told


class UceSettings(MethodSettings):
    """Weights of the two sums and of the damping; the authors' defaults."""

    erase_scale: float = 1.0
    preserve_scale: float = 1.0
    damping: float = 0.5


def uce(base: Base, material: Material, settings: UceSettings, *, precision: str, seed: int) -> Iterator[Losses]:
    """Solve; one step. Nothing is drawn, and it is computed in float64 whatever the precision."""
    concept, surrogate = (_rows(states) for states in paired(base.denoiser, material.concept, material.surrogate))
    others = Told.join(material.retain_prompts, material.empty)
    preserved = _rows(held(base.denoiser.read(others.states), others.mask))
    # A caption that many pictures share counts once: the sums are over captions.
    pairs = torch.unique(torch.cat([concept, surrogate], dim=1), dim=0)
    concept, surrogate = pairs.chunk(2, dim=1)
    preserved = torch.unique(preserved, dim=0)
    modules = plain_modules(base.network)
    changes = {}
    for name in modules_of(base.denoiser, "text_sites"):
        weight = modules[name].weight.detach().double().cpu()
        changes[name] = solve(weight, concept, surrogate, preserved, settings) - weight
    solved_difference(base.network, changes)
    missed = [((surrogate - concept) @ modules[n].weight.detach().double().cpu().T).square().mean() for n in changes]
    yield Losses(1, float(torch.stack(missed).mean()))


def _rows(states: Tensor) -> Tensor:
    return states.reshape(-1, states.shape[-1]).double()


def solve(weight: Tensor, concept: Tensor, surrogate: Tensor, preserved: Tensor, settings: UceSettings) -> Tensor:
    """The new weight (out, in); states are rows, (N, in) and, paired, (N, in), and (M, in), float64."""
    erase, keep, damping = settings.erase_scale, settings.preserve_scale, settings.damping
    unit = torch.eye(weight.shape[1], dtype=weight.dtype)
    aim = erase * surrogate.T @ concept + keep * preserved.T @ preserved + damping * unit
    metric = erase * concept.T @ concept + keep * preserved.T @ preserved + damping * unit
    return torch.linalg.solve(metric, (weight @ aim).T).T


UCE = Method("uce", uce, UceSettings, "arXiv:2308.14761", several=True)
