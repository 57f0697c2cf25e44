"""An erasure by name alone, from the command line: what is asked, and what a person reads of it before it begins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fade.asking.budgets import budget_changes
from fade.asking.by_name import Prepared, prepare_by_name
from fade.asking.planned import Asked
from fade.config import load_settings
from fade.errors import BaseModelError, ConfigError, listing
from fade.evaluation.records import load
from fade.evaluation.zero_shot import NOBODY
from fade.project import Project
from fade.spec import CALIBRATED, load_spec
from fade.steps.calibrate import FIGURES, Calibration

USUAL = "normal"
"""The budget where none is asked for."""


def prepare(
    concept: str,
    *,
    project: Project,
    changes: Mapping[str, Any],
    surrogate: str = "auto",
    kind: str | None = None,
    aliases: Sequence[str] = (),
    keep: Sequence[str] = (),
    protected: Sequence[str] = (),
    keep_file: Path | None = None,
    clip: str | None = None,
    judge: Sequence[str] = (),
    pictures: Path | None = None,
    budget: str | None = None,
    expected_base_sha256: str | None = None,
) -> Prepared:
    """The spec and what is said of it.

    Args:
        changes: settings by dotted name, before which those of the budget give way.
        clip: None takes the project's.
        judge: further judges.

    Raises:
        ConfigError, DataError, BaseModelError: as ``prepare_by_name``.
    """
    asked = Asked(
        concept,
        kind=kind,
        surrogate=surrogate,
        aliases=tuple(aliases),
        keep=(*keep, *(read_prompts(keep_file) if keep_file is not None else ())),
        protected=(*project.protected, *protected),
        clip=clip or project.clip or NOBODY,
        judges=tuple(judge),
        pictures=pictures,
        budget=budget or USUAL,
    )
    of_budget = budget_changes(asked.budget, pictures=pictures is not None)
    if load_settings(project.params).gate.sure is None:  # nothing is drawn further there, so there is no most
        of_budget = {name: value for name, value in of_budget.items() if not name.startswith("gate.sure.")}
    settings = load_settings(project.params, changes={**of_budget, **changes})
    prepared = prepare_by_name(asked, project=project, settings=settings)
    if expected_base_sha256 not in (None, prepared.spec.base_sha256):
        raise BaseModelError(
            f"The base model in {project.base} is another one: its hash is {prepared.spec.base_sha256[:12]}, expected "
            f"{str(expected_base_sha256)[:12]}. Restore that base, or ask for this one."
        )
    return prepared


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        ConfigError: it is no text file, or has none.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a text file of prompts, one a line: {error}.") from None
    if not any(lines):
        raise ConfigError(
            f"{path} holds no prompt: expected one a line. Leave --keep-file out if nothing is to be added."
        )
    return [line for line in lines if line]


def described(prepared: Prepared) -> Iterator[str]:
    """What is about to be done, so that a person sees what is at risk."""
    plan, spec = prepared.plan, prepared.spec
    why = f" (guessed: {prepared.guessed}; --kind says otherwise)" if prepared.guessed else ""
    yield f"{spec.concept}: {'an' if prepared.kind == 'object' else 'a'} {prepared.kind}{why}"
    if spec.aliases:
        yield f"Erased by these names too: {listing(spec.aliases, 10)}"
    yield f"Most at risk, nearest in the base's text space: {listing(plan.neighbours, 10) or 'nothing that ships'}"
    yield f"Kept beside them: {listing(plan.others, 15)}; with: {listing(plan.across, 15)}"
    yield (
        f"The base draws {prepared.drawn} pictures to learn from ({len(plan.content['kept'])} of prompts to keep) and "
        f"{prepared.judged} to be judged, before and after"
    )
    if spec.judges == NOBODY:
        yield "Nobody judges: no CLIP is named (--clip), so a person has to look at the pictures and decide"


def judged_by(folder: Path) -> str | None:
    """What the CLIP can tell of an erasure by name, in a sentence; None of any other erasure."""
    if not load_spec(folder).by_name:
        return None
    found = load(Calibration, folder / CALIBRATED / FIGURES)
    if found.concept is None:
        return "Nobody judged: no CLIP was named."
    said = f"The CLIP calls {found.concept.value:.1%} of the base's own pictures of the concept by its name"
    if found.in_neighbours is not None:
        said += f", and {found.in_neighbours.value:.1%} of its neighbours' too"
    left = f"; left out, as it cannot tell them: {listing(found.left_out, 8)}" if found.left_out else ""
    return f"{said}{left}."
