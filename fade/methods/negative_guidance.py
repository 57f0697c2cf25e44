"""What published methods share that send a prompt to the opposite of itself: ESD's target, and its half-drawn pictures.

    e*(z_t, t) - eta [ e*(z_t, c, t) - e*(z_t, t) ]          (ESD, arXiv:2303.07345, equation 6 and 7)

e* is the frozen network; z_t comes from the network being trained: its own sampling for c, stopped at a random step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fade.methods.fade.sparse_lora import adapters_disabled
from fade.methods.method import MethodSettings
from fade.models.base import Base
from fade.models.denoiser import autocast
from fade.models.generate import guided
from fade.models.told import Told


class NegativeSettings(MethodSettings):
    """``eta``: negative guidance; ``start_guidance``: of the sampling that makes z_t, over ``sampling_steps`` steps."""

    steps: int = 150
    batch: int = 4
    learning_rate: float = 1e-4
    eta: float = 1.0
    start_guidance: float = 3.0
    sampling_steps: int = 10


@torch.no_grad()
def negative_target(base: Base, noisy: Tensor, timestep: Tensor, told: Told, *, eta: float, precision: str) -> Tensor:
    """eps_null - eta (eps_c - eps_null) of the frozen network, (B, C, h, w) float32."""
    without, with_prompt = frozen_answers(base, noisy, timestep, [None, told], precision=precision)
    return without - eta * (with_prompt - without)


@torch.no_grad()
def frozen_answers(
    base: Base, noisy: Tensor, timestep: Tensor, asked: list[Told | None], *, precision: str
) -> tuple[Tensor, ...]:
    """The base's own answers at z_t under each of ``asked``, None for the empty prompt; (B, C, h, w) float32 each."""
    count = len(noisy)
    told = Told.join(*(base.unconditional().expand(count) if one is None else one for one in asked)).to(base.device)
    with adapters_disabled(base.network), autocast(precision, base.device.type):
        answers = base.denoiser.predict(
            torch.cat([noisy] * len(asked)), timestep.expand(count).repeat(len(asked)), told
        )
    return answers.float().chunk(len(asked))


def distance_to(base: Base, noisy: Tensor, timestep: Tensor, told: Told, *, target: Tensor, precision: str) -> Tensor:
    """The mean squared distance from a target, (B, C, h, w), of the answer at z_t of the network being trained."""
    with autocast(precision, base.device.type):
        answer = base.denoiser.predict(noisy, timestep, told.to(base.device))
    return (answer.float() - target).square().mean()


@torch.no_grad()
def half_drawn(
    base: Base, told: Told, settings: NegativeSettings, generator: torch.Generator, precision: str
) -> tuple[Tensor, Tensor]:
    """The trained network's own sampling for prompts, stopped at a step drawn for the whole batch: z_t and t."""
    scheduler: Any = base.solver("ddim", settings.sampling_steps)
    stop = int(torch.randint(settings.sampling_steps, (1,), generator=generator))
    noisy = torch.randn((len(told), *base.denoiser.latent_shape), generator=generator).to(base.device)
    answer = guided(base, told, settings.start_guidance)
    with autocast(precision, base.device.type):
        for timestep in scheduler.timesteps[:stop]:
            noisy = scheduler.step(answer(noisy, timestep), timestep, noisy).prev_sample
    return noisy, scheduler.timesteps[stop].to(base.device)
