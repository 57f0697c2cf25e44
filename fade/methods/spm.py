"""SPM, semi-permeable membranes: one-dimensional adapters (Lyu et al., arXiv:2312.16145). Own implementation.

Every Linear and Conv2d module gets a change of rank one, v u', trained towards the opposite of the concept (ESD's
target). What keeps the rest is *latent anchoring*: under states that are nobody's caption the answer shall stay,

    L = || e_theta(z_t, c, t) - ( e* - eta [ e*_c - e* ] ) ||^2 + w E || e_theta(z_t, a, t) - e*(z_t, a, t) ||^2

a is drawn in all directions at about the norm of c, and kept with probability min(1, 1 - cos(a, c)): the less like the
concept, the more often. No other picture and no other caption is used.

What differs: the paper scales a membrane at inference by how near the prompt lies to the concept (facilitated
transport). An adapter is one change of weights for all prompts, so its membranes are open for all.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from fade.methods.method import Material, Method
from fade.methods.negative_guidance import NegativeSettings, frozen_answers, half_drawn
from fade.methods.trained_difference import Losses, descended, drawn, trained_low_rank
from fade.models.base import Base
from fade.models.denoiser import autocast
from fade.models.told import Told
from fade.seeding import torch_generator

NORMS = 0.8, 1.2
"""Of an anchor's norm, as shares of the concept's."""


class SpmSettings(NegativeSettings):
    """``anchoring``: weight of the anchors' loss. By the authors' 1000 nothing is forgotten on a small base."""

    learning_rate: float = 1e-3
    anchoring: float = 1.0
    rank: int = 1


def spm(base: Base, material: Material, settings: SpmSettings, *, precision: str, seed: int) -> Iterator[Losses]:
    """Train; yields after each step, and leaves the LoRA on the denoiser."""
    generator = torch_generator(seed, "spm")
    changes = trained_low_rank(base.network, base.denoiser.modules(), rank=settings.rank, seed=seed)

    def losses() -> tuple[Tensor, Tensor]:
        told = material.concept[drawn(len(material.concept), settings.batch, generator)]
        noisy, timestep = half_drawn(base, told, settings, generator, precision)
        anchor = told.with_tensors({"states": anchors(told.states, generator)})
        asked = [None, told, anchor]
        without, concept, kept = frozen_answers(base, noisy, timestep, asked, precision=precision)
        both = Told.join(told, anchor).to(base.device)
        with autocast(precision, base.device.type):
            answers = base.denoiser.predict(torch.cat([noisy, noisy]), timestep, both).float()
        of_concept, of_anchor = answers.chunk(2)
        forget = (of_concept - without + settings.eta * (concept - without)).square().mean()
        return forget, (of_anchor - kept).square().mean()

    yield from descended(
        changes, losses, steps=settings.steps, learning_rate=settings.learning_rate, weight=settings.anchoring
    )


def anchors(states: Tensor, generator: torch.Generator) -> Tensor:
    """For each of the concept's states (N, L, D) one of another direction, the more likely the less like it."""
    found = torch.empty_like(states)
    wanted = torch.ones(len(states), dtype=torch.bool)
    while wanted.any():
        noise = torch.randn(states.shape, generator=generator)
        alike = cosine_similarity(noise.flatten(1), states.flatten(1).cpu(), dim=1)
        taken = wanted & (torch.rand(len(states), generator=generator) < 1 - alike)
        found[taken] = noise[taken].to(found)
        wanted &= ~taken
    least, most = NORMS
    share = least + (most - least) * torch.rand(len(states), 1, 1, generator=generator).to(found)
    norms = [one.flatten(1).norm(dim=1)[:, None, None] for one in (states, found)]
    return found * share * norms[0] / norms[1]


SPM = Method("spm", spm, SpmSettings, "arXiv:2312.16145")
