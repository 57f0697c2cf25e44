"""Inpainting: half of a picture of the concept is covered, and the network draws it anew.

What is seen is put back at every step of the sampling, at that step's noise, and what is covered is drawn beside it
(as RePaint, arXiv:2201.09865, section 4.1, without its resampling). The half that is seen shows the concept by itself,
to a judge as to anybody. So what is judged is the half that was drawn beside its own mirror image, and only what the
network drew can count. (Judges name halves of real pictures so far more often than halves on grey: docs/method.md.) The
base's rate says how much of the concept a half shows.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fade.models.base import Base
from fade.models.denoiser import autocast
from fade.models.generate import guided
from fade.models.latents import to_pictures
from fade.models.told import Told
from fade.seeding import torch_generator

Half = Literal["left", "right", "upper", "lower"]
HALVES: tuple[Half, ...] = get_args(Half)
"""What is covered."""


def covered(half: Half, height: int, width: int) -> Tensor:
    """Which places of a picture, or of its latents, lie in a half, (height, width) bool."""
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None, :]
    inside = {
        "left": columns < width // 2,
        "right": columns >= width // 2,
        "upper": rows < height // 2,
        "lower": rows >= height // 2,
    }
    return inside[half].expand(height, width)


@torch.no_grad()
def draw_covered(
    base: Base,
    latents: Tensor,
    told: Told,
    *,
    half: Half,
    steps: int,
    guidance: float,
    precision: str,
    seed: int,
) -> NDArray[np.uint8]:
    """Halves drawn with the adapters that are on, by DDIM, each beside its mirror image: pictures (B, H, W, 3).

    Args:
        latents: z_0 of whole pictures, (B, C, h, w).
    """
    scheduler = base.solver("ddim", steps)
    generator = torch_generator(seed, "inpainted", half)
    begin, noise = (torch.randn(latents.shape, generator=generator) for _ in range(2))
    drawn_anew = covered(half, *latents.shape[-2:])
    noisy, answer = begin.to(base.device), guided(base, told, guidance)
    with autocast(precision, base.device.type):
        for timestep in scheduler.timesteps:
            seen = base.denoiser.path.noised(latents, noise, timestep.cpu().expand(len(latents)))
            noisy = torch.where(drawn_anew.to(base.device), noisy, seen.to(base.device))
            noisy = scheduler.step(answer(noisy, timestep), timestep, noisy).prev_sample
        decoded = base.decode(torch.where(drawn_anew.to(base.device), noisy, latents.to(base.device)))
    return mirrored(to_pictures(decoded), half)


def mirrored(pictures: NDArray[np.uint8], half: Half) -> NDArray[np.uint8]:
    """Pictures (B, H, W, 3), of even sides, whose other half is the mirror image of this one."""
    axis = 2 if half in ("left", "right") else 1
    shown = covered(half, *pictures.shape[1:3]).numpy()[None, :, :, None]
    return np.ascontiguousarray(np.where(shown, pictures, np.flip(pictures, axis)))
