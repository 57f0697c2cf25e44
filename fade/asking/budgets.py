"""How much an erasure by name draws, and what it does with it   (ours)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fade.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Budget:
    """How much an erasure by name draws.

    Attributes:
        neighbours: of the concept, among the ``others`` of its domain that are drawn beside it.
        across: concepts of the other domain, with each of which all of these are drawn.
        alone: pictures of the concept, and as many of its surrogate, by sentences that name them alone.
        kept: pictures of prompts from the list of what shall stay.
        changes: settings by their dotted names.
        solved: further ones where nothing is trained; ``trained`` where pictures are given, so that it trains.
    """

    neighbours: int
    others: int
    across: int
    alone: int
    kept: int
    changes: Mapping[str, Any] = field(default_factory=dict)
    solved: Mapping[str, Any] = field(default_factory=dict)
    trained: Mapping[str, Any] = field(default_factory=dict)


DOUBT: dict[str, Any] = {"gate.doubt": True}
"""A CLIP was never trained on what it judges: what it cannot tell it cannot find to have failed either."""
SOLVED: dict[str, Any] = {
    "distill.start": "closed_form",
    "distill.closed_form.whole": True,
    "distill.steps": 0,
    "distill.rank": 2,
    "mask.granularity": "none",
    "saliency.score": "random",
}
"""The closed form alone: at full size training takes a processor days. Where all may change nothing is ranked."""
BUDGETS = {
    "small": Budget(
        neighbours=2,
        others=4,
        across=3,
        alone=6,
        kept=12,
        changes={
            "split.retain_per_pair": 1,
            "split.holdout_per_pair": 1,
            "evaluate.seeds": [188, 288],
            **DOUBT,
            "gate.sure.most": 3,
            "gate.sure.round": 2,
        },
        # Captions are solved for: the few pictures tell the CLIP what the base makes of each name.
        solved={**SOLVED, "split.forget_per_pair": 1},
        trained={"split.forget_per_pair": 4},
    ),
    "normal": Budget(
        neighbours=4,
        others=12,
        across=10,
        alone=24,
        kept=120,
        changes={**DOUBT, "split.forget_per_pair": 8, "split.retain_per_pair": 2, "split.holdout_per_pair": 1},
    ),
}


def find_budget(name: str) -> Budget:
    """A budget by its name.

    Raises:
        ConfigError: there is none.
    """
    if name not in BUDGETS:
        raise ConfigError(f"There is no budget {name!r}: expected one of {', '.join(BUDGETS)}.")
    return BUDGETS[name]


def budget_changes(name: str, *, pictures: bool) -> dict[str, Any]:
    """The settings that a budget changes; where pictures are given it trains, for what is solved sees captions alone.

    Raises:
        ConfigError: as ``find_budget``.
    """
    budget = find_budget(name)
    return {**budget.changes, **(budget.trained if pictures else budget.solved)}
