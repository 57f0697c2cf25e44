"""Step ``spec``: turn names into a checked spec (what an erasure is asked to be), before anything expensive.

As a stage it writes the example erasure's spec from the section ``example`` of params.yaml.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from fade.asking.by_kind import settings_of_kind
from fade.asking.checks import check_attacks, check_captions, check_disk, check_size, checked_base
from fade.asking.surrogate import surrogate_by_pictures
from fade.concepts import Concept
from fade.config import OUR_METHOD, Settings, load_settings
from fade.data.catalog import find_concept, known_concept, load_catalog, load_concepts
from fade.data.splits import NOTHING
from fade.errors import ConfigError, DataError
from fade.evaluation.judges import check_known
from fade.evaluation.neighbours import choose_surrogate, find_neighbours
from fade.methods.registry import find_method
from fade.models.family import load_base
from fade.models.prompts import Reader
from fade.models.registry import family
from fade.models.source import BaseSource
from fade.names import name_key
from fade.project import Project, load_project
from fade.spec import Detector, Pair, Spec, make_spec, save_spec

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Wanted:
    """A concept to erase, as somebody asks for it.

    Attributes:
        surrogate: what its prompts shall give instead: a concept of the catalog, ``nothing`` or ``auto``.
        aliases: further names that bring it up, beside those that the catalog knows.
        kind: ``object``, ``style`` or ``person``, as whoever asks says it; None where nobody says.
        image_ids, subjects: pictures, and whose, its forget set is to be made of alone.
        overwrite: picture ids to what each gives way to instead of the surrogate.
    """

    concept: str
    surrogate: str = AUTO
    aliases: tuple[str, ...] = ()
    kind: str | None = None
    image_ids: tuple[str, ...] = ()
    subjects: tuple[str, ...] = ()
    overwrite: Mapping[str, str] = field(default_factory=dict)


def asked_again(pair: Pair) -> Wanted:
    """All that an erasure was asked of one of its concepts, to be asked anew."""
    return Wanted(
        pair.concept,
        pair.surrogate,
        aliases=pair.aliases,
        kind="person" if pair.person else pair.kind,
        image_ids=pair.image_ids,
        subjects=pair.subjects,
        overwrite=pair.overwrite,
    )


def prepare_spec(
    concept: str,
    surrogate: str,
    *,
    project: Project,
    settings: Settings,
    expected_base_sha256: str | None = None,
    protected: Sequence[str] = (),
    also: Sequence[tuple[str, str] | Wanted] = (),
    aliases: Sequence[str] = (),
    kind: str | None = None,
    image_ids: Sequence[str] = (),
    subjects: Sequence[str] = (),
    overwrite: Mapping[str, str] | None = None,
    data_free: bool = False,
    by_name: bool = False,
    clip_sha256: str | None = None,
    detectors: Sequence[Detector] = (),
) -> Spec:
    """The spec of an erasure: names resolved, and everything checked that can be checked without training.

    Args:
        surrogate: a concept of the catalog, ``nothing`` for what the empty prompt gives, or ``auto`` for
            the nearest in text space that is neither a person nor ``protected`` nor erased; of an erasure that finds
            its own settings the best by its pictures (fade/asking/surrogate.py). The spec records which.
        also: further concepts that the same adapter erases, each with its surrogate.
        aliases, kind, image_ids, subjects, overwrite: of ``concept``, as ``Wanted`` has them.
        protected, data_free, by_name, clip_sha256, detectors: as ``prepare_wanted`` has them.

    Raises:
        As ``prepare_wanted``.
    """
    first = Wanted(concept, surrogate, tuple(aliases), kind, tuple(image_ids), tuple(subjects), overwrite or {})
    return prepare_wanted(
        [first, *(one if isinstance(one, Wanted) else Wanted(*one) for one in also)],
        project=project,
        settings=settings,
        expected_base_sha256=expected_base_sha256,
        protected=protected,
        data_free=data_free,
        by_name=by_name,
        clip_sha256=clip_sha256,
        detectors=detectors,
    )


def prepare_wanted(
    asked: Sequence[Wanted],
    *,
    project: Project,
    settings: Settings,
    expected_base_sha256: str | None = None,
    protected: Sequence[str] = (),
    data_free: bool = False,
    by_name: bool = False,
    clip_sha256: str | None = None,
    detectors: Sequence[Detector] = (),
) -> Spec:
    """The same of all that is wanted of one adapter.

    Args:
        project: whose base, catalog and judges it is, and whose ``protected`` concepts count beside those given here.
        settings: where they leave one of ``BY_KIND`` open, it is that of the base's kind.
        data_free: the base draws the pictures, as the catalog has none left; it still says which concepts there are.
        by_name: the catalog is what was planned for a name alone (fade/asking/by_name.py), the judges the place of a
            CLIP of the identity ``clip_sha256``, or ``none``; ``detectors``: further judges.

    Raises:
        ConfigError: unknown concept or surrogate, equal, or of different kinds; or a judge has no name for a concept.
        DataError: no catalog, it holds no picture of the concept, its pictures do not fit the base, or no judges.
        BaseModelError: the base is missing, not supported, or not the expected one.
        ResourceError: too little free disk.
    """
    catalog = _Catalog.read(project.catalog, data_free=data_free)
    source, reading, sha256 = checked_base(project.base, expected_base_sha256)
    settings, by_kind = settings_of_kind(settings, family(source.pipeline))
    erased = [_asked_for(catalog.concepts, one, catalog.place) for one in asked]
    catalog.check_pictures(source, reading, erased)
    spared = {find_concept(catalog.concepts, name).name for name in (*project.protected, *protected)}
    pairs, why = _pairs(erased, asked, catalog, spared, project=project, sha256=sha256, settings=settings)
    near = _neighbours(erased, pairs, catalog, project=project, sha256=sha256, settings=settings)
    _check_rest(settings, erased, catalog, judges=None if by_name else project.judges)
    method = find_method(settings.method)
    # The spec says all of its method's settings, whatever their defaults are later, and no other's.
    own = {} if settings.method == OUR_METHOD else {method.name: method.configured(settings).model_dump(mode="json")}
    spec = make_spec(
        **pairs[0],
        also=pairs[1:],
        neighbours=near,
        data_free=data_free,
        by_name=by_name,
        clip_sha256=clip_sha256,
        detectors=tuple(detectors),
        base=project.base,
        base_sha256=sha256,
        catalog=project.catalog,
        judges=project.judges,
        surrogate_why=why,
        by_kind=by_kind,
        **{**settings.model_dump(), "methods": own},
    )
    method.check_able(spec)
    return spec


@dataclass(frozen=True, slots=True)
class _Catalog:
    """A catalog as a spec is prepared from it; ``table`` is None where no pictures are needed."""

    place: str
    concepts: dict[str, Concept]
    table: pd.DataFrame | None

    @classmethod
    def read(cls, place: str, *, data_free: bool) -> _Catalog:
        concepts, table = load_concepts(Path(place)), load_catalog(Path(place))
        return cls(place, concepts, None if data_free else table)

    def check_pictures(self, source: BaseSource, reading: Sequence[Reader], erased: Sequence[Concept]) -> None:
        """Whether the base takes the pictures' size, and reads the concepts' names in their captions."""
        if self.table is not None:
            check_size(source, self.table, self.place)
            check_captions(reading, self.table, erased, self.place)


def _pairs(
    erased: Sequence[Concept],
    asked: Sequence[Wanted],
    catalog: _Catalog,
    protected: set[str],
    *,
    project: Project,
    sha256: str,
    settings: Settings,
) -> tuple[list[dict[str, Any]], str]:
    """Fields of each pair, what stands for it found where nobody said; and why by its pictures, where so found."""
    spared = protected | {one.name for one in erased}
    pairs, why = [], ""
    instead: Concept | None
    for one, wanted in zip(erased, asked, strict=True):
        if name_key(wanted.surrogate) != AUTO:
            instead = _named(catalog.concepts, wanted.surrogate)
        else:
            sd = load_base(project.base, expected_sha256=sha256)
            if settings.why_fixed or len(asked) > 1:
                instead = choose_surrogate(sd, one, catalog.concepts.values(), protected=spared)
            else:
                check_known(Path(project.judges), catalog.concepts.values(), catalog=catalog.place, erased=erased)
                draft = _draft(one, project, sha256, settings)
                instead, why = surrogate_by_pictures(sd, draft, one, catalog.concepts.values(), protected=spared)
        own = {
            picture: _pair(one, _named(catalog.concepts, name), None, catalog.place)["surrogate"]
            for picture, name in sorted(wanted.overwrite.items())
        }
        given = {"image_ids": wanted.image_ids, "subjects": wanted.subjects, "overwrite": own}
        pairs.append(_pair(one, instead, catalog.table, catalog.place) | given)
    return pairs, why


def _neighbours(
    erased: Sequence[Concept],
    pairs: Sequence[Mapping[str, Any]],
    catalog: _Catalog,
    *,
    project: Project,
    sha256: str,
    settings: Settings,
) -> tuple[str, ...]:
    """What lies nearest to all that is erased, without that and what stands for it; none unless more of it is kept."""
    if settings.split.neighbour_factor <= 1:
        return ()
    sd, near = load_base(project.base, expected_sha256=sha256), dict[str, None]()
    gone = {name for one in pairs for name in (one["concept"], one["surrogate"], *one["overwrite"].values())}
    for one, fields in zip(erased, pairs, strict=True):
        instead = catalog.concepts.get(fields["surrogate"])
        near |= dict.fromkeys(find_neighbours(sd, one, instead, catalog.concepts.values()))
    return tuple(name for name in near if name not in gone)


def _check_rest(settings: Settings, erased: Sequence[Concept], catalog: _Catalog, *, judges: str | None) -> None:
    """What is named beside base and catalog: models of figures, judges, attacks; and room on the disk."""
    for name in ("features", "clip"):
        given = getattr(settings.evaluate, name)
        if given is not None and not Path(given).exists():
            raise ConfigError(f"evaluate.{name} is {given}, which does not exist. Give its path, or null for none.")
    if judges is not None:
        check_known(Path(judges), catalog.concepts.values(), catalog=catalog.place, erased=erased)
    check_attacks(settings, erased)
    check_disk(Path())


def _draft(one: Concept, project: Project, sha256: str, settings: Settings) -> Spec:
    """How pictures are drawn and judged, before it is known what stands for a concept."""
    places = {"base": project.base, "base_sha256": sha256, "catalog": project.catalog, "judges": project.judges}
    return make_spec(concept=one.name, kind=one.kind, surrogate=NOTHING, **places, **settings.model_dump())


def _asked_for(concepts: dict[str, Concept], wanted: Wanted, catalog: str) -> Concept:
    """The concept of the catalog that is meant, with every name that brings it up.

    Raises:
        ConfigError: the catalog has none of its names, two of them are two concepts, or it is of another kind.
    """
    found = known_concept(concepts, wanted.concept)
    by_alias = {one.name: one for alias in wanted.aliases if (one := known_concept(concepts, alias))}
    if found is None and len(by_alias) == 1:
        (found,) = by_alias.values()
    if found is None:
        found = find_concept(concepts, wanted.concept)
    if by_alias.keys() - {found.name}:
        raise ConfigError(
            f"An alias of {wanted.concept!r} is another concept of {catalog}: it would be erased as this one. Leave "
            "that alias out, or ask for both."
        )
    kind = {"person": "object"}.get(wanted.kind or found.kind, wanted.kind or found.kind)
    if kind != found.kind:
        raise ConfigError(
            f"{wanted.concept!r} is asked for as {wanted.kind!r}, and in {catalog} it is of the kind {found.kind!r}. "
            "Name another concept, or ask for that kind."
        )
    names = {name_key(name): name for name in (*wanted.aliases, wanted.concept)}
    for name in (found.name, *found.aliases):
        names.pop(name_key(name), None)
    return replace(found, aliases=(*found.aliases, *names.values()), person=found.person or wanted.kind == "person")


def _named(concepts: dict[str, Concept], name: str) -> Concept | None:
    return None if name_key(name) == NOTHING else find_concept(concepts, name)


def _pair(erased: Concept, instead: Concept | None, table: pd.DataFrame | None, catalog: str) -> dict[str, Any]:
    """Fields of a pair that can be erased; ``table`` is None where no pictures are needed."""
    if instead is not None and erased.name == instead.name:
        raise ConfigError(
            f"The surrogate must differ from the concept: got {instead.name!r} for both. "
            "Name what its prompts shall give instead."
        )
    if instead is not None and erased.kind != instead.kind:
        raise ConfigError(
            f"Concept and surrogate must be of one kind: {erased.name!r} is an {erased.kind}, "
            f"{instead.name!r} is a {instead.kind}."
        )
    if table is not None and not (table[erased.kind] == erased.name).any():
        raise DataError(
            f"The forget set is empty: {catalog} holds 0 pictures of {erased.name!r}. Add pictures to the catalog, or "
            "let the base draw them: --data-free."
        )
    return {
        "concept": erased.name,
        "kind": erased.kind,
        "surrogate": NOTHING if instead is None else instead.name,
        "person": erased.person,
        "aliases": erased.aliases,
    }


def main() -> None:
    """Write the example's spec."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    arguments = parser.parse_args()
    project = load_project(arguments.params)
    spec = prepare_spec(**project.section("example"), project=project, settings=load_settings(project.params))
    save_spec(spec, arguments.folder)


if __name__ == "__main__":
    main()
