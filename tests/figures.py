"""Figures of an evaluation as the gate takes them, from counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fade.config import Gate
from fade.evaluation.attacked import Attack, Attacks
from fade.evaluation.figures import (
    Accuracies,
    JudgeFigures,
    Judges,
    OfConcept,
    OfDomains,
    OfName,
    Paired,
    Retention,
    judge_figures,
    rate,
)
from fade.evaluation.gate import verdict
from fade.evaluation.measured import Evaluation

Counts = tuple[int, int, int]
"""Right before, right after, of how many; of an erased concept: named before, named after."""


def pairs(before: int, after: int, count: int, *, swapped: int = 0) -> Paired:
    """What changed sides between two rates: the difference, and ``swapped`` more in both directions."""
    lost, gained = max(before - after, 0) + swapped, max(after - before, 0) + swapped
    return Paired(lost=lost, gained=gained, count=count, p=1.0)


def judged_figures(
    erased: Mapping[str, Counts],
    *,
    ira: Counts = (550, 550, 550),
    cra: Counts = (550, 550, 550),
    neighbours: Mapping[str, Counts] | None = None,
    names: Mapping[str, Counts] | None = None,
    swapped: int = 0,
) -> JudgeFigures:
    """A judge's figures.

    Args:
        erased: concept to how many of its pictures name it before, how many after, and of how many; so ``names``.
        ira, cra, neighbours: right before, right after, of how many.
        swapped: pictures of ``ira`` and ``cra`` that changed sides in either direction besides.
    """
    near = {"x": (50, 50, 50)} if neighbours is None else dict(neighbours)

    def side(which: int) -> Accuracies:
        ua = {name: rate(found[2] - found[which], found[2]) for name, found in erased.items()}
        called = {name: rate(found[2] - found[which], found[2]) for name, found in (names or {}).items()}
        return Accuracies(
            ua=rate(sum(one.hits for one in ua.values()), sum(one.count for one in ua.values())),
            ira=rate(ira[which], ira[2]),
            cra=rate(cra[which], cra[2]),
            scrambled=rate(0, 10),
            erased={name: OfConcept(ua=one) for name, one in ua.items()},
            neighbours={name: rate(found[which], found[2]) for name, found in near.items()},
            names={name: OfName(ua=one) for name, one in called.items()},
        )

    return judge_figures(
        before=side(0),
        after=side(1),
        paired=Retention(
            ira=pairs(*ira, swapped=swapped),
            cra=pairs(*cra, swapped=swapped),
            neighbours={name: pairs(*found) for name, found in near.items()},
        ),
        shuffled=OfDomains(object=rate(0, 10), style=rate(0, 10)),
    )


def attacked(base: float = 1.0, **counts: tuple[int, int]) -> Attacks:
    """Attacks by name, each with the pictures that show the concept, and of how many."""
    return Attacks({name: Attack(**dict(rate(*count)), base=base) for name, count in counts.items()})


def evaluation(figures: JudgeFigures, *, gate: Gate, attacks: Attacks | None = None, **others: Any) -> Evaluation:
    """An erasure's figures, both judges of one mind; ``others`` in the place of what stands here."""
    run = Attacks({}) if attacks is None else attacks
    measured = {
        "samples": 100,
        "seeds": (188,),
        "neighbours": tuple(figures.after.neighbours),
        "drift": 0.01,
        "change_of_concept": 0.2,
        "perceptual_drift": 0.01,
        "fid_judge": 0.1,
        "kid_judge": 0.001,
        "adapter_sha256": "a" * 64,
        "adapter_bytes": 9,
    }
    judges = Judges(development=figures, report=figures)
    return Evaluation(**{**measured, **others}, judges=judges, attacks=run, gate=verdict(figures, gate, run))
