"""ESD, Erasing Concepts from Diffusion Models (Gandikota et al., arXiv:2303.07345). Own implementation.

The network is fine-tuned so that the concept's prompt gives what the frozen network calls the opposite of it:

    L = || e_theta(z_t, c, t) - ( e*(z_t, t) - eta [ e*(z_t, c, t) - e*(z_t, t) ] ) ||^2        (equation 6 and 7)

e* is the frozen network, and z_t comes from the network being trained: its own sampling for c, stopped at a random t.
``x`` trains the cross-attention, ``u`` everything else (the paper's ESD-x and ESD-u). There is no retain loss, and no
pictures are used. Biases and norms, which ESD-u also trains, stay here. The paper's fixed point of 1000 steps of one
picture at learning rate 1e-5 is for Stable Diffusion 1.4; the defaults here are for the canvas' base, by a
small search (docs/comparison.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from fade.methods.method import Material, Method, MethodSettings
from fade.methods.trained_difference import (
    Losses,
    descended,
    drawn,
    frozen,
    modules_of,
    trained_difference,
)
from fade.models.base import Base
from fade.models.denoiser import autocast
from fade.models.generate import guided
from fade.models.told import Told
from fade.seeding import torch_generator


class EsdSettings(MethodSettings):
    """``eta``: negative guidance; ``start_guidance``: of the sampling that makes z_t, over ``sampling_steps`` steps."""

    steps: int = 150
    batch: int = 4
    learning_rate: float = 1e-4
    eta: float = 1.0
    start_guidance: float = 3.0
    sampling_steps: int = 10


class EsdUSettings(EsdSettings):
    """Every other weight moves the network further than the cross-attention's at one learning rate."""

    learning_rate: float = 5e-5


def esd(
    base: Base, material: Material, settings: EsdSettings, *, part: Literal["x", "u"], precision: str, seed: int
) -> Iterator[Losses]:
    """Train; yields after each step, and leaves the difference on the denoiser."""
    generator = torch_generator(seed, "esd", part)
    names = modules_of(base.denoiser, "text_attention", without=part == "u")
    changes = trained_difference(base.network, names)

    def losses() -> tuple[Tensor, None]:
        told = material.concept[drawn(len(material.concept), settings.batch, generator)]
        noisy, timestep = half_drawn(base, told, settings, generator, precision)
        target = esd_target(base, noisy, timestep, told, eta=settings.eta, precision=precision)
        with autocast(precision, base.device.type):
            answer = base.denoiser.predict(noisy, timestep, told.to(base.device))
        return (answer.float() - target).square().mean(), None

    yield from descended(changes, losses, steps=settings.steps, learning_rate=settings.learning_rate)


@torch.no_grad()
def esd_target(base: Base, noisy: Tensor, timestep: Tensor, told: Told, *, eta: float, precision: str) -> Tensor:
    """eps_null - eta (eps_c - eps_null) of the frozen network, (B, C, h, w) float32."""
    both = Told.join(base.unconditional().expand(len(told)), told).to(base.device)
    with frozen(base.network), autocast(precision, base.device.type):
        answers = base.denoiser.predict(torch.cat([noisy, noisy]), timestep, both)
    without, with_prompt = answers.float().chunk(2)
    return without - eta * (with_prompt - without)


@torch.no_grad()
def half_drawn(
    base: Base, told: Told, settings: EsdSettings, generator: torch.Generator, precision: str
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


ESD_X = Method("esd-x", partial(esd, part="x"), EsdSettings, "arXiv:2303.07345")
ESD_U = Method("esd-u", partial(esd, part="u"), EsdUSettings, "arXiv:2303.07345")
