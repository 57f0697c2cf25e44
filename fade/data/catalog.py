"""Catalog: one parquet table of pictures, with their captions, concepts and hashes.

A catalog is a folder: ``catalog.parquet``, ``concepts.json`` (concepts, caption templates), the pictures
the table names, ``rejected.json`` (what was set aside) and ``sheet.png``. ``fade/data/intake.py`` writes it.
Rows are never removed: ``deleted_at`` says that a picture is gone, and such a row is not read for a split.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from fade.concepts import CAPTION_TEMPLATE, PARAPHRASES, Concept
from fade.errors import ConfigError, DataError, listing, nearest
from fade.files import read_json
from fade.names import name_key

COLUMNS = (
    "image_id",
    "path",
    "sha256",
    "width",
    "height",
    "mode",
    "caption",
    "object",
    "style",
    "split",
    "person",
    "source",
    "licence",
)


FURTHER = (
    "phash",
    "domain",
    "attributes",
    "subject",
    "uri",
    "source_sha256",
    "source_width",
    "source_height",
    "source_mode",
    "added_at",
    "deleted_at",
)
"""Columns of a catalog that splits do not carry."""

_TYPES = {
    "width": pa.int64(),
    "height": pa.int64(),
    "source_width": pa.int64(),
    "source_height": pa.int64(),
    "person": pa.bool_(),
    "attributes": pa.list_(pa.string()),
    "added_at": pa.timestamp("ms", tz="UTC"),
    "deleted_at": pa.timestamp("ms", tz="UTC"),
}
SCHEMA = pa.schema([(name, _TYPES.get(name, pa.string())) for name in (*COLUMNS, *FURTHER)])


def load_catalog(folder: Path, *, further: tuple[str, ...] = ()) -> pd.DataFrame:
    """Read the rows that are not deleted: ``COLUMNS``, and those of ``FURTHER`` that are asked for.

    Raises:
        DataError: the table is missing, or lacks a column.
    """
    path = table_path(folder)
    live = pc.field("deleted_at").is_null()
    return pd.read_parquet(path, columns=[*COLUMNS, *further], filters=live)


def table_path(folder: Path) -> Path:
    """The table of a catalog.

    Raises:
        DataError: it is missing, is no parquet file, or lacks a column.
    """
    path = folder / "catalog.parquet"
    if not path.is_file():
        raise DataError(f"No catalog in {folder}: expected {path}. Build it with `fade catalog build`.")
    try:
        names = pq.read_schema(path).names
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is no parquet table ({error}). Restore it, or build the catalog again.") from None
    if missing := [column for column in SCHEMA.names if column not in names]:
        raise DataError(f"{path} lacks the columns {', '.join(missing)}. Build the catalog again.")
    return path


def stream_table(folder: Path, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The table in batches, deleted rows included: memory does not grow with its length."""
    with pq.ParquetFile(table_path(folder)) as file:
        yield from file.iter_batches(batch_size=8192, columns=columns)


def count_rows(folder: Path) -> list[dict[str, Any]]:
    """Pictures of each object and style: ``train``, ``holdout`` and ``deleted``, in order of names."""
    counts: dict[tuple[str, str, str], dict[str, int]] = {}
    for batch in stream_table(folder, ["object", "domain", "style", "split", "deleted_at"]):
        for row in batch.to_pylist():
            key = (row["object"], row["domain"], row["style"])
            of = counts.setdefault(key, {"train": 0, "holdout": 0, "deleted": 0})
            of["deleted" if row["deleted_at"] is not None else row["split"]] += 1
    return [{"object": o, "domain": d, "style": s, **counts[o, d, s]} for o, d, s in sorted(counts)]


def scarce_concepts(folder: Path, *, least: int = 2) -> list[str]:
    """Concepts with fewer training pictures than an erasure of a whole concept asks for, in order of names."""
    counts: dict[str, int] = {}
    for row in count_rows(folder):
        for name in (row["object"], row["style"]):
            counts[name] = counts.get(name, 0) + row["train"]
    return sorted(name for name, count in counts.items() if count < least)


def load_templates(folder: Path) -> tuple[str, ...] | None:
    """The sentences that caption a catalog's pictures, the first canonical; None: each picture has its own."""
    content = read_concepts_file(folder)
    if content.get("captions") == "own":
        return None
    return tuple(content.get("templates") or (CAPTION_TEMPLATE, *PARAPHRASES))


def read_concepts_file(folder: Path) -> dict[str, Any]:
    """The content of concepts.json."""
    path = folder / "concepts.json"
    if not path.is_file():
        raise DataError(f"No concepts in {folder}: expected {path}. Build it with `fade catalog build`.")
    return read_json(path)


def load_concepts(folder: Path) -> dict[str, Concept]:
    """The concepts of a catalog by name.

    Raises:
        DataError: concepts.json is missing, or holds two spellings of one name: one of them would stay when the
            other is erased.
    """
    entries = read_concepts_file(folder)["concepts"]
    spelled: dict[str, list[str]] = {}
    for entry in entries:
        spelled.setdefault(name_key(entry["name"]), []).append(entry["name"])
    if twice := [" and ".join(map(repr, names)) for names in spelled.values() if len(names) > 1]:
        raise DataError(
            f"{folder / 'concepts.json'} holds concepts that differ in spelling alone: {listing(twice)}. "
            "Build the catalog again."
        )
    return {
        entry["name"]: Concept(
            entry["name"], entry["kind"], tuple(entry["aliases"]), entry["person"], entry.get("group")
        )
        for entry in entries
    }


def known_concept(concepts: dict[str, Concept], name: str) -> Concept | None:
    """A concept by name, else by alias, in any spelling (``fade.names.name_key``); None if there is none."""
    wanted = name_key(name)
    by_alias = None
    for concept in concepts.values():
        if wanted == name_key(concept.name):
            return concept
        if by_alias is None and wanted in {name_key(alias) for alias in concept.aliases}:
            by_alias = concept
    return by_alias


def find_concept(concepts: dict[str, Concept], name: str) -> Concept:
    """A concept by name, else by alias, in any spelling.

    Raises:
        ConfigError: there is none; suggests the nearest names.
    """
    found = known_concept(concepts, name)
    if found is None:
        raise ConfigError(f"Unknown concept {name!r}. {nearest(name, concepts)}")
    return found


def given_names(erased: Sequence[Concept], catalog: Mapping[str, Concept]) -> list[tuple[Concept, str]]:
    """Each erased concept with each name of it that the catalog does not know."""
    known = {one.name: {name_key(name) for name in (one.name, *one.aliases)} for one in catalog.values()}
    return [(one, name) for one in erased for name in one.aliases if name_key(name) not in known[one.name]]


def load_pictures(catalog: Path, table: pd.DataFrame) -> NDArray[np.uint8]:
    """The pictures of some rows, (N, H, W, 3) uint8.

    Raises:
        DataError: a picture is missing, does not decode, or differs in size from the first.
    """
    pictures = [_decode(catalog / path) for path in table["path"]]
    if not pictures:
        raise DataError("No pictures to load: the split is empty.")
    for path, picture in zip(table["path"], pictures, strict=True):
        if picture.shape != pictures[0].shape:
            raise DataError(f"{path} is {picture.shape[:2]}, the others are {pictures[0].shape[:2]}. Resize it.")
    return np.stack(pictures)


def _decode(path: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        raise DataError(f"Picture {path} is missing. Restore it, or build the catalog again.") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise DataError(f"Picture {path} does not decode ({error}). Replace it or remove its row.") from None
