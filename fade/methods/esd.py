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
from typing import Literal

from torch import Tensor

from fade.methods.method import Material, Method
from fade.methods.negative_guidance import NegativeSettings, distance_to, half_drawn, negative_target
from fade.methods.trained_difference import Losses, descended, drawn, modules_of, trained_difference
from fade.models.base import Base
from fade.seeding import torch_generator


class EsdSettings(NegativeSettings):
    """What its target and its half-drawn pictures take."""


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
        target = negative_target(base, noisy, timestep, told, eta=settings.eta, precision=precision)
        return distance_to(base, noisy, timestep, told, target=target, precision=precision), None

    yield from descended(changes.values(), losses, steps=settings.steps, learning_rate=settings.learning_rate)


ESD_X = Method("esd-x", partial(esd, part="x"), EsdSettings, "arXiv:2303.07345")
ESD_U = Method("esd-u", partial(esd, part="u"), EsdUSettings, "arXiv:2303.07345")
