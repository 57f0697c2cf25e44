"""One distillation in several processes: each computes a share of every batch, and their gradients are added up.

All processes draw the same whole batches from the same seed, so the sum is the gradient of one process, up to the
rounding of another order of addition, and all of them take the same step. A launcher starts the processes
(``accelerate launch``, ``torchrun``); torch.distributed connects them, by NCCL between GPUs and by gloo without.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed


@dataclass(frozen=True, slots=True)
class Processes:
    """Which of how many this process is, from 0."""

    index: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files."""
        return self.index == 0

    def rows(self, total: int) -> slice:
        """This process' share of so many rows; shares differ by one row at most."""
        return slice(total * self.index // self.count, total * (self.index + 1) // self.count)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors, in place, by their sums over all processes."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        distributed.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def mean(self, value: float, device: torch.device) -> float:
        """The mean of a value over all processes; where they compute the same, its rounding is agreed on."""
        if self.count == 1:
            return value
        found = torch.tensor([value / self.count], device=device)
        self.add_up([found])
        return float(found)


ALONE = Processes()


@contextmanager
def launched() -> Iterator[Processes]:
    """The processes that a launcher started, connected until the block ends; this one alone without a launcher."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    try:
        yield Processes(state.process_index, state.num_processes)
    finally:
        state.destroy_process_group()
