"""Training examples: latents, the prompt the student sees and the prompt the teacher sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fade.models.told import Told


@dataclass(frozen=True, slots=True)
class Examples:
    """Encoded examples; encoders run once, before training.

    Attributes:
        latents: z_0, (N, C, h, w) float32, scaled.
        prompts: what the student is told, N rows.
        targets: what the teacher is told: the surrogate's captions for forget examples, the same as
            ``prompts`` for retain examples.
    """

    latents: Tensor
    prompts: Told
    targets: Told

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: Tensor | slice) -> Examples:
        return Examples(self.latents[index], self.prompts[index], self.targets[index])

    def drawn(self, count: int, generator: torch.Generator) -> Examples:
        """``count`` of them, with replacement."""
        return self[torch.randint(len(self), (count,), generator=generator)]

    def to(self, device: torch.device | str) -> Examples:
        """The same on another device."""
        return Examples(self.latents.to(device), self.prompts.to(device), self.targets.to(device))


class Source(Protocol):
    """Where examples are drawn from: ``Examples``, or pictures that are encoded when they are drawn."""

    def __len__(self) -> int: ...

    def drawn(self, count: int, generator: torch.Generator) -> Examples:
        """``count`` of them, with replacement."""
        ...


def joined(*parts: Examples) -> Examples:
    """Several sets of examples as one, in order."""
    return Examples(
        torch.cat([part.latents for part in parts]),
        Told.join(*(part.prompts for part in parts)),
        Told.join(*(part.targets for part in parts)),
    )
