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
    """Posterior means of the latents, (N, C, h, w) float32 on the CPU, in the denoiser's scale if ``scaled``."""
    parts = []
    for start in range(0, len(pictures), batch):
        target = to_tensor(pictures[start : start + batch]).to(vae.device, vae.dtype)
        parts.append(vae.encode(target).latent_dist.mean.float().cpu())
    latents = torch.cat(parts)
    if not scaled:
        return latents
    if shift := vae.config.get("shift_factor"):
        latents = latents - shift
    return latents * vae.config.scaling_factor
