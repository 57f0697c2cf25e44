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


class Search:
    """Text states that are being optimised, each with Adam's moments of its own.

        min over E of || e_theta(z_t, t, E) - e ||^2,  z_0 from the pictures, t ~ U{0..T-1}

    Args:
        latents: z_0 of the pictures to bring back, (N, C, h, w).
        start: where to begin, K rows.
    """

    def __init__(
        self,
        latents: Tensor,
        start: Conditioning,
        *,
        alphas_cumprod: Tensor,
        learning_rate: float,
        precision: str,
        prediction_type: str,
        device: torch.device,
    ) -> None:
        self._latents, self._start, self._alphas_cumprod = latents, start.to(device), alphas_cumprod
        self._precision, self._prediction_type = precision, prediction_type
        self._rows = [row.detach().clone().requires_grad_(True) for row in self._start.embeds]
        self._optimizer = torch.optim.Adam(self._rows, lr=learning_rate)

    @property
    def states(self) -> Conditioning:
        """The states as they are now, K rows, cut off from the search."""
        embeds = torch.stack([row.detach() for row in self._rows])
        return Conditioning(embeds, self._start.pooled, self._start.time_ids)

    def step(self, unet: Any, *, batch: int, generator: torch.Generator) -> Tensor:
        """One step of Adam on every state, each on its own share of the batch; give the loss before it, unread.

        The network is left as it is: no gradient reaches its weights. ``batch`` should be a multiple of K.
        """
        device = self._rows[0].device
        chosen = self._latents[torch.randint(len(self._latents), (batch,), generator=generator)]
        timesteps = torch.randint(len(self._alphas_cumprod), (batch,), generator=generator)
        noise = torch.randn(chosen.shape, generator=generator)
        noisy = add_noise(chosen, noise, timesteps, self._alphas_cumprod)
        target = denoising_target(chosen, noise, timesteps, self._alphas_cumprod, self._prediction_type)
        owner = torch.arange(batch) % len(self._rows)
        told = Conditioning(torch.stack(self._rows), self._start.pooled, self._start.time_ids)[owner]
        with autocast(self._precision, device.type):
            answer = denoise(unet, noisy.to(device), timesteps.to(device), told)
        loss = (answer.float() - target.to(device)).square().mean()
        for row, gradient in zip(self._rows, torch.autograd.grad(loss, self._rows), strict=True):
            row.grad = gradient
        self._optimizer.step()
        return loss.detach()

    def restart(self, index: int, start: Conditioning) -> None:
        """Put one state back to a beginning (one row), without its moments."""
        row = self._rows[index]
        self._optimizer.state.pop(row, None)
        with torch.no_grad():
            row.copy_(start.embeds[0])


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
    precision: str = "fp32",
    prediction_type: str = "epsilon",
) -> Iterator[InversionStep]:
    """Search from K beginnings for a number of steps; yields after each. Arguments are those of ``Search``."""
    search = Search(
        latents,
        start,
        alphas_cumprod=alphas_cumprod,
        learning_rate=learning_rate,
        precision=precision,
        prediction_type=prediction_type,
        device=next(unet.parameters()).device,
    )
    for step in range(1, steps + 1):
        loss = search.step(unet, batch=batch, generator=generator)
        yield InversionStep(step, search.states, float(loss))
