"""Figures of an evaluation as the gate takes them, from counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fade.evaluation.accuracy import rate

Counts = tuple[int, int]


def counted(hits: int, count: int) -> dict[str, Any]:
    """A rate as it is stored."""
    return asdict(rate(hits, count))


def pairs(before: int, after: int, count: int, *, swapped: int = 0) -> dict[str, Any]:
    """What changed sides between two rates: the difference, and ``swapped`` more in both directions."""
    lost, gained = max(before - after, 0) + swapped, max(after - before, 0) + swapped
    return {"lost": lost, "gained": gained, "count": count, "p": 1.0}


def judged_figures(
    erased: Mapping[str, tuple[int, int, int]],
    *,
    ira: tuple[int, int, int] = (550, 550, 550),
    cra: tuple[int, int, int] = (550, 550, 550),
    neighbours: Mapping[str, tuple[int, int, int]] | None = None,
    swapped: int = 0,
) -> dict[str, Any]:
    """A judge's figures.

    Args:
        erased: concept to how many of its pictures name it before, how many after, and of how many.
        ira, cra, neighbours: right before, right after, of how many.
        swapped: pictures of ``ira`` and ``cra`` that changed sides in either direction besides.
    """
    near = {"x": (50, 50, 50)} if neighbours is None else dict(neighbours)

    def side(which: int) -> dict[str, Any]:
        ua = {name: (found[2] - found[which], found[2]) for name, found in erased.items()}
        return {
            "ua": counted(sum(hits for hits, _ in ua.values()), sum(count for _, count in ua.values())),
            "erased": {name: {"ua": counted(*found)} for name, found in ua.items()},
            "ira": counted(ira[which], ira[2]),
            "cra": counted(cra[which], cra[2]),
            "neighbours": {name: counted(found[which], found[2]) for name, found in near.items()},
        }

    return {
        "before": side(0),
        "after": side(1),
        "paired": {
            "ira": pairs(*ira, swapped=swapped),
            "cra": pairs(*cra, swapped=swapped),
            "neighbours": {name: pairs(*found) for name, found in near.items()},
        },
    }
