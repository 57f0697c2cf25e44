"""Concept Ablation (Kumari et al., arXiv:2303.13516), the model-based variant. Own implementation.

Under the concept's caption the network shall answer as it does under the anchor's (here: the surrogate's), on
pictures of the anchor:

    L = || sg e_theta(z_t, c_anchor, t) - e_theta(z_t, c, t) ||^2 + w || e - e_theta(z_t, c_anchor, t) ||^2

sg stops the gradient: the target is the network being trained itself, so that one network is held; the second term,
ordinary training on the anchor, keeps that target in place. Keys and values of the cross-attention are trained, the
authors' default. The authors draw the anchor's pictures with the base; the catalog's are taken here.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fade.methods.method import Material, Method, MethodSettings
from fade.methods.trained_difference import (
    Losses,
    descended,
    drawn,
    modules_of,
    noised,
    trained_difference,
)
from fade.models.base import Base
from fade.models.denoiser import autocast
from fade.models.told import Told
from fade.seeding import torch_generator


class ConceptAblationSettings(MethodSettings):
    """``regularisation``: weight of ordinary training on the anchor."""

    steps: int = 150
    batch: int = 16
    learning_rate: float = 1e-3
    regularisation: float = 1.0


def concept_ablation(
    base: Base, material: Material, settings: ConceptAblationSettings, *, precision: str, seed: int
) -> Iterator[Losses]:
    """Train; yields after each step, and leaves the difference on the denoiser."""
    generator = torch_generator(seed, "concept ablation")
    changes = trained_difference(base.network, modules_of(base.denoiser, "cross_attention"))

    def losses() -> tuple[Tensor, Tensor]:
        rows = drawn(len(material.anchor), settings.batch, generator)
        latents = material.anchor[rows]
        noisy, timesteps, noise = noised(latents, base.denoiser.path, generator, base.device)
        return ablation_losses(
            base,
            (latents, noisy, timesteps, noise),
            material.anchor_concept[rows],
            material.anchor_surrogate[rows],
            precision=precision,
        )

    yield from descended(
        changes.values(),
        losses,
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        weight=settings.regularisation,
    )


def ablation_losses(
    base: Base,
    drawn_from: tuple[Tensor, Tensor, Tensor, Tensor],
    concept: Told,
    anchor: Told,
    *,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Both terms for z_0, z_t, t and e.

    The anchor's answer is computed once: its gradient counts in the second term and is stopped in the first.
    """
    latents, noisy, timesteps, noise = drawn_from
    target = base.denoiser.path.target(latents.to(base.device), noise, timesteps)
    both = Told.join(concept, anchor).to(base.device)
    with autocast(precision, base.device.type):
        answers = base.denoiser.predict(torch.cat([noisy, noisy]), torch.cat([timesteps, timesteps]), both)
    of_concept, of_anchor = answers.float().chunk(2)
    return (of_anchor.detach() - of_concept).square().mean(), (target - of_anchor).square().mean()


CONCEPT_ABLATION = Method("ca", concept_ablation, ConceptAblationSettings, "arXiv:2303.13516")
