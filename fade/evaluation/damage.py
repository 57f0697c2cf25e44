"""Damaged pictures: what a judge must call scrambled, and small flaws that it must see through."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SCRAMBLED = "scrambled"
"""What a judge calls a picture that shows nothing it knows."""


def shuffle_patches(pictures: Tensor, patch: int, generator: torch.Generator) -> Tensor:
    """Pictures (B, C, H, W) with their patches in random order."""
    count, channels, height, width = pictures.shape
    rows, columns = height // patch, width // patch
    patches = pictures.reshape(count, channels, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(count, rows * columns, channels, patch, patch)
    order = torch.rand(count, rows * columns, generator=generator).argsort(1)
    patches = patches.gather(1, order[:, :, None, None, None].expand_as(patches))
    patches = patches.reshape(count, rows, columns, channels, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(count, channels, height, width)


def damaged(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """What must be called scrambled: shuffled patches of three sizes, blends and blurs beyond telling."""
    kind = int(torch.randint(5, (1,), generator=generator))
    if kind < 3:
        return shuffle_patches(pictures, (8, 16, 32)[kind] if kind < 2 else 16, generator)
    if kind == 3:
        return 0.5 * pictures + 0.5 * shuffle_patches(pictures.flip(0), 16, generator)
    small = F.avg_pool2d(pictures, 16)
    return F.interpolate(small, size=pictures.shape[-2:], mode="bilinear", align_corners=False)


def softened(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Small flaws a judge must see through: slight blur, noise and light, as an autoencoder adds."""
    blur = torch.rand(len(pictures), generator=generator)[:, None, None, None] * 0.7
    smooth = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    noise = torch.randn(pictures.shape, generator=generator) * 0.04
    light = (torch.rand(len(pictures), generator=generator)[:, None, None, None] - 0.5) * 0.1
    return ((1 - blur) * pictures + blur * smooth + noise + light).clamp(-1, 1)
