"""Verdicts: what the gate says of figures, as a record. ``fade.evaluation.gate.verdict`` alone makes one."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from fade.evaluation.records import Count, Record, contradiction

State = Literal["passed", "failed", "undecided"]
Said = Literal["passed", "failed", "unjudged", "borderline"]


class Check(Record):
    """One thing that the gate asks of a rate's bounds.

    Attributes:
        low, high: the rate's bounds; of retention the base's measured figure less the bounds of what was lost.
        asked: the rate that the lower bound must reach to pass; below it the upper bound fails.
    """

    name: str
    value: float
    low: float
    high: float
    count: Count
    asked: float
    state: State


class Verdict(Record):
    """What the gate says of figures.

    Attributes:
        passed: whether ``verdict`` is "passed".
        reasons: each thing that is in the way; empty where it passed.
        verdict: ``unjudged`` where no figure fails and the judge does not surely recognise in the base's own pictures
            what it is asked about (a judge in doubt: the concept), ``borderline`` where no figure fails and not every
            bound is sure. These two a person has to decide.
        checks: of the bounds; ``recognised``, those of the base's own pictures.
    """

    passed: bool
    verdict: Said
    reasons: tuple[str, ...]
    checks: tuple[Check, ...]
    recognised: tuple[Check, ...]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.passed != (self.verdict == "passed") or self.passed == bool(self.reasons):
            got = f"{self.verdict}, passed {self.passed} and {len(self.reasons)} reasons"
            raise contradiction("", got, "reasons unless it passed")
        return self

    @property
    def for_a_person(self) -> bool:
        """Whether only a person's reason lets it through."""
        return self.verdict in TO_DECIDE


TO_DECIDE = {
    "borderline": "its figures pass the gate, not every bound is sure",
    "unjudged": "the judge does not surely recognise, in the base's own pictures, what it is asked about",
}
"""Verdicts that only a person's reason lets through, and why."""
