"""RECE, Reliable and Efficient Concept Erasure (Gong et al., arXiv:2407.12383). Own implementation.

UCE leaves the concept reachable: for a prompt's state c there are others that the edited projections take for what c
was. In rounds, RECE finds them, in closed form too, and erases them as well. With W* the base's projections and W those
of the last round, over all keys and values that read the text,

    c' = argmin sum_W | W c' - W* c |^2 + derived_ridge |c'|^2
       = ( sum_W W'W + derived_ridge I )^-1 ( sum_W W'W* ) c                           (the paper's derived embedding)

and the next round solves UCE's equation from the base with c and every c' so far, each sent where c is sent. The
authors update the last round's weights with the newest c' alone and damp towards them; solved anew from the base with
all of them, nothing that an earlier round shut opens again. Every token position counts, as in our UCE. Of several
concepts every state's c' is found alone, and all are solved for together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fade.methods.edits import EditSettings, edited, solve
from fade.methods.method import Material, Method
from fade.methods.trained_difference import Losses, modules_of, solved_difference
from fade.models.base import Base
from fade.models.deltas import plain_modules


class ReceSettings(EditSettings):
    """UCE's, the rounds, and what keeps derived states short (the authors search the latter by concept)."""

    steps: int = 5
    derived_ridge: float = 0.1


def rece(base: Base, material: Material, settings: ReceSettings, *, precision: str, seed: int) -> Iterator[Losses]:
    """Solve in rounds; a step each, the first of them is UCE. Nothing is drawn, and it is computed in float64."""
    concept, surrogate, preserved = edited(base, material)
    modules = plain_modules(base.network)
    before = {n: modules[n].weight.detach().double().cpu() for n in modules_of(base.denoiser, "text_sites")}
    asked, aim, after = concept, surrogate, before
    for number in range(1, settings.steps + 1):
        after = {name: solve(weight, asked, aim, preserved, settings) for name, weight in before.items()}
        found = derived(before, after, concept, ridge=settings.derived_ridge)
        asked, aim = torch.cat([asked, found]), torch.cat([aim, surrogate])
        if number == settings.steps:
            solved_difference(base.network, {name: after[name] - weight for name, weight in before.items()})
        yield Losses(number, unreached(before, after, concept, found))


def derived(before: Mapping[str, Tensor], after: Mapping[str, Tensor], concept: Tensor, *, ridge: float) -> Tensor:
    """For each state of the concept, (N, D), the one that the weights take for it now most nearly."""
    own = sum((after[name].T @ after[name] for name in before), torch.zeros(()))
    across = sum((after[name].T @ before[name] for name in before), torch.zeros(()))
    return torch.linalg.solve(own + ridge * torch.eye(len(own), dtype=own.dtype), across @ concept.T).T


def unreached(before: Mapping[str, Tensor], after: Mapping[str, Tensor], concept: Tensor, found: Tensor) -> float:
    """What is left between the answers to the states that were found and the base's to the concept, of the latter's."""
    left = sum(float((found @ after[name].T - concept @ before[name].T).square().sum()) for name in before)
    return left / sum(float((concept @ before[name].T).square().sum()) for name in before)


RECE = Method("rece", rece, ReceSettings, "arXiv:2407.12383", several=True)
