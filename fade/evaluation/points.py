"""Points of a search for an erasure's settings: what was tried, what was seen, and which is taken   (ours)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from matplotlib.figure import Figure

from fade.evaluation.looks import Fault, Look
from fade.evaluation.records import Count, Counted, Record

POINTS_NAME = "points.json"
FREE = 0.02
"""Drift of a look that nobody sees: a third of what an erasure may have."""


class Controls(Record):
    """Where a point lies: how it was made, and what a search moves.

    Attributes:
        made: solved (the closed form alone), or distilled from the best of these.
        rank, solved_weight: rank and retain weight of the closed form; the adapter of a distilled one is of more rank.
        steps: of distillation in all; of the last of them ``retain_weight``, ``forget_weight``, ``surrogate_share`` and
            ``timesteps``.
    """

    made: Literal["solved", "distilled"]
    rank: Counted
    solved_weight: float
    steps: Count = 0
    forget_weight: float
    retain_weight: float
    surrogate_share: float
    timesteps: str


class Point(Record):
    """One point: its controls, what was seen of it, and what follows."""

    controls: Controls
    look: Look
    score: float
    faults: tuple[Fault, ...]
    adapter_bytes: Counted

    @property
    def standing(self) -> tuple[bool, float]:
        """By what points with faults are compared: one of which others were looked at too is known to be as good."""
        return self.look.whole, self.score

    @property
    def free(self) -> bool:
        """Whether nothing is wrong with it, and it costs next to nothing."""
        return not self.faults and self.look.drift is not None and self.look.drift <= FREE


class Points(Record):
    """All that a search tried, in order: an erasure's ``points/points.json``.

    Attributes:
        chosen: number of the best, from 0; ``why`` in words.
        seeds: of the looks' pictures: no seed of an evaluation is among them.
    """

    tried: tuple[Point, ...]
    chosen: Count
    why: str
    seeds: tuple[int, ...]


def best_of(tried: Sequence[Point]) -> tuple[int, str]:
    """The point that is taken, and why.

    Without a fault, of those that cost next to nothing the one that reached most, else that of the least drift; where
    all have a fault, the highest score.
    """
    drifts = [point.look.drift or 0.0 for point in tried]
    free = [number for number, point in enumerate(tried) if point.free]
    good = [number for number, point in enumerate(tried) if not point.faults]
    if good:
        # What is free is compared without its drift.
        number = (
            max(free, key=lambda i: (round(tried[i].score + drifts[i], 9), -drifts[i]))
            if free
            else min(good, key=lambda i: drifts[i])
        )
        also = "" if len(good) == 1 else ", and that reached most" if free else ", and that moved the others least"
        return number, f"of {len(tried)} the one in which the pictures of its look show no fault{also}"
    number = max(range(len(tried)), key=lambda i: tried[i].standing)
    return number, (
        f"the highest score of {len(tried)}, in all of which the pictures show a fault (here: "
        f"{', '.join(tried[number].faults)})"
    )


def described(controls: Controls) -> str:
    """A point's controls in a few words."""
    if controls.made == "solved":
        return f"closed form, rank {controls.rank}, retain weight {controls.solved_weight:g}"
    return (
        f"{controls.steps} steps, weights {controls.forget_weight:g} : {controls.retain_weight:g}, surrogate share "
        f"{controls.surrogate_share:g}, timesteps {controls.timesteps}"
    )


def points_figure(points: Points) -> Figure:
    """The curve of what was tried: shares that are to be high over the points, drift below, the chosen one marked.

    Of a single point there is no curve: its shares are bars.
    """
    numbers = range(len(points.tried))
    looks = [point.look for point in points.tried]
    shares: dict[str, list[float]] = {
        "concept gone": [1 - look.shown / look.erased for look in looks],
        "surrogate shown": [look.surrogate / look.erased for look in looks if look.surrogate is not None],
        "no mush": [1 - look.mush / look.erased for look in looks],
        "neighbours kept": [_kept(look, look.base_near, look.near_lost, look.near_gained) for look in looks],
        "others kept": [_kept(look, look.base_rest, look.rest_lost, look.rest_gained) for look in looks],
        "score": [point.score for point in points.tried],
    }
    if len(points.tried) == 1:
        return _bars(points.tried[0], {name: values[0] for name, values in shares.items() if values})
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for name, values in shares.items():
        if values:
            style: dict[str, Any] = {"color": "black", "linewidth": 2} if name == "score" else {"alpha": 0.75}
            upper.plot(numbers, values, marker="o", markersize=4, label=name, **style)
    whole = [number for number in numbers if looks[number].whole]
    lower.plot(whole, [looks[number].drift for number in whole], marker="o", markersize=4, color="#555555")
    for axes in (upper, lower):
        axes.axvline(points.chosen, color="#116329", linestyle="--", alpha=0.6)
    upper.set(ylabel="share, judge development", ylim=(None, 1.02))
    upper.legend(frameon=False, fontsize=8, ncols=3)
    marks = ["solved" if one.controls.made == "solved" else f"{one.controls.steps} steps" for one in points.tried]
    lower.set(ylabel="drift", xlabel=f"point (chosen: {points.chosen})", ylim=(0, None))
    lower.set_xticks(list(numbers), [f"{number}\n{mark}" for number, mark in enumerate(marks)])
    return figure


def _bars(point: Point, shares: dict[str, float]) -> Figure:
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    axes = figure.subplots()
    seen = {name: share for name, share in shares.items() if not math.isnan(share)}
    colours = ["black" if name == "score" else "#5a9367" for name in seen]
    axes.bar_label(axes.barh(list(seen), list(seen.values()), color=colours), fmt="%.2f", padding=3, fontsize=8)
    axes.invert_yaxis()
    moved = "" if point.look.drift is None else f"; drift {point.look.drift:.3f}"
    axes.set_title(f"the one point tried: {described(point.controls)}{moved}", fontsize=9)
    axes.set(xlabel="share, judge development", xlim=(0, 1.1))
    return figure


def _kept(look: Look, base: int, lost: int, gained: int) -> float:
    """NaN, which is not drawn, where nobody looked."""
    if not look.whole:
        return math.nan
    return (base - lost + gained) / base if base else 1.0
