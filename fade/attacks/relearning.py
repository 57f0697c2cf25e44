"""Relearning: how many steps of ordinary fine-tuning on the concept's pictures bring it back.

Whoever holds the erased weights and some pictures trains on: the attention's weights (keys, values, queries,
outputs), from the erased ones, by the denoising loss under the concept's own captions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fade.models.base import Base
from fade.models.deltas import add_delta, delta_weights, plain_modules
from fade.models.denoiser import autocast
from fade.models.told import Told
from fade.seeding import torch_generator

NAME = "relearnt"


class _Change(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.change = nn.Parameter(torch.zeros_like(weight, dtype=torch.float32))

    def forward(self) -> Tensor:
        return self.change


def relearn(
    base: Base,
    latents: Tensor,
    prompts: Told,
    *,
    stops: Sequence[int],
    batch: int,
    learning_rate: float,
    precision: str,
    seed: int,
) -> Iterator[tuple[int, float]]:
    """Train on; yields (steps taken, loss) at each stop, with what was relearnt switched on.

    The adapters that are on stay on. ``restore_base`` takes all of it out again.
    """
    generator = torch_generator(seed, "relearning")
    denoiser, path = base.denoiser, base.denoiser.path
    attention = set(denoiser.modules("attention"))
    parts = {name: _Change(one.weight) for name, one in plain_modules(base.network).items() if name in attention}
    add_delta(base.network, NAME, parts)
    for delta in delta_weights(base.network).values():
        delta.activate({**base.active, NAME: 1.0})
    parameters = [part.change for part in parts.values()]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    for step in range(1, max(stops) + 1):
        rows = torch.randint(len(latents), (batch,), generator=generator)
        timesteps = torch.randint(path.steps, (batch,), generator=generator)
        noise = torch.randn(latents[rows].shape, generator=generator)
        noisy = path.noised(latents[rows], noise, timesteps)
        target = path.target(latents[rows], noise, timesteps)
        with autocast(precision, base.device.type):
            answer = denoiser.predict(noisy.to(base.device), timesteps.to(base.device), prompts[rows].to(base.device))
        loss = (answer.float() - target.to(base.device)).square().mean()
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        optimizer.step()
        if step in stops:
            yield step, float(loss.detach())
