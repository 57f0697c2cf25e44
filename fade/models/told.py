"""What a denoiser is told besides the noisy latents: the text's states, and what else a family tells it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

POOLED = "pooled"
"""What the pooled state of a prompt is called among ``others``, in every family that has one."""


@dataclass(frozen=True, slots=True)
class Told:
    """One row a picture.

    Attributes:
        states: the text's states, (N, L, D) float32: what a concept's name is read from, and what an attacker who
            holds the weights may choose freely.
        mask: which of the L positions hold text, (N, L) bool; None where a family reads all of them. What stands at
            the others is never read.
        others: what else the family's denoiser is told, by the family's own names, N rows each: a pooled state, sizes.
    """

    states: Tensor
    mask: Tensor | None = None
    others: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, index: Any) -> Told:
        """Rows by slice, mask or index tensor."""
        return self._each(lambda tensor: tensor[index])

    def expand(self, count: int) -> Told:
        """One row, ``count`` times."""
        return self[torch.zeros(count, dtype=torch.long)]

    def to(self, device: torch.device | str) -> Told:
        """The same on another device."""
        return self._each(lambda tensor: tensor.to(device))

    def with_tensors(self, changed: Mapping[str, Tensor]) -> Told:
        """The same with some of its ``tensors`` exchanged, by name."""
        mine = {**self.tensors(), **changed}
        return Told(mine.pop("states"), mine.pop("mask", None), mine)

    def replaced(self, rows: Tensor, other: Told) -> Told:
        """With the rows of a boolean mask taken from ``other``, which has as many rows, or one for all."""

        def choose(mine: Tensor, theirs: Tensor) -> Tensor:
            mask = rows.to(mine.device).view(-1, *([1] * (mine.dim() - 1)))
            return torch.where(mask, theirs, mine)

        return Told(
            choose(self.states, other.states),
            None if self.mask is None or other.mask is None else choose(self.mask, other.mask),
            {name: choose(tensor, other.others[name]) for name, tensor in self.others.items()},
        )

    def mean(self) -> Tensor:
        """The mean of each row's states over the positions that hold text, (N, D)."""
        if self.mask is None:
            return self.states.mean(dim=1)
        held = self.mask[:, :, None].to(self.states)
        return (self.states * held).sum(dim=1) / held.sum(dim=1)

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name."""
        masks = {} if self.mask is None else {"mask": self.mask}
        return {"states": self.states, **masks, **self.others}

    @staticmethod
    def join(*parts: Told) -> Told:
        """Several as one, in order; all of one family."""
        masks = [part.mask for part in parts if part.mask is not None]
        return Told(
            torch.cat([part.states for part in parts]),
            torch.cat(masks) if masks else None,
            {name: torch.cat([part.others[name] for part in parts]) for name in parts[0].others},
        )

    def _each(self, change: Callable[[Tensor], Tensor]) -> Told:
        return Told(
            change(self.states),
            None if self.mask is None else change(self.mask),
            {name: change(tensor) for name, tensor in self.others.items()},
        )
