"""Before an erasure by name: from a checkpoint and a name to a spec; nothing is drawn yet   (ours).

There are no pictures, no catalog and no classifier. What would stand in a catalog is planned (``fade.asking.planned``),
the base draws it (``fade.steps.generate``), and a CLIP judges, if it can (``fade.steps.calibrate``). From there on the
erasure is one like any other. All that can be wrong with what is asked is said here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fade.asking.planned import Asked, Plan, guess_kind, make_plan
from fade.asking.prepare import prepare_spec
from fade.concepts import CAPTION_TEMPLATE
from fade.config import OUR_METHOD, Settings
from fade.errors import ConfigError, listing
from fade.evaluation.clip_score import clip_sha256
from fade.evaluation.detectors import find_detector
from fade.evaluation.zero_shot import NOBODY
from fade.models.family import load_base
from fade.models.prompts import Reader, cut_short, hardly_met, readers, spelt_out
from fade.models.source import find_base
from fade.names import mention, spelling
from fade.project import Project
from fade.spec import Spec
from fade.steps.generate import named
from fade.steps.given import describe_given
from fade.words import KINDS, Kind, as_kind, domain_of, vocabulary


@dataclass(frozen=True, slots=True)
class Prepared:
    """An erasure by name, and what a person reads of it before the base draws.

    Attributes:
        guessed: why the concept is of its kind, where nobody said so.
        drawn: pictures that the base draws for training; ``judged``: those of it before, and as many after.
    """

    spec: Spec
    plan: Plan
    kind: Kind
    guessed: str | None
    drawn: int
    judged: int


def prepare_by_name(asked: Asked, *, project: Project, settings: Settings) -> Prepared:
    """The spec of an erasure by name; its plan is written to ``data/named/``.

    Args:
        project: whose base it is; its catalog and judges are left alone.
        settings: with what the budget changes.

    Raises:
        ConfigError: what is asked contradicts itself: names every fault of it.
        DataError: the CLIP or a further judge is none, or the pictures are too few or unreadable.
        BaseModelError: the base is missing or not supported.
    """
    asked = _tidy(asked)
    reading = readers(find_base(project.base))
    _check_asked(asked, reading)
    given = None if asked.pictures is None else describe_given(asked.pictures)
    judge = None if asked.clip == NOBODY else clip_sha256(asked.clip)
    detectors = tuple(find_detector(one) for one in asked.judges)
    base = load_base(project.base)
    read = [word for word in vocabulary() if not any(spelt_out(reading, [word.name]))]
    unmet = hardly_met(base, [word.name for word in read])
    known = [word for word, never in zip(read, unmet, strict=True) if not never]
    kind, guessed = (as_kind(asked.kind), None) if asked.kind else guess_kind(base, asked.concept, known)
    trained = settings.distill.in_force.steps > 0 or settings.method != OUR_METHOD
    plan = make_plan(base, asked, kind, known=known, reading=reading, given=given, trained=trained)
    spec = prepare_spec(
        asked.concept,
        plan.surrogate,
        project=project.at(catalog=str(plan.folder), judges=asked.clip).model_copy(update={"protected": ()}),
        settings=settings,
        aliases=asked.aliases,
        kind="person" if kind == "person" else domain_of(kind),
        data_free=True,
        by_name=True,
        clip_sha256=judge,
        detectors=detectors,
    )
    kinds = [one["kind"] for one in plan.content["concepts"]]
    judged = kinds.count("object") * kinds.count("style") * len(settings.evaluate.seeds)
    return Prepared(spec, plan, kind, guessed, sum(1 for _ in named(spec, plan.content)), judged)


def _tidy(asked: Asked) -> Asked:
    keep = tuple(dict.fromkeys(" ".join(one.split()) for one in asked.keep if one.strip()))
    aliases = tuple(dict.fromkeys(spelling(one) for one in asked.aliases if one.strip()))
    return replace(
        asked, concept=spelling(asked.concept), surrogate=spelling(asked.surrogate), aliases=aliases, keep=keep
    )


def _check_asked(asked: Asked, reading: Sequence[Reader]) -> None:
    """All that is wrong with what is asked, in one error, before anything is loaded or drawn."""
    names = (asked.concept, *asked.aliases)
    faults = []
    if not asked.concept:
        raise ConfigError("A concept needs a name: got an empty one. Give the words that prompts use for it.")
    if asked.kind is not None and asked.kind not in KINDS:
        faults.append(f"the kind is {asked.kind!r}: expected one of {', '.join(KINDS)}")
    for name in names:
        if cut := cut_short(reading, CAPTION_TEMPLATE.format(object=name, style="photo")):
            faults.append(
                f"the name {name!r} is cut: with a sentence around it, it takes {cut[0]} tokens, and the base reads "
                f"{cut[1]}. Give a shorter one"
            )
    if re.search(mention(*names), asked.surrogate):
        faults.append(
            f"the surrogate {asked.surrogate!r} contains the concept, so that it would bring up what is to go. Name "
            "something else"
        )
    if kept := [one for one in asked.keep if re.search(mention(*names), one)]:
        faults.append(f"{len(kept)} of what shall be kept name the concept itself: {listing(kept)}. Leave them out")
    if faults:
        raise ConfigError(f"This cannot be erased by name: {'; '.join(faults)}.")
