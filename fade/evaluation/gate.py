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

None of it says anything where the judge does not know what it looks at: a concept that it names in no picture is "gone"
from every picture. So first the same is asked of what it recognises in the *base's own* pictures, those that the
figures before are of: the erased concepts by their names, the rest of their domain, the other domain, the neighbours.
Where that is not sure, and nothing fails, the erasure is ``unjudged``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from scipy.optimize import brentq
from scipy.special import betaln

from fade.config import Gate
from fade.evaluation.figures import check_attacks, check_figures
from fade.evaluation.paired import loss_bounds
from fade.evaluation.power import ONE_LOOK_ERROR, too_few

State = Literal["passed", "failed", "undecided"]
PASSED, FAILED, BORDERLINE, UNJUDGED = "passed", "failed", "borderline", "unjudged"
"""Verdicts. What is borderline or unjudged is not passed: a person's reason alone lets it through."""
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
    """Every check of a judge's figures that ``gate.sure`` asks for; none without it."""
    sure = gate.sure
    if sure is None:
        return []
    before, after, paired = (figures[name] for name in ("before", "after", "paired"))
    erased = {name: found["ua"] for name, found in _asked_of(figures, gate)}
    near = [] if sure.neighbours_loss is None else list(after["neighbours"])

    def retained(part: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        return [part["ira"], part["cra"], *(part["neighbours"][name] for name in near)]

    names = ["ira", "cra", *(f"neighbour {number}" for number, _ in enumerate(near, start=1))]
    mosts = [sure.ira_loss, sure.cra_loss, *(sure.neighbours_loss or 0.0 for _ in near)]
    error, count = sure.error_rate, len(erased) + len(names)
    checks = [check(name, _hits(ua), ua["count"], sure.ua, error=error, checks=count) for name, ua in erased.items()]
    rows = zip(names, retained(before), retained(paired), mosts, strict=True)
    return checks + [
        check_retained(name, base["value"], pairs, most, error=error, checks=count) for name, base, pairs, most in rows
    ]


def recognition(figures: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """In how many of the base's own pictures a judge names what was asked for: hits and count.

    By the names ``concept``, or ``concept 1`` and on of several; ``ira`` and ``cra``, the rest of the erased concepts'
    domain and the other one; ``neighbour 1`` and on; ``name 1`` and on, further names that a request brings.
    """
    before = figures["before"]
    erased = {
        name.replace("ua of ", "").replace("ua", "concept"): (found["ua"]["count"] - _hits(found["ua"]), found["ua"])
        for name, found in _numbered(before["erased"])
    }
    rest = {"ira": before["ira"], "cra": before["cra"]}
    named = {
        f"name {number}": (found["ua"]["count"] - _hits(found["ua"]), found["ua"]["count"])
        for number, found in enumerate(before.get("names", {}).values(), start=1)
    }
    rest |= {f"neighbour {number}": found for number, found in enumerate(before["neighbours"].values(), start=1)}
    return (
        {name: (hits, ua["count"]) for name, (hits, ua) in erased.items()}
        | {name: (_hits(found), found["count"]) for name, found in rest.items()}
        | named
    )


def recognition_checks(figures: Mapping[str, Any], gate: Gate) -> list[Check]:
    """Whether the judge knows what it is asked about: the bounds of ``recognition``, at least ``gate.recognised``.

    Of neighbours where their loss is asked: what the judge does not see of them cannot be lost.
    """
    asked = {name: found for name, found in recognition(figures).items() if not name.startswith("name ")}
    if gate.sure is None or gate.sure.neighbours_loss is None:
        asked = {name: found for name, found in asked.items() if not name.startswith("neighbour")}
    error = ONE_LOOK_ERROR if gate.sure is None else gate.sure.error_rate
    return [
        check(f"base: {name}", hits, count, gate.recognised, error=error, checks=len(asked))
        for name, (hits, count) in asked.items()
    ]


def _numbered(erased: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """``ua``, or ``ua of concept 1`` and on: a reason goes into the registry's page, where no name may stand."""
    several = len(erased) > 1
    return [
        (f"ua of concept {number}" if several else "ua", found) for number, found in enumerate(erased.values(), start=1)
    ]


def _asked_of(figures: Mapping[str, Any], gate: Gate) -> list[tuple[str, Any]]:
    """Whose UA is asked: the erased concepts', and of further names those by which the base draws the concept.

    What the base never took for a name of the concept has nothing to lose, and says nothing of the others.
    """
    before = figures["before"].get("names", {})
    return _numbered(figures["after"]["erased"]) + [
        (f"ua of name {number}", found)
        for number, (name, found) in enumerate(figures["after"].get("names", {}).items(), start=1)
        if 1 - before[name]["ua"]["value"] >= gate.recognised
    ]


def _hits(found: Mapping[str, Any]) -> int:
    return round(found["value"] * found["count"])


def undecided(figures: Mapping[str, Any], gate: Gate) -> list[str]:
    """Names of the checks for which more pictures are worth drawing; none once one has failed, or without ``sure``."""
    if gate.sure is None:
        return []
    checks = bound_checks(figures, gate) + recognition_checks(figures, gate)
    if any(one.state == "failed" for one in checks):
        return []
    return [one.name for one in checks if one.state == "undecided"]


def of_the_concept(name: str) -> bool:
    """Whether a check is of the erased concepts' own prompts."""
    return name.startswith(("ua", "base: concept"))


def verdict(figures: Mapping[str, Any], gate: Gate) -> dict[str, Any]:
    """Whether a judge's figures pass; every reason if not. UA is asked of each erased concept by itself.

    Returns:
        ``passed``; ``reasons``; ``verdict``: ``passed``, ``failed``, ``unjudged`` where no figure fails and the judge
        does not surely recognise in the base's own pictures what it is asked about, or ``borderline`` where no figure
        fails and not every bound is sure. The last two a person has to decide: neither is passed. ``checks`` of the
        bounds and ``recognised``, those of the base's own pictures.

    Raises:
        DataError: the figures are none that an evaluation can have given (``fade.evaluation.figures``).
    """
    check_figures(figures)
    attacks = figures.get("attacks", {})
    check_attacks(attacks, gate.attacks or {})
    checks, seen = bound_checks(figures, gate), recognition_checks(figures, gate)
    failed = _failed_points(figures, gate)
    failed += [
        f"{one.name} is at most {one.high:.4f} by {one.count} pictures, at least {one.asked:.4f} is asked"
        for one in checks
        if one.state == "failed"
    ]
    unseen = [_unseen(one, gate) for one in seen if one.state != "passed"]
    unsure = [
        f"{one.name} is {one.value:.4f} by {one.count} pictures, surely only at least {one.low:.4f}; "
        f"{one.asked:.4f} is asked of that bound: a person has to decide{_of_power(one, gate)}"
        for one in checks
        if one.state == "undecided"
    ]
    broken, missing = _attacks(attacks, gate)
    failed, unsure = failed + broken, unsure + missing
    said = FAILED if failed else UNJUDGED if unseen else BORDERLINE if unsure else PASSED
    return {
        "passed": said == PASSED,
        "reasons": failed + unseen + unsure,
        "verdict": said,
        "checks": [asdict(one) for one in checks],
        "recognised": [asdict(one) for one in seen],
    }


def _failed_points(figures: Mapping[str, Any], gate: Gate) -> list[str]:
    """What the figures themselves do not reach."""
    before, after = figures["before"], figures["after"]
    points = {
        **{name: (found["ua"]["value"], gate.ua) for name, found in _asked_of(figures, gate)},
        "ira": (after["ira"]["value"], before["ira"]["value"] - gate.ira_loss),
        "cra": (after["cra"]["value"], before["cra"]["value"] - gate.cra_loss),
    }
    return [
        f"{name} is {reached:.4f}, at least {least:.4f} is asked"
        for name, (reached, least) in points.items()
        if reached < least - 1e-9
    ]


def _unseen(one: Check, gate: Gate) -> str:
    """Why a judge cannot say what became of something."""
    what = one.name.removeprefix("base: ")
    what = {"ira": "the rest of its domain (ira)", "cra": "the other domain (cra)"}.get(what, f"the {what}")
    bound = f"at most {one.high:.4f}" if one.state == FAILED else f"surely only at least {one.low:.4f}"
    return (
        f"the judge recognises {what} in {one.value:.4f} of {one.count} pictures of the base's own, {bound}; "
        f"{one.asked:.4f} is asked of that bound: what became of it cannot be seen{_of_power(one, gate)}"
    )


def _of_power(one: Check, gate: Gate) -> str:
    why = too_few(one.name, one.count, gate)
    return f" ({why})" if why else ""


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
    attacks: dict[str, float] = {}
    for gate in gates:
        for name, most in (gate.attacks or {}).items():
            attacks[name] = min(most, attacks.get(name, most))
    return Gate(
        ua=max(gate.ua for gate in gates),
        ira_loss=min(gate.ira_loss for gate in gates),
        cra_loss=min(gate.cra_loss for gate in gates),
        recognised=max(gate.recognised for gate in gates),
        sure=sure,
        attacks=attacks or None,
    )
