"""One adapter for many concepts: its spec, from a file or from an erasure that is there; and what it will hurt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fade.asking.assigned import assigned
from fade.asking.concepts import MANY
from fade.asking.interference import interference
from fade.asking.prepare import AUTO, Wanted, prepare_spec
from fade.concepts import CAPTION_TEMPLATE
from fade.config import OUR_METHOD, Settings, load_settings
from fade.data.catalog import known_concept, load_concepts, load_templates
from fade.data.splits import find_pairs
from fade.methods.registry import asking_for, find_method
from fade.models.family import load_base
from fade.models.sharing import bases_shared
from fade.names import name_key
from fade.project import Project
from fade.spec import Spec
from fade.studies.many import near_erased
from flows.erasing.erase import for_several


def settings_for_many(project: Project, count: int, changes: Mapping[str, Any], method: str | None) -> Settings:
    """The project's settings for so many concepts: solved, then trained on as a whole, unless another method is named.

    The project may name one too (``erasure.method``), of those that erase several at once. Of our own distillation the
    batch grows with the concepts and the steps with the root of their number, unless a setting of it is given.
    """
    asked = dict(changes) if method is not None else asking_for([_method_for_many(project)], dict(changes))[0]
    settings = load_settings(project.params, changes=asked)
    if settings.method != OUR_METHOD or any(name.startswith("distill.") for name in asked):
        return settings
    return settings.model_copy(update={"distill": for_several(settings.distill, count)})


def _method_for_many(project: Project) -> str:
    """What the project names instead of our own for one, if it erases several at once."""
    named = load_settings(project.params).method
    return named if named != OUR_METHOD and find_method(named).several else MANY


def spec_for_many(
    wanted: Sequence[Wanted],
    *,
    project: Project,
    settings: Settings,
    expected_base_sha256: str | None = None,
    protected: Sequence[str] = (),
    data_free: bool = False,
) -> Spec:
    """One spec of all of them; see ``prepare_spec``, whose refusals come before anything is made.

    Surrogates that are to be found are those with the shortest way (``fade.asking.assigned``).
    """
    with bases_shared():  # neighbours and surrogates are asked of the base, one by one
        wanted = _with_surrogates(wanted, project, protected)
        return prepare_spec(
            **{part.name: getattr(wanted[0], part.name) for part in fields(wanted[0])},
            project=project,
            settings=settings,
            expected_base_sha256=expected_base_sha256,
            protected=protected,
            also=wanted[1:],
            data_free=data_free,
        )


def _with_surrogates(wanted: Sequence[Wanted], project: Project, protected: Sequence[str]) -> list[Wanted]:
    """``auto`` replaced; names that the catalog does not know are left for ``prepare_spec`` to refuse."""
    concepts = load_concepts(Path(project.catalog))
    erased = {one.concept: known_concept(concepts, one.concept) for one in wanted}
    gone = {one.name for one in erased.values() if one is not None}
    spared = {found.name for name in (*project.protected, *protected) if (found := known_concept(concepts, name))}
    asked = [one for one in wanted if name_key(one.surrogate) == AUTO and erased[one.concept] is not None]
    if not asked:
        return list(wanted)
    kept = [one for one in concepts.values() if one.name not in gone]
    free = [one for one in kept if not one.person and one.name not in spared]
    template = (load_templates(Path(project.catalog)) or (CAPTION_TEMPLATE,))[0]
    mine = [known for one in asked if (known := erased[one.concept]) is not None]
    instead = assigned(load_base(project.base), mine, free, kept, template=template)
    named = {one.concept: instead[known.name].name for one, known in zip(asked, mine, strict=True)}
    return [replace(one, surrogate=named.get(one.concept, one.surrogate)) for one in wanted]


@dataclass(frozen=True, slots=True)
class Risk:
    """A kept concept, and how far the erasure would move the states of its captions; ``near``: a neighbour."""

    concept: str
    moved: float
    near: bool


def foretold(spec: Spec) -> list[Risk]:
    """Kept concepts of the kinds that are erased, the most endangered first (``fade.asking.interference``)."""
    concepts = load_concepts(Path(spec.catalog))
    pairs = find_pairs(concepts, spec.pairs)
    base = load_base(spec.base, expected_sha256=spec.base_sha256, weights=spec.weights)
    gone, kinds = {one.name for one, _ in pairs}, {one.kind for one, _ in pairs}
    left = [one for one in concepts.values() if one.name not in gone]
    kept = [one for one in left if one.kind in kinds]
    templates = load_templates(Path(spec.catalog)) or (CAPTION_TEMPLATE,)
    found = interference(base, pairs, kept, left, templates=templates)
    near = near_erased(base, pairs, concepts.values())
    return [Risk(name, value, name in near) for name, value in found.items()]
