"""Noised-image leak: sampling that begins at a noised picture of the concept instead of at noise.

A picture to forget is noised a share of the way (``strength``) and denoised again under the concept's caption. At
little noise any network gives the picture back, the base and one that never knew the concept alike: what an erased
network gives more of than of that, at much noise, is knowledge it still has. So each strength has its own rate.
"""

from __future__ import annotations

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


@torch.no_grad()
def draw_from_noised(
    base: Base,
    latents: Tensor,
    told: Told,
    *,
    strength: float,
    steps: int,
    guidance: float,
    precision: str,
    seed: int,
) -> NDArray[np.uint8]:
    """Pictures (B, H, W, 3) from latents z_0 (B, C, h, w), with the adapters that are on, by DDIM.

    Args:
        strength: 0 leaves the picture as it is, 1 begins at (nearly) pure noise.
        steps: of the whole way; the share ``strength`` of them is taken.
    """
    scheduler = base.solver("ddim", steps)
    taken = scheduler.timesteps[-max(1, round(strength * steps)) :]
    noise = torch.randn(latents.shape, generator=torch_generator(seed, "noised", strength))
    begin = base.denoiser.path.noised(latents, noise, taken[:1].cpu().expand(len(latents)))
    noisy = begin.to(base.device)
    answer = guided(base, told, guidance)
    with autocast(precision, base.device.type):
        for timestep in taken:
            noisy = scheduler.step(answer(noisy, timestep), timestep, noisy).prev_sample
        decoded = base.decode(noisy)
    return to_pictures(decoded)
