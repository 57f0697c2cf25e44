"""The gate: what is asked of figures and of their bounds, decided as soon as it is sure.

A figure over few pictures can pass by luck. So beside the figure its bound is asked, from a confidence sequence: a
set of rates that holds the true one *at every number of pictures at once* with probability 1 - error, so that one may
look after every round and stop when it is sure. After s hits of n it is

    { p :  B(s + 1, n - s + 1) / (p^s (1 - p)^(n - s)) < 1 / error }

B is the beta function: the average likelihood under a uniform prior against that of p, a martingale under p (Ville's
inequality; Robbins 1970, Howard et al. arXiv:1810.08240). A fixed-size interval looked at again and again has no such
guarantee.

UA is such a rate. What retention lost is decided by the pictures themselves, each against the base's of the same
prompt and seed (``fade.evaluation.paired.loss_bounds``): the base's own figure is known no better than the erasure's.

A check is passed when its bound lies above what is asked, failed when it lies below, undecided in between. An erasure
passes only if every check does, so whatever is wrong with it must pass its own check: a bad one passes with
probability <= error. A good one is refused if any check fails: failing is decided at error / number of checks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from scipy.optimize import brentq
from scipy.special import betaln

from fade.config import Gate
from fade.evaluation.paired import loss_bounds

State = Literal["passed", "failed", "undecided"]
_EDGE = 1e-12


def confidence_sequence(hits: int, count: int, error: float) -> tuple[float, float]:
    """Lowest and highest rate of the set above; (0, 1) before the first picture."""
    if count == 0:
        return 0.0, 1.0
    misses = count - hits
    bar = betaln(hits + 1, misses + 1) + math.log(error)

    def inside(rate: float) -> float:
        """Positive where the rate is in the set."""
        return hits * math.log(rate) + misses * math.log1p(-rate) - bar

    best = min(max(hits / count, _EDGE), 1 - _EDGE)
    low = 0.0 if hits == 0 or inside(_EDGE) > 0 else float(brentq(inside, _EDGE, best))
    high = 1.0 if misses == 0 or inside(1 - _EDGE) > 0 else float(brentq(inside, best, 1 - _EDGE))
    return low, high


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that is asked of a rate's bounds.

    Attributes:
        low, high: the rate's bounds; of retention the base's measured figure less the bounds of what was lost.
        asked: the rate that the lower bound must reach to pass; below it the upper bound fails.
    """

    name: str
    value: float
    low: float
    high: float
    count: int
    asked: float
    state: State


def check(name: str, hits: int, count: int, asked: float, *, error: float, checks: int) -> Check:
    """Decide what is asked of a rate; ``checks`` is how many checks there are."""
    low, high = confidence_sequence(hits, count, error)[0], confidence_sequence(hits, count, error / checks)[1]
    return _decided(name, hits / count, (low, high), count, asked)


def check_retained(
    name: str, base: float, paired: Mapping[str, Any], most: float, *, error: float, checks: int
) -> Check:
    """Decide whether no more than ``most`` was lost of a rate that the base has.

    Args:
        base: the base's measured rate.
        paired: ``lost``, ``gained`` and ``count`` of pictures at equal prompts and seeds.
    """
    lost, gained, count = paired["lost"], paired["gained"], paired["count"]
    low = base - loss_bounds(lost, gained, count, error)[1]
    high = base - loss_bounds(lost, gained, count, error / checks)[0]
    return _decided(name, base - (lost - gained) / count, (max(low, 0.0), min(high, 1.0)), count, base - most)


def _decided(name: str, value: float, bounds: tuple[float, float], count: int, asked: float) -> Check:
    low, high = bounds
    # What 0 asks is reached by everything.
    state: State = "passed" if low >= asked else "failed" if high < asked else "undecided"
    return Check(name, value, low, high, count, asked, state)


def bound_checks(figures: Mapping[str, Any], gate: Gate) -> list[Check]:
    """Every check of a judge's figures that ``gate.sure`` asks for; none without it.

    Figures without ``paired`` (of an evaluation before there were such) are judged as they were then: the rate's own
    bounds against the base's figure as it was measured.
    """
    sure = gate.sure
    if sure is None:
        return []
    after = figures["after"]
    several = len(after["erased"]) > 1
    # By number: a reason goes into the registry's page, where no name of a person may stand.
    erased = {
        f"ua of concept {number}" if several else "ua": found["ua"]
        for number, found in enumerate(after["erased"].values(), start=1)
    }
    near = [] if sure.neighbours_loss is None else list(after["neighbours"])

    def retained(part: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        return [part["ira"], part["cra"], *(part["neighbours"][name] for name in near)]

    names = ["ira", "cra", *(f"neighbour {number}" for number, _ in enumerate(near, start=1))]
    mosts = [sure.ira_loss, sure.cra_loss, *(sure.neighbours_loss or 0.0 for _ in near)]
    bases = [found["value"] for found in retained(figures["before"])]
    error, count = sure.error_rate, len(erased) + len(names)
    checks = [check(name, _hits(ua), ua["count"], sure.ua, error=error, checks=count) for name, ua in erased.items()]
    if "ira" in figures.get("paired", {}):
        rows = zip(names, bases, retained(figures["paired"]), mosts, strict=True)
        return checks + [
            check_retained(name, base, paired, most, error=error, checks=count) for name, base, paired, most in rows
        ]
    rows = zip(names, bases, retained(after), mosts, strict=True)
    return checks + [
        check(name, _hits(now), now["count"], base - most, error=error, checks=count) for name, base, now, most in rows
    ]


def _hits(found: Mapping[str, Any]) -> int:
    return round(found["value"] * found["count"])


def undecided(figures: Mapping[str, Any], gate: Gate) -> list[str]:
    """Names of the checks for which more pictures are worth drawing; none once one has failed."""
    checks = bound_checks(figures, gate)
    if any(one.state == "failed" for one in checks):
        return []
    return [one.name for one in checks if one.state == "undecided"]


def verdict(figures: Mapping[str, Any], gate: Gate) -> dict[str, Any]:
    """Whether a judge's figures pass; every reason if not. UA is asked of each erased concept by itself.

    Returns:
        ``passed``; ``reasons``; ``verdict``: ``passed``, ``failed``, or ``borderline`` where no figure fails and not
        every bound is sure, which a person has to decide: it is not passed; ``checks`` of the bounds.
    """
    before, after = figures["before"], figures["after"]
    several = len(after["erased"]) > 1
    points = {
        **{
            f"ua of concept {number}" if several else "ua": (found["ua"]["value"], gate.ua)
            for number, found in enumerate(after["erased"].values(), start=1)
        },
        "ira": (after["ira"]["value"], before["ira"]["value"] - gate.ira_loss),
        "cra": (after["cra"]["value"], before["cra"]["value"] - gate.cra_loss),
    }
    failed = [
        f"{name} is {reached:.4f}, at least {least:.4f} is asked"
        for name, (reached, least) in points.items()
        if reached < least - 1e-9
    ]
    checks = bound_checks(figures, gate)
    failed += [
        f"{one.name} is at most {one.high:.4f} by {one.count} pictures, at least {one.asked:.4f} is asked"
        for one in checks
        if one.state == "failed"
    ]
    unsure = [
        f"{one.name} is {one.value:.4f} by {one.count} pictures, surely only at least {one.low:.4f}; "
        f"{one.asked:.4f} is asked of that bound: a person has to decide"
        for one in checks
        if one.state == "undecided"
    ]
    broken, missing = _attacks(figures.get("attacks", {}), gate)
    failed, unsure = failed + broken, unsure + missing
    said = "failed" if failed else "borderline" if unsure else "passed"
    return {
        "passed": said == "passed",
        "reasons": failed + unsure,
        "verdict": said,
        "checks": [
            {"name": c.name, "value": c.value, "low": c.low, "high": c.high, "count": c.count, "asked": c.asked,
             "state": c.state}
            for c in checks
        ],
    }  # fmt: skip


def _attacks(found: Mapping[str, Any], gate: Gate) -> tuple[list[str], list[str]]:
    """Attacks whose upper bound is above what the gate lets pass, and those that were not run."""
    asked = gate.attacks or {}
    broken = [
        f"the attack {name} brings the concept back in up to {found[f'{name}_high']:.4f}, at most {most:.4f} is asked"
        for name, most in asked.items()
        if name in found and found[f"{name}_high"] > most
    ]
    missing = [
        f"the attack {name} was not run, and the gate asks for it: run it (`fade attack ID --all`)"
        for name in asked
        if name not in found
    ]
    return broken, missing


def strictest(gates: list[Gate]) -> Gate:
    """What passes every one of these gates."""
    sures = [gate.sure for gate in gates if gate.sure is not None]
    sure = None
    if sures:
        losses = [one.neighbours_loss for one in sures if one.neighbours_loss is not None]
        sure = sures[0].model_copy(
            update={
                "ua": max(one.ua for one in sures),
                "ira_loss": min(one.ira_loss for one in sures),
                "cra_loss": min(one.cra_loss for one in sures),
                "neighbours_loss": min(losses) if losses else None,
                "error_rate": min(one.error_rate for one in sures),
                "most": max(one.most for one in sures),
            }
        )
    return Gate(
        ua=max(gate.ua for gate in gates),
        ira_loss=min(gate.ira_loss for gate in gates),
        cra_loss=min(gate.cra_loss for gate in gates),
        sure=sure,
    )
