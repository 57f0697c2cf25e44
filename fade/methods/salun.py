"""SalUn, saliency-based unlearning (Fan et al., arXiv:2310.12508). Own implementation.

Only the weights that the forget loss moves most may change:

    m = 1( | d L_f / d theta | >= gamma ),    L_f = E || e - e_theta(z_t, c, t) ||^2 on the forget set   (equation 4)

gamma is the value that keeps the share ``density``; the gradient is summed with its sign over the forget set before
the absolute value. The masked weights then learn another concept's answer for this one, and go on with ordinary
training on the retain set:

    L = E || e_theta(z_t, c', t) - e_theta(z_t, c, t) ||^2 + w E || e - e_theta(z_t, c_r, t) ||^2      (equation 6)

c' is the surrogate here, and its answer carries no gradient. Weights of every Linear and Conv2d module may be chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from fade.errors import ConfigError
from fade.methods.method import Material, Method, MethodSettings
from fade.methods.trained_difference import Losses, descended, drawn, noised, trained_difference
from fade.models.base import Base
from fade.models.deltas import plain_modules
from fade.models.denoiser import autocast
from fade.models.told import Told
from fade.seeding import torch_generator


class SalunSettings(MethodSettings):
    """``density``: share of the weights that may change; the paper's half."""

    steps: int = 120
    batch: int = 16
    learning_rate: float = 1e-4
    density: float = 0.5
    retain_weight: float = 1.0
    mask_batches: int = 8


def salun(base: Base, material: Material, settings: SalunSettings, *, precision: str, seed: int) -> Iterator[Losses]:
    """Find the mask, then train; yields after each step, and leaves the difference on the denoiser."""
    generator = torch_generator(seed, "salun")
    changes = trained_difference(base.network, sorted(plain_modules(base.network)))
    gradients = forget_gradients(base, material, changes, settings=settings, generator=generator, precision=precision)
    for name, mask in salient(gradients, settings.density).items():
        # Adam moves nothing whose gradient was always zero.
        changes[name].register_hook(partial(torch.mul, mask.to(base.device)))

    def losses() -> tuple[Tensor, Tensor]:
        rows = drawn(len(material.forget), settings.batch, generator)
        noisy, timesteps, _ = noised(material.forget[rows], base.denoiser.path, generator, base.device)
        with autocast(precision, base.device.type):
            with torch.no_grad():
                target = base.denoiser.predict(noisy, timesteps, material.surrogate[rows].to(base.device)).float()
            answer = base.denoiser.predict(noisy, timesteps, material.concept[rows].to(base.device)).float()
        forget = (answer - target).square().mean()
        rows = drawn(len(material.retain), settings.batch, generator)
        kept = _denoising_loss(base, material.retain[rows], material.retain_prompts[rows], generator, precision)
        return forget, kept

    yield from descended(
        changes.values(),
        losses,
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        weight=settings.retain_weight,
    )


def forget_gradients(
    base: Base,
    material: Material,
    changes: Mapping[str, nn.Parameter],
    *,
    settings: SalunSettings,
    generator: torch.Generator,
    precision: str,
) -> dict[str, Tensor]:
    """|gradient| of the forget set's denoising loss by module, summed with its sign over the batches."""
    total = {name: torch.zeros_like(change) for name, change in changes.items()}
    for _ in range(settings.mask_batches):
        rows = drawn(len(material.forget), settings.batch, generator)
        loss = _denoising_loss(base, material.forget[rows], material.concept[rows], generator, precision)
        for name, gradient in zip(total, torch.autograd.grad(loss, list(changes.values())), strict=True):
            total[name] += gradient
    return {name: gradient.abs().cpu() for name, gradient in total.items()}


def salient(gradients: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
    """1 for exactly round(density n) entries of the largest absolute gradient, 0 elsewhere; ties in order.

    Raises:
        ConfigError: density is outside (0, 1].
    """
    if not 0 < density <= 1:
        raise ConfigError(f"SalUn's density must be in (0, 1]: got {density}.")
    flat = np.concatenate([gradient.flatten().numpy() for gradient in gradients.values()])
    kept = np.zeros(len(flat), np.float32)
    kept[np.argsort(-flat, kind="stable")[: max(1, round(density * len(flat)))]] = 1.0
    parts = torch.from_numpy(kept).split([gradient.numel() for gradient in gradients.values()])
    return {name: part.view(gradients[name].shape) for name, part in zip(gradients, parts, strict=True)}


def _denoising_loss(base: Base, latents: Tensor, prompts: Told, generator: torch.Generator, precision: str) -> Tensor:
    """Ordinary training: the mean squared error against the true noise (or velocity)."""
    noisy, timesteps, noise = noised(latents, base.denoiser.path, generator, base.device)
    target = base.denoiser.path.target(latents.to(base.device), noise, timesteps)
    with autocast(precision, base.device.type):
        answer = base.denoiser.predict(noisy, timesteps, prompts.to(base.device))
    return (answer.float() - target).square().mean()


SALUN = Method("salun", salun, SalunSettings, "arXiv:2310.12508")
