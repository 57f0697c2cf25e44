"""The gate: what is asked of figures and of their bounds, decided as soon as it is sure.

A figure over few pictures can pass by luck. So beside the figure its bound is asked, from a confidence sequence, so
that one may look after every round and stop when it is sure (``fade.evaluation.bounds``).

UA is such a rate. What retention lost is decided by the pictures themselves, each against the base's of the same
prompt and seed (``fade.evaluation.bounds.loss_bounds``): the base's own figure is known no better than the erasure's.

A check is passed when its bound lies above what is asked, failed when it lies below, undecided in between. An erasure
passes only if every check does, so whatever is wrong with it must pass its own check: a bad one passes with
probability <= error. A good one is refused if any check fails: failing is decided at error / number of checks.

What is asked of the erased concept's own prompts is asked against what can be reached: the best erasure gives, under
the concept's name, what the base draws under the surrogate's. Some of *those* pictures the judge may call by the
concept's name, some it may not know as the surrogate, some may be mush. So the figure UA is asked to be at least
``gate.ua`` of the share of them that is not called by the concept's name, less the standard error of the difference of
two such shares (both are of few pictures); the share that shows the surrogate at least ``gate.surrogate`` of theirs;
and mush at most ``gate.mush`` above the base's own on these prompts, or on the surrogate's if there is more, and that
standard error. Where the base knows both concepts these are ``gate.ua`` and ``gate.mush`` themselves. The bounds
(``gate.sure``) are asked of UA as it is: where concept and surrogate cannot be told apart, no erasure passes.

A judge that was never trained on what it judges (``gate.doubt``) errs on the base's own pictures too, on a share
1 - r of them, and errs on others once a picture has moved a little. So of what IRA and CRA may lose, such a gate grants
the standard error of the difference of two such shares beside ``gate.ira_loss`` and ``gate.cra_loss``. A judge that
knows everything (r = 1) is granted nothing there. Of mush the standard error is that of the share (k + 1) / (n + 2)
(Laplace's rule): of the few pictures that such a gate has, one that it cannot read is no failure, and a person decides.
The bounds (``gate.sure``) are asked as they are.

None of it says anything where the judge does not know what it looks at: a concept that it names in no picture is "gone"
from every picture. So first the same is asked of what it recognises in the *base's own* pictures, those that the
figures before are of: the erased concepts by their names, the rest of their domain, the other domain, the neighbours.
Where that is not sure, and nothing fails, the erasure is ``unjudged``. With ``doubt``, something kept that the judge
names often enough, in too few pictures to be sure of it, leaves the erasure ``borderline`` instead, with its figures.
"""

from __future__ import annotations

from fade.config import Gate
from fade.evaluation.asked import bound_checks, concept_of, points_of, recognition_checks
from fade.evaluation.attacked import Attacks
from fade.evaluation.figures import JudgeFigures
from fade.evaluation.power import too_few
from fade.evaluation.verdicts import Check, Verdict

_NONE = Attacks({})


def surely_missed(figures: JudgeFigures, gate: Gate) -> list[str]:
    """Names of the checks that no more pictures can mend: a bound that failed, or a figure that is surely not reached.

    Of a good erasure there is once one, however often one looks, with a probability of at most ``error_rate`` for the
    bounds and as much for the figures. Without ``sure`` there is none.
    """
    if gate.sure is None:
        return []
    points = points_of(figures, gate)
    checks = bound_checks(figures, gate) + recognition_checks(figures, gate)
    failed = [one.name for one in checks if one.state == "failed"]
    return failed + [one.name for one in points if not one.reached and one.surely_not(gate, len(points))]


def lost_concepts(figures: JudgeFigures, gate: Gate) -> frozenset[int]:
    """Numbers, from 1, of the erased concepts of whose own prompts something is surely missed."""
    return frozenset(number for name in surely_missed(figures, gate) if (number := concept_of(name)) is not None)


def hopeless(figures: JudgeFigures, gate: Gate) -> bool:
    """Whether no picture more is worth drawing: something kept is surely missed, or every erased concept is lost.

    One of several that is lost says nothing of the others, of which somebody may want to know all the same.
    """
    missed = [concept_of(name) for name in surely_missed(figures, gate)]
    return None in missed or len(set(missed)) == len(figures.after.erased)


def undecided(figures: JudgeFigures, gate: Gate) -> list[str]:
    """Names of the checks for which more pictures are worth drawing; none where it is hopeless, or without ``sure``.

    A figure that is not reached is one of them as long as its bound leaves it open, and ends it once it does not. Where
    one of several concepts is lost no adapter passes that has it, and only the others' own prompts are still asked.
    """
    if gate.sure is None or hopeless(figures, gate):
        return []
    checks = bound_checks(figures, gate) + recognition_checks(figures, gate)
    open_ = [one.name for one in checks if one.state == "undecided"]
    open_ += [one.name for one in points_of(figures, gate) if not one.reached]
    lost = lost_concepts(figures, gate)
    return [name for name in dict.fromkeys(open_) if not lost or concept_of(name) not in {None, *lost}]


def surely_blind(figures: JudgeFigures, gate: Gate) -> bool:
    """Whether the judge surely does not know an erased concept by its own name: of others it can say no more."""
    checks = recognition_checks(figures, gate)
    return any(one.state == "failed" and one.name.startswith("base: concept") for one in checks)


def amiss(figures: JudgeFigures, gate: Gate) -> list[str]:
    """Erased concepts whose own prompts fail, or that the judge does not surely know in the base's, in their order.

    What only a person can decide is not among them: it leaves an adapter borderline, and costs it nothing else.
    """
    names = [one.name for one in points_of(figures, gate) if not one.reached]
    names += [one.name for one in bound_checks(figures, gate) if one.state == "failed"]
    names += [one.name for one in recognition_checks(figures, gate) if one.state != "passed"]
    numbers = {concept_of(name) for name in names}
    return [name for number, name in enumerate(figures.after.erased, start=1) if number in numbers]


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
    blind = [one for one in seen if one.state != "passed" and not _open(one, gate)]
    unseen = [_unseen(one, gate) for one in blind]
    unsure = [_unseen(one, gate) for one in seen if _open(one, gate)]
    unsure += [
        f"{one.name} is {one.value:.4f} by {one.count} pictures, surely only at least {one.low:.4f}; "
        f"{one.asked:.4f} is asked of that bound: a person has to decide{_of_power(one, gate)}"
        for one in checks
        if one.state == "undecided"
    ]
    unsure += _not_measured(figures, gate)
    broken, missing = _attacks(attacks, gate)
    failed, unsure = failed + broken, unsure + missing
    if gate.doubt and any(one.name.startswith("base: concept") for one in blind):
        failed, unsure = [], []
    return Verdict(
        passed=not failed + unseen + unsure,
        reasons=tuple(failed + unseen + unsure),
        verdict="failed" if failed else "unjudged" if unseen else "borderline" if unsure else "passed",
        checks=tuple(checks),
        recognised=tuple(seen),
    )


def _open(seen: Check, gate: Gate) -> bool:
    """Whether a doubtful judge found something that is kept often enough, in too few pictures to be sure of it.

    Its figures of the concept mean no less for that; of the concept itself they would.
    """
    kept = not seen.name.startswith("base: concept")
    return gate.doubt and kept and seen.state == "undecided" and seen.value >= seen.asked


def _failed_points(figures: JudgeFigures, gate: Gate) -> list[str]:
    """What the figures themselves do not reach."""
    return [
        f"{one.name} is {one.value:.4f}, at least {one.asked:.4f} is asked"
        for one in points_of(figures, gate)
        if not one.reached
    ]


def _not_measured(figures: JudgeFigures, gate: Gate) -> list[str]:
    """What the gate asks for and figures of former versions do not have."""
    if gate.mush >= 1 or all(one.mush is not None for one in figures.after.erased.values()):
        return []
    return ["how much of the concept's prompts became mush was not measured, and the gate asks for it: evaluate again"]


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
                "surrogate": max(one.surrogate for one in sures),
                "mush": min(one.mush for one in sures),
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
        surrogate=max(gate.surrogate for gate in gates),
        mush=min(gate.mush for gate in gates),
        recognised=max(gate.recognised for gate in gates),
        doubt=any(gate.doubt for gate in gates),
        sure=sure,
        attacks=attacks or None,
    )
