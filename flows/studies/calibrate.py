"""Calibrate: the smallest adapter, then the fewest steps, with which one concept's erasure passes its gate."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from prefect import flow

from fade.asking.prepare import prepare_spec
from fade.config import load_settings
from fade.errors import ConfigError, DataError
from fade.evaluation.gate import verdict
from fade.evaluation.measured import Evaluation
from fade.evaluation.records import load
from fade.project import Project
from fade.spec import load_spec, save_spec
from fade.steps.catalog import ensure_catalog
from fade.studies.trial import TRIALS
from tasks.trials import trial

LADDER: tuple[tuple[str, int], ...] = (
    *(("cross_attention", rank) for rank in (1, 2, 4)),
    *(("attention", rank) for rank in (2, 4)),
    *(("all", rank) for rank in (1, 2, 4, 6)),
)
"""Where the adapter may lie (``mask.within``) and its rank, from the smallest file to the largest."""

SHARES = (1.0, 0.75, 0.5, 0.375, 0.25)
"""Shares of the steps to try, from all to few."""


@dataclass
class Calibration:
    """What was tried and what is best.

    Attributes:
        probes: figures of every trial, with its settings and whether the development judge let it pass.
        best: the settings of the smallest that passed, with the fewest steps; None if none did.
        row: its figures.
        ended: False if the budget ran out before the search was through.
    """

    probes: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    row: dict[str, Any] | None = None
    ended: bool = True


Rung = TypeVar("Rung")


class _OutOfBudget(Exception):
    pass


@flow(name="calibrate")
def calibrate(
    concept: str,
    surrogate: str,
    budget: float,
    changes: Mapping[str, Any],
    *,
    project: Project,
) -> Calibration:
    """Search by halving; whether a trial passes is decided by the development judge, figures are the report judge's.

    Halving takes for granted that more room, or more steps, never forgets less: a small setting that
    would pass between two that do not is missed.

    Args:
        budget: seconds; a trial that would probably end later is not begun.

    Raises:
        ConfigError: the budget is not positive.
        DataError: not one trial passed.
    """
    if budget <= 0:
        raise ConfigError(f"The budget must be positive: got {budget} s. A trial takes about a minute on the canvas.")
    ensure_catalog(project)
    distill = load_settings(project.params, changes=changes).distill
    # Of a deep erasure the steps are a setting of its own: changing the other would change nothing.
    most, counted = distill.in_force.steps, "distill.deep.steps" if distill.depth == "deep" else "distill.steps"
    found, begun = Calibration(), time.perf_counter()

    def passes(given: dict[str, Any]) -> bool:
        spent = time.perf_counter() - begun
        longest = max((probe["wall_seconds"] for probe in found.probes), default=0.0)
        if found.probes and spent + longest > budget:
            raise _OutOfBudget
        settings = load_settings(project.params, changes={**changes, **given})
        spec = prepare_spec(concept, surrogate, project=project, settings=settings)
        folder = TRIALS / spec.id
        save_spec(spec, folder)
        row = trial(folder)
        metrics = load(Evaluation, folder / "evaluation" / "metrics.json")
        passed = verdict(metrics.judges.development, load_spec(folder).gate, metrics.attacks).passed
        wall = time.perf_counter() - begun - spent
        found.probes.append({**given, **row, "development_passed": passed, "wall_seconds": round(wall, 1)})
        if passed:
            found.best, found.row = given, found.probes[-1]
        return passed

    try:
        place = _smallest(LADDER, lambda rung: passes(_settings(*rung, steps={counted: most})))
        if place is not None:
            steps = [max(1, round(share * most)) for share in SHARES]
            _smallest(steps[::-1], lambda count: count == most or passes(_settings(*place, steps={counted: count})))
    except _OutOfBudget:
        found.ended = False
    if found.best is None:
        tried = ", ".join(f"{probe['mask.within']} rank {probe['distill.rank']}" for probe in found.probes)
        raise DataError(
            f"No setting passed the gate{'' if found.ended else ' within the budget'}; tried: {tried}. "
            f"Give it more steps (--set {counted}=...), another surrogate, or a larger budget."
        )
    return found


def _settings(within: str, rank: int, *, steps: Mapping[str, int]) -> dict[str, Any]:
    return {
        "mask.granularity": "none",
        "mask.density": 1.0,
        "mask.within": within,
        "distill.rank": rank,
        "distill.alpha": float(rank),
        **steps,
    }


def _smallest(rungs: Sequence[Rung], passes: Callable[[Rung], bool]) -> Rung | None:
    """The first rung that passes, by halving; the last is asked only if all below it fail."""
    low, high = 0, len(rungs)
    while low < high:
        middle = (low + high) // 2
        if passes(rungs[middle]):
            high = middle
        else:
            low = middle + 1
    return rungs[low] if low < len(rungs) else None
