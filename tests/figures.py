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
    Reachable,
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
    surrogate: Counts | None = None,
    mush: Counts | None = None,
    reachable: Counts | None = None,
) -> JudgeFigures:
    """A judge's figures.

    Args:
        erased: concept to how many of its pictures name it before, how many after, and of how many; so ``names``.
        ira, cra, neighbours: right before, right after, of how many.
        surrogate, mush: of each erased concept's prompts, before, after, of how many; no surrogate and no mush if None.
        reachable: of the base's pictures of the surrogate, not called by the concept's name, called the surrogate, of
            how many; what is not is mush.
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
            erased={
                name: OfConcept(
                    ua=one,
                    surrogate=None if surrogate is None else rate(surrogate[which], surrogate[2]),
                    mush=rate(0 if mush is None else mush[which], one.count),
                )
                for name, one in ua.items()
            },
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
            clear={
                name: pairs(*((0, 0) if mush is None else (found[2] - mush[0], found[2] - mush[1])), found[2])
                for name, found in erased.items()
            },
        ),
        shuffled=OfDomains(object=rate(0, 10), style=rate(0, 10)),
        reachable={}
        if reachable is None
        else {
            name: Reachable(
                ua=rate(reachable[0], reachable[2]),
                surrogate=rate(reachable[1], reachable[2]),
                mush=rate(reachable[2] - reachable[1], reachable[2]),
            )
            for name in erased
        },
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
