"""Training examples: latents, the prompt the student sees and the prompt the teacher sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Examples:
    """Encoded examples; encoders run once, before training.

    Attributes:
        latents: z_0, (N, C, h, w) float32, scaled.
        prompt_embeds: the student's prompts, (N, L, D) float32.
        target_embeds: the teacher's prompts: the surrogate's captions for forget examples, the same as
            ``prompt_embeds`` for retain examples.
    """

    latents: Tensor
    prompt_embeds: Tensor
    target_embeds: Tensor

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: Tensor | slice) -> Examples:
        return Examples(self.latents[index], self.prompt_embeds[index], self.target_embeds[index])


def joined(*parts: Examples) -> Examples:
    """Several sets of examples as one, in order."""
    return Examples(
        torch.cat([part.latents for part in parts]),
        torch.cat([part.prompt_embeds for part in parts]),
        torch.cat([part.target_embeds for part in parts]),
    )
