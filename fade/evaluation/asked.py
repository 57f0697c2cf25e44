"""What the gate asks, check by check: of figures over few pictures, and of the bounds beside them   (ours).

``fade.evaluation.gate`` says what each of them means and what is made of them; here is how each is counted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from fade.config import Gate
from fade.evaluation.bounds import confidence_sequence, loss_bounds
from fade.evaluation.figures import Accuracies, JudgeFigures, Paired, Rate
from fade.evaluation.power import ONE_LOOK_ERROR
from fade.evaluation.verdicts import Check, State

Kind = TypeVar("Kind")


def check(name: str, hits: int, count: int, asked: float, *, error: float, checks: int) -> Check:
    """Decide what is asked of a rate; ``checks`` is how many checks there are."""
    low, high = confidence_sequence(hits, count, error)[0], confidence_sequence(hits, count, error / checks)[1]
    return _decided(name, hits / count, (low, high), count, asked)


def check_retained(name: str, base: float, paired: Paired, most: float, *, error: float, checks: int) -> Check:
    """Decide whether no more than ``most`` was lost of a rate that the base has.

    Args:
        base: the base's measured rate.
        paired: of pictures at equal prompts and seeds.
    """
    lost, gained, count = paired.lost, paired.gained, paired.count
    low = base - loss_bounds(lost, gained, count, error)[1]
    high = base - loss_bounds(lost, gained, count, error / checks)[0]
    return _decided(name, base - (lost - gained) / count, (max(low, 0.0), min(high, 1.0)), count, base - most)


def _decided(name: str, value: float, bounds: tuple[float, float], count: int, asked: float) -> Check:
    low, high = bounds
    # Where nothing is asked, the bound 0 is enough.
    state: State = "passed" if low >= asked else "failed" if high < asked else "undecided"
    return Check(name=name, value=value, low=low, high=high, count=count, asked=asked, state=state)


def bound_checks(figures: JudgeFigures, gate: Gate) -> list[Check]:
    """Every check of a judge's figures that ``gate.sure`` asks for; none without it."""
    sure = gate.sure
    if sure is None:
        return []
    before, paired = figures.before, figures.paired
    erased = _asked_of(figures, gate)
    retained = [
        ("ira", before.ira, paired.ira, sure.ira_loss),
        ("cra", before.cra, paired.cra, sure.cra_loss),
    ]
    if sure.neighbours_loss is not None:
        retained += [
            (f"neighbour {number}", before.neighbours[name], pairs, sure.neighbours_loss)
            for number, (name, pairs) in enumerate(paired.neighbours.items(), start=1)
        ]
    rates = [(name, ua, sure.ua) for name, ua in erased.items()]
    rates += [(name, found, sure.surrogate * best) for name, found, best in _surrogates(figures)]
    losses = [(name, base.value, pairs, most) for name, base, pairs, most in retained]
    losses += [(one.name, 1 - one.base, one.pairs, sure.mush + one.granted) for one in _clear(figures)]
    error, count = sure.error_rate, len(rates) + len(losses)
    return [check(name, found.hits, found.count, asked, error=error, checks=count) for name, found, asked in rates] + [
        check_retained(name, base, pairs, most, error=error, checks=count) for name, base, pairs, most in losses
    ]


def _surrogates(figures: JudgeFigures) -> list[tuple[str, Rate, float]]:
    """Of each erased concept with a surrogate: the check's name, the share that shows it, and the reachable share."""
    found = []
    for name, (key, one) in _numbered("surrogate", figures.after.erased):
        if one.surrogate is not None and key in figures.reachable:
            found.append((name, one.surrogate, figures.reachable[key].surrogate.value))
    return found


@dataclass(frozen=True, slots=True)
class _Clear:
    """What of an erased concept's own prompts is no mush.

    ``granted``: more mush in the surrogate's own pictures, which are ``of`` so many where there is more.
    """

    name: str
    base: float
    mush: Rate
    pairs: Paired
    granted: float
    of: int


def _clear(figures: JudgeFigures) -> list[_Clear]:
    found = []
    for name, (key, one) in _numbered("unscrambled", figures.after.erased):
        was = figures.before.erased[key].mush
        if was is not None and one.mush is not None:
            best = figures.reachable[key].mush if key in figures.reachable else was
            more, pairs = max(best.value - was.value, 0.0), figures.paired.clear[key]
            count = best.count if more else was.count
            found.append(_Clear(name, was.value, one.mush, pairs, granted=more, of=count))
    return found


def _numbered(what: str, erased: Mapping[str, Kind]) -> list[tuple[str, tuple[str, Kind]]]:
    """``what``, or ``what of concept 1`` and on: a reason goes into the registry's page, where no name may stand."""
    several = len(erased) > 1
    return [
        (f"{what} of concept {number}" if several else what, one) for number, one in enumerate(erased.items(), start=1)
    ]


def recognition_checks(figures: JudgeFigures, gate: Gate) -> list[Check]:
    """Whether the judge knows what it is asked about: the bounds of what it recognises, at least ``gate.recognised``.

    Of neighbours where their loss is asked: what the judge does not see of them cannot be lost.
    """
    asked = {name: found for name, found in figures.recognised.items() if not name.startswith("name ")}
    if gate.sure is None or gate.sure.neighbours_loss is None:
        asked = {name: found for name, found in asked.items() if not name.startswith("neighbour")}
    error = ONE_LOOK_ERROR if gate.sure is None else gate.sure.error_rate
    return [
        check(f"base: {name}", found.hits, found.count, gate.recognised, error=error, checks=len(asked))
        for name, found in asked.items()
    ]


def _by_number(side: Accuracies) -> dict[str, Rate]:
    return {name: one.ua for name, (_, one) in _numbered("ua", side.erased)}


def _asked_of(figures: JudgeFigures, gate: Gate) -> dict[str, Rate]:
    """Whose UA is asked: the erased concepts', and of further names those by which the base draws the concept.

    What the base never took for a name of the concept has nothing to lose, and says nothing of the others.
    """
    before = figures.before.names
    return _by_number(figures.after) | {
        f"ua of name {number}": found.ua
        for number, (name, found) in enumerate(figures.after.names.items(), start=1)
        if 1 - before[name].ua.value >= gate.recognised
    }


@dataclass(frozen=True, slots=True)
class Point:
    """A figure and what is asked of it itself.

    Attributes:
        rate: whose bound says how far it may still go; or ``pairs``, where the base has ``base``.
    """

    name: str
    value: float
    asked: float
    rate: Rate | None = None
    pairs: Paired | None = None
    base: float = 0.0

    @property
    def reached(self) -> bool:
        """Whether the figure is what is asked, but for rounding."""
        return self.value >= self.asked - 1e-9

    def surely_not(self, gate: Gate, points: int) -> bool:
        """Whether more pictures would hardly bring it there, at ``gate.sure``'s error rate over all points."""
        if gate.sure is None:
            return not self.reached
        error = gate.sure.error_rate / points
        if self.pairs is not None:
            pairs = self.pairs
            return self.base - loss_bounds(pairs.lost, pairs.gained, pairs.count, error)[0] < self.asked
        return self.rate is not None and confidence_sequence(self.rate.hits, self.rate.count, error)[1] < self.asked


def points_of(figures: JudgeFigures, gate: Gate) -> list[Point]:
    """All that is asked of the figures themselves."""
    before, after, paired = figures.before, figures.after, figures.paired
    asked = asked_of_ua(figures, gate)
    found = [Point(name, ua.value, asked[name], rate=ua) for name, ua in _asked_of(figures, gate).items()]
    found += [Point(name, shown.value, gate.surrogate * best, rate=shown) for name, shown, best in _surrogates(figures)]
    for one in _clear(figures):
        worst = one.base + one.granted
        count = one.mush.count
        # No mush among a few of the base's pictures does not say that there is none.
        known = (worst * count + 1) / (count + 2) if gate.doubt else worst
        most = worst + gate.mush + _standard_error(known, one.of, count)
        found.append(Point(one.name, 1 - one.mush.value, 1 - min(most, 1.0), pairs=one.pairs, base=1 - one.base))
    least = asked_of_rates(figures, gate)
    for name in ("ira", "cra"):
        was, pairs = before.rates[name].value, getattr(paired, name)
        found.append(Point(name, after.rates[name].value, least[name], pairs=pairs, base=was))
    return found


def _standard_error(share: float, one: int, other: int) -> float:
    """Of the difference of two equal shares, of so many pictures each."""
    return math.sqrt(share * (1 - share) * (1 / one + 1 / other))


def asked_of_ua(figures: JudgeFigures, gate: Gate) -> dict[str, float]:
    """What is asked of each UA itself, by its check's name; of further names what is asked least of a concept."""
    found = {}
    for name, (key, one) in _numbered("ua", figures.after.erased):
        best = 1.0
        if key in figures.reachable:
            of = figures.reachable[key].ua
            best = of.value - _standard_error(of.value, of.count, one.ua.count)
        found[name] = gate.ua * max(best, 0.0)
    least = min(found.values())
    return found | {name: least for name in _asked_of(figures, gate) if name not in found}


def asked_of_rates(figures: JudgeFigures, gate: Gate) -> dict[str, float]:
    """What the gate asks at least of UA, IRA and CRA themselves: of these two, what the base has less what may go."""
    before, ua = figures.before, min(asked_of_ua(figures, gate).values())
    least = {}
    for name, loss in (("ira", gate.ira_loss), ("cra", gate.cra_loss)):
        was = before.rates[name]
        least[name] = was.value - loss - (_standard_error(was.value, was.count, was.count) if gate.doubt else 0.0)
    return {"ua": ua, **least}


def concept_of(name: str) -> int | None:
    """The number, from 1, of the erased concept whose own prompts a check is of; None where it is of what is kept.

    Further names are of no one concept.
    """
    found = re.fullmatch(r"(?:ua|surrogate|unscrambled)(?: of concept (\d+))?|base: concept(?: (\d+))?", name)
    return None if found is None else int(found[1] or found[2] or 1)
