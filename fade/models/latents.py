"""Pictures to latents, and what an autoencoder gives back to pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor


def to_tensor(pictures: NDArray[np.uint8]) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in -1..1, as the autoencoder takes them."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def to_pictures(decoded: Tensor) -> NDArray[np.uint8]:
    """(B, 3, H, W) in -1..1, what lies outside cut off -> (B, H, W, 3) uint8."""
    pixels = (decoded.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    return np.ascontiguousarray(pixels.permute(0, 2, 3, 1).cpu().numpy())


@torch.no_grad()
def posterior_means(
    posterior: Callable[[Tensor], Tensor], pictures: NDArray[np.uint8], *, like: Any, batch: int = 64
) -> Tensor:
    """Mean latents of pictures (N, H, W, 3), a batch at a time, float32 on the CPU.

    Args:
        posterior: the autoencoder's, of pictures as ``to_tensor`` gives them.
        like: the autoencoder, where and in whose type it computes.
    """
    parts = []
    for start in range(0, len(pictures), batch):
        pixels = to_tensor(pictures[start : start + batch]).to(like.device, like.dtype)
        parts.append(posterior(pixels).float().cpu())
    return torch.cat(parts)


def encode_pictures(vae: AutoencoderKL, pictures: NDArray[np.uint8], *, scaled: bool = True, batch: int = 64) -> Tensor:
    """Posterior means of the latents, (N, C, h, w) float32 on the CPU, in the denoiser's scale if ``scaled``."""
    means = posterior_means(lambda pixels: vae.encode(pixels).latent_dist.mean, pictures, like=vae, batch=batch)
    return in_scale(vae.config, means) if scaled else means


def in_scale(config: Mapping[str, Any], latents: Tensor) -> Tensor:
    """Latents in the denoiser's scale, as AutoencoderKL's configuration says it."""
    if shift := config.get("shift_factor"):
        latents = latents - shift
    return latents * config["scaling_factor"]
