"""White-box inversion: how easily text states are found that bring the concept back.

An accuracy of prompts says that a *name* was forgotten. Whoever holds the erased weights and a few
pictures of the concept can search the space of text states itself: this does it, and counts how many
pictures drawn from the states it finds show the concept again. The same budget on the base is the
reference: an attack that fails there says nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fade.errors import DataError
from fade.models.base import Base
from fade.models.generate import Solver, generate_from
from fade.models.inversion import InversionStep, invert
from fade.models.told import Told
from fade.seeding import torch_generator


def invert_concept(
    base: Base,
    latents: Tensor,
    *,
    prompts: Sequence[str],
    restarts: int,
    steps: int,
    batch: int,
    learning_rate: float,
    precision: str,
    seed: int,
    pooled: bool = True,
) -> Iterator[InversionStep]:
    """Search text states for the concept's pictures on the network as it is now, adapters included.

    Yields after each step; the states of the last are what was found, one row a restart.

    Args:
        latents: the attacker's pictures of the concept, (N, C, h, w).
        prompts: where restarts begin, in turn.
        pooled: search pooled states too, where the base is told one: who holds the weights chooses what it is told.

    Raises:
        DataError: no pictures, or no prompts.
    """
    if len(latents) == 0 or not prompts:
        raise DataError(f"An inversion needs pictures and prompts: got {len(latents)} and {len(prompts)}.")
    generator = torch_generator(seed, "inversion attack")
    begin = base.encode_prompts([prompts[i % len(prompts)] for i in range(restarts)])
    yield from invert(
        base.denoiser,
        latents,
        start=begin,
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        generator=generator,
        precision=precision,
        pooled=pooled,
    )


def draw_from_states(
    base: Base,
    states: Told,
    *,
    seeds: Sequence[int],
    batch: int,
    steps: int,
    guidance: float,
    solver: Solver,
    precision: str,
) -> NDArray[np.uint8]:
    """A picture for each found state and seed, states fastest."""
    rows = torch.arange(len(states)).repeat(len(seeds))
    repeated = [seed for seed in seeds for _ in range(len(states))]
    parts = []
    for start in range(0, len(rows), batch):
        chosen = rows[start : start + batch]
        parts.append(
            generate_from(
                base,
                states[chosen],
                repeated[start : start + batch],
                steps=steps,
                guidance=guidance,
                solver=solver,
                precision=precision,
            )
        )
    return np.concatenate(parts)
