"""White-box inversion: how easily text is found that brings the concept back.

An accuracy of prompts says that a *name* was forgotten. Whoever holds the erased weights and a few
pictures of the concept can search what the network is told: this does it, and counts how many
pictures drawn from what it finds show the concept again. The same budget on the base is the
reference: an attack that fails there says nothing.

Two spaces: the text's *states*, all of which are free, and *words*, new tokens before the text encoder
("concept inversion", arXiv:2308.01508). More steps find more, so success belongs to a number of steps: a
``Curve`` is of one search, looked at as it goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fade.errors import DataError
from fade.models.base import Base
from fade.models.generate import Solver, generate_from
from fade.models.inversion import InversionStep, NewTokens, WordSearch, invert, searched
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


def invert_words(
    base: Base,
    latents: Tensor,
    *,
    template: str,
    tokens: int,
    restarts: int,
    steps: int,
    batch: int,
    learning_rate: float,
    precision: str,
    seed: int,
) -> Iterator[InversionStep]:
    """The same with new tokens in a sentence, in the place of ``{}``; they begin at tokens drawn from the vocabulary.

    Raises:
        DataError: no pictures.
        ConfigError: the base reads prompts by no CLIP (``NewTokens``).
    """
    if len(latents) == 0:
        raise DataError("An inversion needs pictures: got 0.")
    generator = torch_generator(seed, "inversion attack", tokens)
    free = NewTokens(base, template, rows=restarts, count=tokens, generator=generator)
    search = WordSearch(latents, free, learning_rate=learning_rate, precision=precision)
    yield from searched(search, base.denoiser, steps=steps, batch=batch, generator=generator)


@dataclass(frozen=True, slots=True)
class Curve:
    """Success against steps: of ``count`` pictures, a restart and a seed each, how many have shown the concept.

    An attacker keeps what worked: a picture counts from the first stop at which it shows the concept, so that no curve
    falls. A search ends when all have: at later stops nothing else can be seen.

    Attributes:
        stops: numbers of steps after which it was looked at, ascending.
        hits: a count for each stop.
        prompts: those of its last look, of a search of prompts.
    """

    stops: tuple[int, ...]
    hits: tuple[int, ...]
    count: int
    prompts: tuple[str, ...] = ()


def success_curve(
    search: Iterator[InversionStep],
    shows: Callable[[Told], NDArray[np.bool_]],
    stops: Sequence[int],
) -> Generator[InversionStep, None, Curve]:
    """Yields the steps of a search and returns its curve.

    Args:
        search: of at least ``max(stops)`` steps; no more of them are taken than are needed.
        shows: which of the pictures drawn from the states of a step show the concept, in one order, boolean.
        stops: ascending.

    Raises:
        DataError: the search ended before the last stop.
    """
    ever: NDArray[np.bool_] | None = None
    hits: list[int] = []
    for step in search:
        yield step
        if step.step != stops[len(hits)]:
            continue
        seen = shows(step.states)
        ever = seen if ever is None else ever | seen
        hits.append(int(ever.sum()))
        if len(hits) == len(stops) or ever.all():
            every = tuple([*hits, *[hits[-1]] * (len(stops) - len(hits))])
            return Curve(tuple(stops), every, len(ever), step.prompts)
    raise DataError(f"A search was to be looked at after {', '.join(map(str, stops))} steps and ended before.")


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
