"""SPEED, erasure in the null space of what is retained (Li et al., arXiv:2503.07392). Own implementation.

UCE trades the retained prompts off against the concepts; with many of both none is kept exactly. SPEED confines the
change to directions in which what is retained hardly lies. With c the states of the concepts' captions as columns of C,
c* of the same with the surrogates' names in C*, R those retained, P the projection on the eigenvectors of E RR' whose
eigenvalues are small, and E_0 states that must not move at all (that of the start token, which all prompts share):

    min over D of  |(W + D P) C - W C*|^2 + |D P|^2    subject to  D P E_0 = 0

    M = (C C' P + I)^-1,   Q = I - E_0 (E_0' P M E_0)^-1 E_0' P M,   D P = W (C* - C) C' P M Q

Retained are only the captions that an unconstrained solution would move most (the paper's influence-based filtering):
what it moves little costs directions and protects nobody. The paper's directed augmentation is not used: captions here
come in several sentences each. Own choices: the empty prompt is among what is retained, as the states of its padding
would leave no direction free in a narrow text space; values alone change; small is an eigenvalue below a share of the
greatest, and sums are means.
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


class SpeedSettings(MethodSettings):
    """What is retained, and how small a direction counts as empty.

    Attributes:
        influenced: share of the retained captions, those that an unconstrained solution moves most.
        empty_below: eigenvalues of E RR' below this share of the greatest span the null space.
        damping: weight of |D P|^2 beside the mean over the concepts' states.
    """

    influenced: float = 0.5
    empty_below: float = 1e-2
    damping: float = 1e-2


def speed(base: Base, material: Material, settings: SpeedSettings, *, precision: str, seed: int) -> Iterator[Losses]:
    """Solve; one step. Nothing is drawn, and it is computed in float64 whatever the precision."""
    del precision, seed
    concept, surrogate = (_rows(states) for states in paired(base.denoiser, material.concept, material.surrogate))
    concept, surrogate = torch.unique(torch.cat([concept, surrogate], dim=1), dim=0).chunk(2, dim=1)
    others = held(base.denoiser.read(material.retain_prompts.states), material.retain_prompts.mask).double()
    untold = held(base.denoiser.read(material.empty.states), material.empty.mask).double()
    still = _rows(untold[:1, :1])
    unit = torch.eye(concept.shape[1], dtype=concept.dtype)
    plain = solve(unit, concept, surrogate, settings=settings)
    retained = torch.cat([_rows(influenced(others, plain, settings.influenced)), _rows(untold)])
    modules = plain_modules(base.network)
    names = [name for name in modules_of(base.denoiser, "text_sites") if not name.endswith("to_k")]
    change = solve(unit, concept, surrogate, settings=settings, retained=retained, still=still)
    solved_difference(base.network, {name: modules[name].weight.detach().double().cpu() @ change for name in names})
    missed = (concept @ change.T + concept - surrogate).square().mean()
    yield Losses(1, float(missed), float((retained @ change.T).square().mean()))


def _rows(states: Tensor) -> Tensor:
    return states.reshape(-1, states.shape[-1]).double()


def influenced(states: Tensor, change: Tensor, share: float) -> Tensor:
    """Of prompts' states (N, L, D) the share that a change (D, D) moves most, at least one."""
    moved = (states @ change.T).square().sum(dim=(1, 2))
    return states[moved.argsort(descending=True, stable=True)[: max(1, round(share * len(states)))]]


def solve(
    weight: Tensor,
    concept: Tensor,
    surrogate: Tensor,
    *,
    settings: SpeedSettings,
    retained: Tensor | None = None,
    still: Tensor | None = None,
) -> Tensor:
    """D P of one weight (out, in); states are rows, (N, in) and, paired, (N, in), (M, in), (K, in), float64.

    Args:
        retained: whose null space it is confined to; None: all directions.
        still: what must not move at all; None: nothing.
    """
    unit = torch.eye(weight.shape[1], dtype=weight.dtype)
    projection = unit if retained is None else null_space(retained, settings.empty_below)
    moment = concept.T @ concept / len(concept)
    towards = (surrogate - concept).T @ concept / len(concept)
    inner = torch.linalg.inv(moment @ projection + settings.damping * unit)
    if still is not None:
        reach = projection @ inner
        fixed = torch.linalg.pinv(still @ reach @ still.T, rtol=1e-10, hermitian=True)
        inner = inner @ (unit - still.T @ fixed @ still @ reach)
    return weight @ towards @ projection @ inner


def null_space(states: Tensor, below: float) -> Tensor:
    """The projection (in, in) on directions whose eigenvalue of E rr' is below a share of the greatest."""
    values, vectors = torch.linalg.eigh(states.T @ states / len(states))
    empty = vectors[:, values < below * values[-1]]
    return empty @ empty.T


SPEED = Method("speed", speed, SpeedSettings, "arXiv:2503.07392", several=True)
