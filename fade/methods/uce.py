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

from fade.methods.edits import EditSettings, edited, solve
from fade.methods.method import Material, Method
from fade.methods.trained_difference import Losses, modules_of, solved_difference
from fade.models.base import Base
from fade.models.deltas import plain_modules


class UceSettings(EditSettings):
    """The authors' defaults."""


def uce(base: Base, material: Material, settings: UceSettings, *, precision: str, seed: int) -> Iterator[Losses]:
    """Solve; one step. Nothing is drawn, and it is computed in float64 whatever the precision."""
    concept, surrogate, preserved = edited(base, material)
    modules = plain_modules(base.network)
    changes = {}
    for name in modules_of(base.denoiser, "text_sites"):
        weight = modules[name].weight.detach().double().cpu()
        changes[name] = solve(weight, concept, surrogate, preserved, settings) - weight
    solved_difference(base.network, changes)
    missed = [((surrogate - concept) @ modules[n].weight.detach().double().cpu().T).square().mean() for n in changes]
    yield Losses(1, float(torch.stack(missed).mean()))


UCE = Method("uce", uce, UceSettings, "arXiv:2308.14761", several=True)
