"""Step ``split``: the forget, surrogate, retain and holdout sets of one erasure, as parquet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from fade.concepts import Concept
from fade.data.catalog import COLUMNS, find_concept, given_names, load_catalog, load_concepts, load_templates
from fade.data.duplicates import leaked
from fade.data.splits import NOTHING, find_pairs, make_splits
from fade.errors import DataError, listing
from fade.files import sha256_file, writing
from fade.spec import Pair, load_spec


def split(folder: Path) -> dict[str, int]:
    """Write ``splits/<name>.parquet``; give the number of rows of each.

    Raises:
        DataError: the catalog is missing, or has no pictures to forget or to keep.
        ConfigError: the concept or the surrogate is not in the catalog.
    """
    spec = load_spec(folder)
    catalog = spec.picture_catalog(folder)
    concepts = load_concepts(catalog)
    settings = spec.split
    table = load_catalog(catalog, further=("phash", "subject"))
    pairs = find_pairs(concepts, spec.pairs)
    splits = make_splits(
        table[list(COLUMNS)],
        pairs,
        forget_per_pair=settings.forget_per_pair,
        retain_per_pair=settings.retain_per_pair,
        holdout_per_pair=settings.holdout_per_pair,
        seed=settings.seed,
        templates=load_templates(catalog),
        selected={pair.concept: _selected(pair, table) for pair in spec.pairs},
        overwrite={
            pair.concept: {
                name: None if instead == NOTHING else find_concept(concepts, instead)
                for name, instead in pair.overwrite.items()
            }
            for pair in spec.pairs
        },
        spoken=_spoken(pairs, concepts),
        neighbours=frozenset(spec.neighbours),
        neighbour_factor=settings.neighbour_factor,
    )
    splits["retain"] = _without_leaks(splits, table, catalog, {pair.kind for pair in spec.pairs})
    with writing(folder / "splits") as temporary:
        temporary.mkdir(parents=True)
        for name, table in splits.items():
            table.to_parquet(temporary / f"{name}.parquet", index=False)
    return {name: len(table) for name, table in splits.items()}


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each split's file."""
    return {path.stem: sha256_file(path) for path in sorted((folder / "splits").glob("*.parquet"))}


def _spoken(pairs: Sequence[tuple[Concept, Concept | None]], concepts: Mapping[str, Concept]) -> dict[str, list[str]]:
    """By concept, the names that the spec brings: whoever gave them expects each of them to be learnt."""
    spoken: dict[str, list[str]] = {}
    for concept, name in given_names([one for one, _ in pairs], concepts):
        spoken.setdefault(concept.name, []).append(name)
    return spoken


def _selected(pair: Pair, table: pd.DataFrame) -> frozenset[str]:
    """Ids of the pictures that are named of a concept, by id or by subject.

    Raises:
        DataError: a subject has no picture in the catalog.
    """
    if missing := sorted(set(pair.subjects) - set(table["subject"].dropna())):
        raise DataError(f"The catalog holds no picture of the subject {listing(missing)}.")
    return frozenset(pair.image_ids) | frozenset(table[table["subject"].isin(pair.subjects)]["image_id"])


def _without_leaks(
    splits: dict[str, pd.DataFrame], table: pd.DataFrame, catalog: Path, kinds: set[str]
) -> pd.DataFrame:
    """The retain set without near-duplicates of forget pictures and without other pictures of their subjects.

    Raises:
        DataError: nothing is left.
    """
    known = table.set_index("image_id")[["phash", "subject"]]
    forget, retain = (splits[name].join(known, on="image_id") for name in ("forget", "retain"))
    near = leaked(forget, retain, pictures=catalog, kinds=kinds)["image_id"]
    subjects = set(forget["subject"].dropna())
    kept = splits["retain"][~(retain["image_id"].isin(near) | retain["subject"].isin(subjects))]
    if kept.empty:
        raise DataError("The retain set is empty: all its pictures are near-duplicates of those to forget.")
    return kept.reset_index(drop=True)
