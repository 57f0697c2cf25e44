"""Textual inversion: the text states under which a network denoises given pictures best.

After Gal et al., arXiv:2208.01618; all token positions are free, as an attacker who holds the weights
would have it. Used by the attack that measures an erasure's depth and by the training against it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fade.models.conditioning import Conditioning, denoise
from fade.models.diffusion import add_noise, autocast, denoising_target


@dataclass(frozen=True, slots=True)
class InversionStep:
    """One step: its number (from 1), the states reached, and the loss before it."""

    step: int
    states: Conditioning
    loss: float


def invert(
    unet: Any,
    latents: Tensor,
    *,
    start: Conditioning,
    alphas_cumprod: Tensor,
    steps: int,
    batch: int,
    learning_rate: float,
    generator: torch.Generator,
    timesteps_from: int = 0,
    precision: str = "fp32",
    prediction_type: str = "epsilon",
) -> Iterator[InversionStep]:
    """Adam on the text states against the denoising loss; yields after each step.

        min over E of || e_theta(z_t, t, E) - e ||^2,  z_0 from the pictures, t ~ U{timesteps_from..T-1}

    The network is left as it is: no gradient reaches its weights.

    Args:
        latents: z_0 of the pictures to bring back, (N, C, h, w).
        start: where to begin, K rows; each is optimised on its own share of a batch, so ``batch`` should
            be a multiple of K.
    """
    device = next(unet.parameters()).device
    start = start.to(device)
    embeds = start.embeds.detach().clone().requires_grad_(True)
    optimizer = torch.optim.Adam([embeds], lr=learning_rate)
    owner = torch.arange(batch) % len(start)
    for step in range(1, steps + 1):
        chosen = latents[torch.randint(len(latents), (batch,), generator=generator)]
        timesteps = torch.randint(timesteps_from, len(alphas_cumprod), (batch,), generator=generator)
        noise = torch.randn(chosen.shape, generator=generator)
        noisy = add_noise(chosen, noise, timesteps, alphas_cumprod)
        target = denoising_target(chosen, noise, timesteps, alphas_cumprod, prediction_type)
        told = Conditioning(embeds, start.pooled, start.time_ids)[owner]
        with autocast(precision, device.type):
            answer = denoise(unet, noisy.to(device), timesteps.to(device), told)
        loss = (answer.float() - target.to(device)).square().mean()
        (embeds.grad,) = torch.autograd.grad(loss, [embeds])
        optimizer.step()
        yield InversionStep(
            step, Conditioning(embeds.detach().clone(), start.pooled, start.time_ids), float(loss.detach())
        )
