"""Figures of an evaluation: what was counted and measured, held to what an evaluation can give.

The gate judges figures that lay in a file since they were measured. What it asks is asked of counted pictures: a
figure without a count, or one that no count of pictures gives, is refused and never read as a good one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import NormalDist
from typing import Any, Self

from pydantic import Field, model_validator

from fade.errors import DataError
from fade.evaluation.records import ByName, Count, Counted, Record, Share, contradiction

ROUNDING = 1e-9
"""How far a stored fraction may lie from the one that its counts give."""
RATES = ("ua", "ira", "cra")


class Rate(Record):
    """A share of ``count`` pictures with its 95 % Wilson score interval, fractions of 1."""

    value: float
    low: float
    high: float
    count: Counted

    @property
    def hits(self) -> int:
        """How many of the pictures."""
        return round(self.value * self.count)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not 0 <= self.hits <= self.count or abs(self.value - self.hits / self.count) > ROUNDING:
            raise contradiction("", f"{self.value} of {self.count} pictures", "hits / count, from 0 to 1")
        low, high = _wilson(self.hits, self.count)
        if abs(self.low - low) > ROUNDING or abs(self.high - high) > ROUNDING:
            said = f"{low:.6f} to {high:.6f} of {self.hits} in {self.count}"
            raise contradiction("", f"the interval {self.low} to {self.high}", said)
        return self


def rate(hits: int, count: int) -> Rate:
    """The share of hits and its Wilson interval.

    Raises:
        DataError: nothing was counted; there is no figure then, not even zero.
    """
    if count == 0:
        raise DataError("A rate over 0 pictures is no figure: the protocol has no prompt of this kind.")
    low, high = _wilson(hits, count)
    return Rate(value=hits / count, low=low, high=high, count=count)


def pooled(rates: Iterable[Rate]) -> Rate:
    """Several rates as one, over all their pictures."""
    each = list(rates)
    return rate(sum(one.hits for one in each), sum(one.count for one in each))


_Z = NormalDist().inv_cdf(0.975)


def _wilson(hits: int, count: int) -> tuple[float, float]:
    """Wilson's score interval (JASA 22, 1927) of 95 %."""
    share, spread = hits / count, _Z**2 / count
    middle = share + spread / 2
    half = _Z * math.sqrt((share * (1 - share) + spread / 4) / count)
    low, high = (middle - half) / (1 + spread), (middle + half) / (1 + spread)
    return 0.0 if hits == 0 else low, 1.0 if hits == count else high


class Paired(Record):
    """McNemar's exact test (Psychometrika 12, 1947): of pictures that changed sides, how many were lost.

    Attributes:
        lost: right before, wrong after; ``gained`` the other way round.
        p: two-sided; under no effect either side is as likely.
    """

    lost: Count
    gained: Count
    count: Counted
    p: Share


class OfConcept(Record):
    """An erased concept's prompts: UA, and the share that shows the surrogate where a judge knows it.

    Attributes:
        mush: the share that shows nothing the judge knows; None of figures that were taken before it was.
    """

    ua: Rate
    surrogate: Rate | None = None
    mush: Rate | None = None


class Reachable(Record):
    """What the best erasure can reach: of the base's own pictures of the surrogate, in an erased concept's place.

    Attributes:
        ua: the share that is not called by the concept's name.
        surrogate: the share that is called the surrogate.
        mush: the share that shows nothing the judge knows.
    """

    ua: Rate
    surrogate: Rate
    mush: Rate


class OfName(Record):
    """UA of the prompts that call an erased concept by a further name."""

    ua: Rate


class Accuracies(Record):
    """What a judge says of one set of pictures.

    Attributes:
        ua, surrogate: pooled over the erased concepts, each of which is in ``erased``.
        ira: accuracy of the erased concepts' domains, ``cra`` of the others, on prompts that name no erased concept.
        scrambled: pictures that show nothing the judge knows.
        names: further names of the erased concepts that the request brings.
    """

    ua: Rate
    ira: Rate
    cra: Rate
    scrambled: Rate
    surrogate: Rate | None = None
    erased: ByName[OfConcept]
    neighbours: ByName[Rate]
    names: ByName[OfName] = Field(default={}, exclude_if=lambda names: not names)

    @property
    def rates(self) -> dict[str, Rate]:
        """UA, IRA and CRA by their short names."""
        return {"ua": self.ua, "ira": self.ira, "cra": self.cra}

    def recognised(self) -> dict[str, Rate]:
        """How often a judge names what was asked for, of the base's own pictures.

        By the names ``concept``, or ``concept 1`` and on of several; ``ira`` and ``cra``, the rest of the erased
        concepts' domain and the other one; ``neighbour 1`` and on; ``name 1`` and on, further names of the request.
        """
        several = len(self.erased) > 1
        concepts = {
            f"concept {number}" if several else "concept": _named(found.ua)
            for number, found in enumerate(self.erased.values(), start=1)
        }
        near = {f"neighbour {number}": found for number, found in enumerate(self.neighbours.values(), start=1)}
        names = {f"name {number}": _named(found.ua) for number, found in enumerate(self.names.values(), start=1)}
        return concepts | {"ira": self.ira, "cra": self.cra} | near | names


def _named(ua: Rate) -> Rate:
    """UA counts the pictures that do not show the concept: the others do."""
    return _rest(ua)


class Retention(Record):
    """What changed sides on prompts that name no erased concept, picture by picture.

    Attributes:
        clear: of each erased concept's own prompts, what became mush (lost) and what was it no more.
    """

    ira: Paired
    cra: Paired
    neighbours: ByName[Paired]
    clear: ByName[Paired] = Field(default={}, exclude_if=lambda clear: not clear)


class OfDomains(Record):
    """How often a judge names the object and the style that were asked for."""

    object: Rate
    style: Rate


class JudgeFigures(Record):
    """All figures of one judge; ``judge_figures`` makes them.

    Every rate is of at least one picture; before and after are of as many; the pooled UA is that of the concepts; what
    changed sides is what the rates differ by.

    Attributes:
        recognised: what it names of the base's own pictures (``Accuracies.recognised`` of ``before``).
        shuffled: the control: what it names in the pictures' shuffled patches, near 0 if it does not go by texture.
        reachable: by erased concept, where its surrogate is one that the judge knows.
    """

    before: Accuracies
    after: Accuracies
    paired: Retention
    recognised: Mapping[str, Rate]
    shuffled: OfDomains
    reachable: ByName[Reachable] = Field(default={}, exclude_if=lambda found: not found)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        sides = (("before", self.before), ("after", self.after))
        if not self.after.erased:
            raise contradiction("after.erased", "nothing", "each erased concept's UA")
        _alike("erased", *(side.erased for _, side in sides))
        _alike("neighbours", *(side.neighbours for _, side in sides), self.paired.neighbours)
        _alike("names", *(side.names for _, side in sides))
        for name, side in sides:
            hits, count = (
                sum(getattr(one.ua, part) for one in side.erased.values()) for part in ("hits", "count")
            )  # fmt: skip
            if (side.ua.hits, side.ua.count) != (hits, count):
                got = f"{side.ua.hits} of {side.ua.count}"
                raise contradiction(f"{name}.ua", got, f"the sum of the erased concepts', {hits} of {count}")
        for kind in ("erased", "names"):
            both = zip(getattr(self.before, kind).values(), getattr(self.after, kind).values(), strict=True)
            for number, (was, now) in enumerate(both, start=1):
                if was.ua.count != now.ua.count:
                    got = f"of {was.ua.count} and {now.ua.count} pictures"
                    raise contradiction(f"after.{kind}.{number}.ua", got, "as many before as after")
        self._check_retained()
        self._check_erased()
        if self.recognised != self.before.recognised():
            raise contradiction("recognised", "other than the figures before", "what they give")
        return self

    def overwriting(self) -> dict[str, Rate]:
        """What became of the erased concepts' prompts and of the neighbours, pooled; what was not judged is left out.

        ``surrogate_share`` and ``mush`` of these prompts, ``base_mush``; ``reachable_ua``, ``reachable_surrogate`` and
        ``reachable_mush`` of the base's own pictures of the surrogates; ``neighbours`` and ``base_neighbours``, the
        share of these that is named as asked.
        """
        was, now, best = self.before.erased.values(), self.after.erased.values(), self.reachable.values()
        parts: dict[str, list[Rate | None]] = {
            "surrogate_share": [one.surrogate for one in now],
            "mush": [one.mush for one in now],
            "base_mush": [one.mush for one in was],
            "reachable_ua": [one.ua for one in best],
            "reachable_surrogate": [one.surrogate for one in best],
            "reachable_mush": [one.mush for one in best],
            "neighbours": list(self.after.neighbours.values()),
            "base_neighbours": list(self.before.neighbours.values()),
        }
        judged = {name: [one for one in found if one is not None] for name, found in parts.items()}
        return {name: pooled(found) for name, found in judged.items() if found}

    def _check_retained(self) -> None:
        for name in ("ira", "cra"):
            _check_pairs(name, getattr(self.before, name), getattr(self.after, name), getattr(self.paired, name))
        for number, key in enumerate(self.paired.neighbours, start=1):
            was, now = self.before.neighbours[key], self.after.neighbours[key]
            _check_pairs(f"neighbours.{number}", was, now, self.paired.neighbours[key])

    def _check_erased(self) -> None:
        """Of each erased concept: both sides have mush and its pairs, or none has; what is reachable has a share."""
        for number, (name, now) in enumerate(self.after.erased.items(), start=1):
            was, pairs = self.before.erased[name], self.paired.clear.get(name)
            there = [found is not None for found in (was.mush, now.mush, pairs)]
            if any(there) and not all(there):
                raise contradiction(f"after.erased.{number}.mush", "in a part of the figures", "in all of them or none")
            if was.mush is not None and now.mush is not None and pairs is not None:
                _check_pairs(f"clear.{number}", _rest(was.mush), _rest(now.mush), pairs)
                if now.mush.count != now.ua.count:
                    got = f"of {now.mush.count} pictures"
                    raise contradiction(f"after.erased.{number}.mush", got, f"of {now.ua.count}, as UA")
            if name in self.reachable and now.surrogate is None:
                raise contradiction(f"reachable.{number}", "there", "nothing where no surrogate is judged")
        if set(self.reachable) - set(self.after.erased):
            raise contradiction("reachable", "of other names", "of erased concepts")


def _rest(found: Rate) -> Rate:
    """The share of the others."""
    return rate(found.count - found.hits, found.count)


def judge_figures(
    *,
    before: Accuracies,
    after: Accuracies,
    paired: Retention,
    shuffled: OfDomains,
    reachable: Mapping[str, Reachable] | None = None,
) -> JudgeFigures:
    """A judge's figures, with what it recognises."""
    return JudgeFigures(
        before=before,
        after=after,
        paired=paired,
        recognised=before.recognised(),
        shuffled=shuffled,
        reachable=reachable or {},
    )


def _alike(what: str, *parts: Mapping[str, object]) -> None:
    if any(set(part) != set(parts[0]) for part in parts):
        sizes = " and ".join(str(len(part)) for part in parts)
        raise contradiction(what, f"{sizes} of other names", "the same in every part")


def _check_pairs(name: str, was: Rate, now: Rate, paired: Paired) -> None:
    """A retained rate and its pairs: of the same pictures, and what was lost less what was gained is the difference."""
    where = f"paired.{name}"
    if not was.count == now.count == paired.count:
        got = f"of {was.count}, {now.count} and {paired.count} pictures"
        raise contradiction(where, got, "the same pictures before and after")
    lost, gained = paired.lost, paired.gained
    if lost > was.hits or gained > was.count - was.hits or was.hits - now.hits != lost - gained:
        expected = f"what leads from {was.hits} to {now.hits} of {was.count}"
        raise contradiction(where, f"{lost} lost and {gained} gained", expected)


class Seen(OfDomains):
    """What a judge sees in a base's own pictures; ``scrambled`` is what shows nothing it knows."""

    scrambled: Rate


class BaseReport(Record):
    """A base's ``report/metrics.json``: how well the judges, where there are any, know its pictures."""

    samples: Count
    settings: Mapping[str, Any]
    development: Seen | None = None
    report: Seen | None = None


class JudgeAccuracy(Record):
    """How well a judge knows real pictures that it was not trained on.

    Attributes:
        shuffled_object_accuracy: the control: of the pictures' shuffled patches, near 0 if it does not go by texture.
    """

    holdout_pictures: Counted
    object_accuracy: Share
    style_accuracy: Share
    shuffled_object_accuracy: Share
    shuffled_called_scrambled: Share


class JudgesReport(Record):
    """The judges' own ``metrics.json``."""

    development: JudgeAccuracy
    report: JudgeAccuracy


class Judges(Record):
    """Both judges: settings are chosen by one, figures are the other's."""

    development: JudgeFigures
    report: JudgeFigures
