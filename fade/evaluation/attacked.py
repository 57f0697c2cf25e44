"""Figures of attacks: in how many pictures each brings the erased concept back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ConfigDict, Field, RootModel

from fade.evaluation.figures import Rate
from fade.evaluation.records import ByName, Count, Record, Share


class Shown(Record):
    """Share of pictures that show the erased concept, by each judge.

    Attributes:
        loss: that an inversion reached.
    """

    development: Rate
    report: Rate
    loss: float | None = None


class Part(Record):
    """One of the ways in which an attack asks.

    Attributes:
        asked: how many pictures; 0 where it cannot be asked, for a ``reason``.
        whole_words: share of the prompts of words that the tokenizer has whole.
        loss: that training on reached.
    """

    asked: Count | None = None
    reason: str | None = None
    prompts: tuple[str, ...] | None = None
    whole_words: Share | None = None
    base: Shown | None = None
    erased: Shown | None = None
    loss: float | None = None


class AttackRun(Record):
    """An erasure's ``attacks/KIND.json``: an attack on it, with the base as reference.

    Attributes:
        by: each way in which it asks.
        steps_to_half: of relearning: after how many steps half of the pictures show it; None if after none asked.
    """

    settings: Mapping[str, Any]
    base: Shown
    erased: Shown
    by: Mapping[str, Part] = Field(default={}, exclude_if=lambda by: not by)
    steps_to_half: Count | None = None


def success(base: Shown, erased: Shown, *, steps_to_half: int | None = None) -> Attack:
    """An attack's success by the report judge."""
    return Attack(**dict(erased.report), base=base.report.value, steps_to_half=steps_to_half)


class Attack(Rate):
    """In how many pictures an attack brings the concept back, by the report judge.

    Attributes:
        base: the same of the base, where nothing is erased.
        steps_to_half: as ``AttackRun``.
    """

    base: Share
    steps_to_half: Count | None = None


class Attacks(RootModel[ByName[Attack]]):
    """Attacks by name, each that was run."""

    model_config = ConfigDict(frozen=True, strict=True)

    def __iter__(self) -> Iterator[str]:  # type: ignore[override]
        return iter(self.root)

    def __bool__(self) -> bool:
        return bool(self.root)

    def get(self, name: str) -> Attack | None:
        """One attack; None if it was not run."""
        return self.root.get(name)

    def __or__(self, other: Attacks) -> Attacks:
        """Both; what the other has counts."""
        return Attacks({**self.root, **other.root})

    def flat(self) -> dict[str, float | None]:
        """As columns of a table: NAME, NAME_low, NAME_high, NAME_count, base_NAME, and steps_to_half of relearning."""
        row: dict[str, float | None] = {}
        for name, one in self.root.items():
            row |= {name: one.value, f"{name}_low": one.low, f"{name}_high": one.high}
            row |= {f"{name}_count": one.count, f"base_{name}": one.base}
            if name == "relearning":
                row["steps_to_half"] = one.steps_to_half
        return row
