"""Pictures to latents."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor


def to_tensor(pictures: NDArray[np.uint8]) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in -1..1, as the autoencoder takes them."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: NDArray[np.uint8], *, scaled: bool = True, batch: int = 64) -> Tensor:
    """Posterior means of the latents, (N, 4, h, w) float32, times the scaling factor if ``scaled``."""
    parts = [vae.encode(to_tensor(pictures[i : i + batch])).latent_dist.mean for i in range(0, len(pictures), batch)]
    latents = torch.cat(parts)
    return latents * vae.config.scaling_factor if scaled else latents
