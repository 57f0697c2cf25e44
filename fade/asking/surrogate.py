"""A surrogate by its pictures: of the nearest in text one that is told from the concept, and known itself   (ours).

The nearest concept in text space keeps the rest where it was, and is not always the best: what looks alike stays alike,
and of a surrogate that the base draws badly no erasure can be better. So the base draws a few pictures of each of the
nearest, in the concept's place, and the judge ``development`` names them. Where none of them is told well, the next
nearest are looked at too. Taken is the nearest of those

- whose pictures are called by their own name, not by the concept's, and no mush, as often as the best candidate's are
  (but for one standard error, or one picture): mush by object or by style, as the gate counts it,
- of which, among these, the fewest are called by the concept's name: under the surrogate they still count as it, and
- that differ from the concept's at the same seeds by at least three quarters of what candidates differ in the middle.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from fade.concepts import CAPTION_TEMPLATE, Concept, caption
from fade.data.catalog import load_templates
from fade.evaluation.accuracy import drift, is_mush
from fade.evaluation.neighbours import surrogates
from fade.evaluation.zero_shot import open_judge
from fade.models.base import Base
from fade.spec import Spec
from fade.steps.drawn import base_pictures, ended, look_seeds, named_by

CANDIDATES, PICTURES = 4, 16
MOST, WELL = 12, 0.9
"""How many are looked at, at most: ``CANDIDATES`` more while the best of them is told in less of its pictures."""
ENOUGH = 0.75


@dataclass(frozen=True, slots=True)
class Candidate:
    """What was seen of a concept that may stand for another.

    Attributes:
        own: of ``count`` pictures, those called by its own name that are no mush; ``taken``, by the erased concept's.
        mush: those that the judge calls mush, by object or by style.
        apart: RMS distance to the concept's pictures, 0..1.
    """

    concept: Concept
    own: int
    taken: int
    mush: int
    count: int
    apart: float

    @property
    def told(self) -> float:
        """Share that is known as itself less the share that is taken for the concept."""
        return (self.own - self.taken) / self.count


def surrogate_by_pictures(
    base: Base, spec: Spec, concept: Concept, concepts: Iterable[Concept], *, protected: Iterable[str]
) -> tuple[Concept, str]:
    """The surrogate that ``auto`` takes, and why, without a name.

    Args:
        spec: how the base draws, and which judges look; its own surrogate is not looked at.

    Raises:
        ConfigError: no concept may be one.
    """
    known = list(concepts)
    nearest = surrogates(base, concept, known, protected=protected)[:MOST]
    torch.set_num_threads(spec.threads)
    beside = [one.name for one in known if one.kind != concept.kind]
    drawing = spec.evaluate.model_copy(update={"steps": spec.tune.solver_steps})
    drawn_by = spec.model_copy(update={"evaluate": drawing})
    judge = open_judge(Path(spec.judges), "development", called=[one.name for one in known])
    found: list[Candidate] = []
    while len(found) < len(nearest) and max((one.told for one in found), default=0.0) < WELL:
        some = nearest[len(found) : len(found) + CANDIDATES]
        samples = _samples((concept, *some), beside, spec)
        pictures = ended(base_pictures(base, drawn_by, samples))
        named = named_by(judge, pictures, samples)
        found += [candidate(concept, one, named, pictures) for one in some]
    return chosen(found)


def candidate(concept: Concept, one: Concept, named: pd.DataFrame, pictures: NDArray[np.uint8]) -> Candidate:
    """What was seen of one that may stand for ``concept``.

    Args:
        named: samples of both and of others, with what a judge saw (``seen_object``, ``seen_style``); ``pictures`` are
            theirs.
    """
    of, seen = named[concept.kind], f"seen_{concept.kind}"
    own, mush = named[of == one.name], is_mush(named[of == one.name])
    return Candidate(
        one,
        own=int(((own[seen] == one.name) & ~mush).sum()),
        taken=int((own[seen] == concept.name).sum()),
        mush=int(mush.sum()),
        count=len(own),
        apart=drift(pictures[np.asarray(of == concept.name)], pictures[np.asarray(of == one.name)]),
    )


def chosen(candidates: Sequence[Candidate]) -> tuple[Concept, str]:
    """The nearest that is told apart and differs enough, and why; ``candidates`` come nearest first."""
    best = max(candidates, key=lambda one: one.told)
    share = best.own / best.count
    least = best.told - max(math.sqrt(2 * share * (1 - share) / best.count), 1 / best.count)
    middle = float(np.median([one.apart for one in candidates]))
    known = [one for one in candidates if one.told >= least - 1e-9]
    fewest = min(one.taken for one in known)
    fit = [one for one in known if one.taken == fewest and one.apart >= ENOUGH * middle]
    taken = fit[0] if fit else best
    place = candidates.index(taken) + 1
    return taken.concept, (
        f"of the {len(candidates)} nearest in text the {_ordinal(place)}"
        f"{'' if place == 1 else ', the first that is told apart and differs enough' if fit else ', told apart best'}: "
        f"of {taken.count} pictures that the base drew of it the judge calls {taken.own} by its own name, "
        f"{taken.taken} by the concept's and {taken.mush or 'none'} mush; RMS distance to the concept's "
        f"{taken.apart:.2f} (middle {middle:.2f})"
    )


def _ordinal(place: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(place, f"{place}th")


def _samples(drawn: Sequence[Concept], beside: Sequence[str], spec: Spec) -> pd.DataFrame:
    template = (load_templates(Path(spec.catalog)) or (CAPTION_TEMPLATE,))[0]
    seeds, other = look_seeds(spec), "style" if drawn[0].kind == "object" else "object"
    rows = []
    for one in drawn:
        for i in range(PICTURES):
            pair = {one.kind: one.name, other: beside[i % len(beside)]}
            rows.append(
                {**pair, "seed": seeds[i % len(seeds)], "prompt": caption(pair["object"], pair["style"], template)}
            )
    return pd.DataFrame(rows)
