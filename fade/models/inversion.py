"""Textual inversion: the text states under which a network denoises given pictures best.

After Gal et al., arXiv:2208.01618; all token positions are free, as an attacker who holds the weights
would have it, and the pooled state too where a family is told one. Used by the attack that measures an
erasure's depth and by the training against it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fade.models.denoiser import Denoiser, autocast
from fade.models.told import POOLED, Told


@dataclass(frozen=True, slots=True)
class InversionStep:
    """One step: its number (from 1), the states reached, and the loss before it."""

    step: int
    states: Told
    loss: float


class Search:
    """Text states that are being optimised, each with Adam's moments of its own.

        min over E of || e_theta(z_t, t, E) - e ||^2,  z_0 from the pictures, t ~ U{0..T-1}

    Args:
        latents: z_0 of the pictures to bring back, (N, C, h, w).
        start: where to begin, K rows.
        pooled: search the pooled states besides, where the rows have one; else these stay as the start's prompts give
            them.
    """

    def __init__(
        self,
        latents: Tensor,
        start: Told,
        *,
        learning_rate: float,
        precision: str,
        device: torch.device,
        pooled: bool = False,
    ) -> None:
        self._latents, self._start, self._precision = latents, start.to(device), precision
        names = ["states", *[POOLED] * (pooled and POOLED in start.others)]
        self._free = {
            name: [row.detach().clone().requires_grad_(True) for row in self._start.tensors()[name]] for name in names
        }
        self._optimizer = torch.optim.Adam(self._parameters, lr=learning_rate)

    @property
    def _parameters(self) -> list[Tensor]:
        return [row for rows in self._free.values() for row in rows]

    @property
    def states(self) -> Told:
        """The states as they are now, K rows, cut off from the search."""
        return self._start.with_tensors(
            {name: torch.stack([row.detach() for row in rows]) for name, rows in self._free.items()}
        )

    def step(self, denoiser: Denoiser, *, batch: int, generator: torch.Generator) -> Tensor:
        """One step of Adam on every state, each on its own share of the batch; give the loss before it, unread.

        The network is left as it is: no gradient reaches its weights. ``batch`` should be a multiple of K.
        """
        device, path = self._start.states.device, denoiser.path
        chosen = self._latents[torch.randint(len(self._latents), (batch,), generator=generator)]
        timesteps = torch.randint(path.steps, (batch,), generator=generator)
        noise = torch.randn(chosen.shape, generator=generator)
        noisy = path.noised(chosen, noise, timesteps)
        target = path.target(chosen, noise, timesteps)
        owner = torch.arange(batch) % len(self._start)
        told = self._start.with_tensors({name: torch.stack(rows) for name, rows in self._free.items()})[owner]
        with autocast(self._precision, device.type):
            answer = denoiser.predict(noisy.to(device), timesteps.to(device), told)
        loss = (answer.float() - target.to(device)).square().mean()
        for row, gradient in zip(self._parameters, torch.autograd.grad(loss, self._parameters), strict=True):
            row.grad = gradient
        self._optimizer.step()
        return loss.detach()

    def restart(self, index: int, start: Told) -> None:
        """Put one state back to a beginning (one row), without its moments."""
        for name, rows in self._free.items():
            self._optimizer.state.pop(rows[index], None)
            with torch.no_grad():
                rows[index].copy_(start.tensors()[name][0])
        # What stands beside the states is the new beginning's too: a mask of another prompt would hide some of them.
        at = torch.arange(len(self._start)) == index
        self._start = self._start.replaced(at, start.to(self._start.states.device))


def invert(
    denoiser: Denoiser,
    latents: Tensor,
    *,
    start: Told,
    steps: int,
    batch: int,
    learning_rate: float,
    generator: torch.Generator,
    precision: str = "fp32",
    pooled: bool = False,
) -> Iterator[InversionStep]:
    """Search from K beginnings for a number of steps; yields after each. Arguments are those of ``Search``."""
    search = Search(
        latents, start, learning_rate=learning_rate, precision=precision, device=denoiser.device, pooled=pooled
    )
    for step in range(1, steps + 1):
        loss = search.step(denoiser, batch=batch, generator=generator)
        yield InversionStep(step, search.states, float(loss))
