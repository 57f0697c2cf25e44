"""Power: how many pictures the gate needs at least to be able to decide what it asks, known before any is drawn.

The best that can happen is that every picture is right and none changed sides. Where even then a bound stays below
what is asked, more pictures are needed, or less must be asked: no erasure can pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache

from fade.config import Gate
from fade.evaluation.bounds import log_average_rate, loss_bounds

_MOST = 1 << 24
"""So many pictures nobody draws: what is open then is open for ever."""
ONE_LOOK_ERROR = 0.05
"""Error of what is asked of the base's own pictures where ``gate.sure`` names none."""


@cache
def least_for_rate(asked: float, error: float) -> int | None:
    """Pictures after which a rate of 1 is surely at least ``asked``; None if no number is enough.

    All hits: of ``fade.evaluation.bounds.confidence_sequence`` the lower bound p has p^n = error M.
    """
    return least(lambda n: log_average_rate(n, 0) + math.log(error) >= n * math.log(asked) if asked > 0 else True)


@cache
def least_for_loss(most: float, error: float) -> int | None:
    """Pictures none of which changed sides after which at most ``most`` is surely lost; None if no number is enough."""
    return least(lambda n: loss_bounds(0, 0, n, error)[1] <= most)


def least_counts(gate: Gate) -> dict[str, int | None]:
    """The least of each thing that is asked: ``ua``, ``ira``, ``cra``, ``neighbour``, and ``base`` of each of these."""
    sure = gate.sure
    error = ONE_LOOK_ERROR if sure is None else sure.error_rate
    found = {"base": least_for_rate(gate.recognised, error)}
    if sure is None:
        return found
    found |= {
        "ua": least_for_rate(sure.ua, error),
        "ira": least_for_loss(sure.ira_loss, error),
        "cra": least_for_loss(sure.cra_loss, error),
        "surrogate": least_for_rate(sure.surrogate, error),
        "unscrambled": least_for_loss(sure.mush, error),
    }
    if sure.neighbours_loss is not None:
        found["neighbour"] = least_for_loss(sure.neighbours_loss, error)
    return found


def too_few(name: str, count: int, gate: Gate) -> str:
    """Why not even the best erasure could decide a check (``ua``, ``ira``, ``neighbour 2``, ``base: ...``) by a count.

    Empty if it could.
    """
    what = "base" if name.startswith("base") else name.partition(" ")[0]
    needed = least_counts(gate).get(what, 1)
    if needed is not None and count >= needed:
        return ""
    if needed is None:
        return f"no number of pictures can make {name} sure of what is asked: ask less of it"
    return (
        f"{count} pictures can never make {name} sure, {needed} are needed: give more evaluate.seeds or a larger "
        "gate.sure.most, or ask less"
    )


def without_power(gate: Gate, counts: Mapping[str, int]) -> list[str]:
    """What a gate asks that it can never decide, a sentence each.

    Args:
        counts: the most pictures that can be drawn of ``ua`` (a concept), ``ira``, ``cra`` and ``neighbour`` (each).
    """
    asked = {name: count for name, count in counts.items() if name in least_counts(gate)}
    asked |= {f"base: {'concept' if name == 'ua' else name}": count for name, count in counts.items()
              if name != "neighbour" or name in asked}  # fmt: skip
    return [said for name, count in asked.items() if (said := too_few(name, count, gate))]


def least(enough: Callable[[int], bool]) -> int | None:
    """The first number of pictures that is enough, by halving."""
    high = 1
    while not enough(high):
        high *= 2
        if high > _MOST:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
