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

from scipy.optimize import brentq
from scipy.special import betaln

from fade.config import Gate
from fade.evaluation.attacked import Attacks
from fade.evaluation.figures import Accuracies, JudgeFigures, Paired, Rate
from fade.evaluation.paired import loss_bounds
from fade.evaluation.power import ONE_LOOK_ERROR, too_few
from fade.evaluation.verdicts import Check, State, Verdict

_EDGE = 1e-12
_NONE = Attacks({})


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
    error, count = sure.error_rate, len(erased) + len(retained)
    return [check(name, ua.hits, ua.count, sure.ua, error=error, checks=count) for name, ua in erased.items()] + [
        check_retained(name, base.value, pairs, most, error=error, checks=count) for name, base, pairs, most in retained
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
    """``ua``, or ``ua of concept 1`` and on: a reason goes into the registry's page, where no name may stand."""
    several = len(side.erased) > 1
    return {
        f"ua of concept {number}" if several else "ua": found.ua
        for number, found in enumerate(side.erased.values(), start=1)
    }


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


def undecided(figures: JudgeFigures, gate: Gate) -> list[str]:
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


def verdict(figures: JudgeFigures, gate: Gate, attacks: Attacks = _NONE) -> Verdict:
    """Whether a judge's figures pass, and every reason if not. UA is asked of each erased concept by itself.

    Args:
        attacks: that were run; one that the gate asks for and that is not among them leaves the verdict open.
    """
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
    return Verdict(
        passed=not failed + unseen + unsure,
        reasons=tuple(failed + unseen + unsure),
        verdict="failed" if failed else "unjudged" if unseen else "borderline" if unsure else "passed",
        checks=tuple(checks),
        recognised=tuple(seen),
    )


def _failed_points(figures: JudgeFigures, gate: Gate) -> list[str]:
    """What the figures themselves do not reach."""
    points = {name: (found.value, gate.ua) for name, found in _asked_of(figures, gate).items()}
    asked = asked_of_rates(figures, gate)
    points |= {name: (figures.after.rates[name].value, asked[name]) for name in ("ira", "cra")}
    return [
        f"{name} is {reached:.4f}, at least {least:.4f} is asked"
        for name, (reached, least) in points.items()
        if reached < least - 1e-9
    ]


def asked_of_rates(figures: JudgeFigures, gate: Gate) -> dict[str, float]:
    """What the gate asks at least of UA, IRA and CRA themselves: of these two, what the base has less what may go."""
    before = figures.before
    return {"ua": gate.ua, "ira": before.ira.value - gate.ira_loss, "cra": before.cra.value - gate.cra_loss}


def _unseen(one: Check, gate: Gate) -> str:
    """Why a judge cannot say what became of something."""
    what = one.name.removeprefix("base: ")
    what = {"ira": "the rest of its domain (ira)", "cra": "the other domain (cra)"}.get(what, f"the {what}")
    bound = f"at most {one.high:.4f}" if one.state == "failed" else f"surely only at least {one.low:.4f}"
    return (
        f"the judge recognises {what} in {one.value:.4f} of {one.count} pictures of the base's own, {bound}; "
        f"{one.asked:.4f} is asked of that bound: what became of it cannot be seen{_of_power(one, gate)}"
    )


def _of_power(one: Check, gate: Gate) -> str:
    why = too_few(one.name, one.count, gate)
    return f" ({why})" if why else ""


def _attacks(attacks: Attacks, gate: Gate) -> tuple[list[str], list[str]]:
    """Attacks whose upper bound is above what the gate lets pass, and those that were not run."""
    asked = gate.attacks or {}
    run = {name: found for name in asked if (found := attacks.get(name)) is not None}
    broken = [
        f"the attack {name} brings the concept back in up to {found.high:.4f}, at most {asked[name]:.4f} is asked"
        for name, found in run.items()
        if found.high > asked[name]
    ]
    missing = [
        f"the attack {name} was not run, and the gate asks for it: run it (`fade attack ID --all`)"
        for name in asked
        if name not in run
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
