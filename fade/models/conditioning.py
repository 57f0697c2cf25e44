"""What a denoiser is told besides the noisy latents: text states, and for SDXL pooled states and sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Conditioning:
    """One row a picture.

    Attributes:
        embeds: text states, (N, L, D) float32.
        pooled: pooled text state of SDXL's second encoder, (N, P); None where the family has none.
        time_ids: SDXL's size conditioning, (N, 6): original size, crop corner, target size
            (arXiv:2307.01952, section 2.2); None where the family has none.
    """

    embeds: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.embeds)

    def __getitem__(self, index: Any) -> Conditioning:
        """Rows by slice, mask or index tensor."""
        return Conditioning(
            self.embeds[index],
            None if self.pooled is None else self.pooled[index],
            None if self.time_ids is None else self.time_ids[index],
        )

    def expand(self, count: int) -> Conditioning:
        """One row, ``count`` times."""
        return self[torch.zeros(count, dtype=torch.long)]

    def to(self, device: torch.device | str) -> Conditioning:
        """The same on another device."""
        return Conditioning(
            self.embeds.to(device),
            None if self.pooled is None else self.pooled.to(device),
            None if self.time_ids is None else self.time_ids.to(device),
        )

    def replaced(self, rows: Tensor, other: Conditioning) -> Conditioning:
        """With the rows of a boolean mask taken from ``other``, which has as many rows, or one for all."""

        def choose(mine: Tensor, theirs: Tensor) -> Tensor:
            mask = rows.to(mine.device).view(-1, *([1] * (mine.dim() - 1)))
            return torch.where(mask, theirs, mine)

        return Conditioning(
            choose(self.embeds, other.embeds),
            None if self.pooled is None or other.pooled is None else choose(self.pooled, other.pooled),
            self.time_ids,
        )


def joined_conditioning(*parts: Conditioning) -> Conditioning:
    """Several as one, in order; all of one family."""
    pooled = [part.pooled for part in parts if part.pooled is not None]
    time_ids = [part.time_ids for part in parts if part.time_ids is not None]
    return Conditioning(
        torch.cat([part.embeds for part in parts]),
        torch.cat(pooled) if pooled else None,
        torch.cat(time_ids) if time_ids else None,
    )


def denoise(unet: Any, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """The network's answer e_theta(z_t, t, c) (noise or velocity, as it was trained), (B, C, h, w).

    Computed in the type the network's weights are held in; sizes stay float32, as bfloat16 rounds them.
    """
    dtype = next(unet.parameters()).dtype
    added = None
    if conditioning.pooled is not None:
        added = {"text_embeds": conditioning.pooled.to(dtype), "time_ids": conditioning.time_ids}
    answer: Tensor = unet(noisy.to(dtype), timesteps, conditioning.embeds.to(dtype), added_cond_kwargs=added).sample
    return answer
