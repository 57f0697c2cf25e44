"""Deletion: removes pictures and their copies; their rows stay, with the time, so that they are not added again."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fade.data.catalog import SCHEMA, stream_table
from fade.data.duplicates import as_bits, look_the_same, near_pairs
from fade.data.intake import draw_sheet
from fade.errors import ConfigError
from fade.files import writing

_COLUMNS = ["image_id", "subject", "path", "sha256", "source_sha256", "phash", "deleted_at"]


@dataclass(frozen=True, slots=True)
class Picture:
    """A row that is to go. ``path`` is its file's; ``marked`` says that the row tells so already."""

    image_id: str
    path: Path
    sha256: str
    marked: bool


def find(
    folder: Path,
    *,
    image_ids: Collection[str] = (),
    subjects: Collection[str] = (),
    sha256: Collection[str] = (),
) -> list[Picture]:
    """The pictures that are named by id, subject or hash, and every copy of them, as far as they are not gone.

    A copy has the same bytes, was made from the same bytes, or is the same picture saved again: its perceptual hash
    is near and it looks the same. A row that is marked while its file is there belongs to a deletion that was cut off.
    """
    ids, persons, hashes = set(image_ids), set(subjects), set(sha256)
    named = [
        row
        for row in _rows(folder)
        if row["image_id"] in ids or row["subject"] in persons or row["sha256"] in hashes
    ]  # fmt: skip
    if not named:
        return []
    found = {row["image_id"]: row for row in named}
    for batch in stream_table(folder, _COLUMNS):
        found |= {row["image_id"]: row for row in _copies(folder, named, batch.to_pylist())}
    pictures = [
        Picture(row["image_id"], folder / row["path"], row["sha256"], row["deleted_at"] is not None)
        for row in found.values()
    ]
    return [one for one in pictures if not one.marked or one.path.is_file()]


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    for batch in stream_table(folder, _COLUMNS):
        yield from batch.to_pylist()


def _copies(folder: Path, named: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    same = {key: {row[key] for row in named} - {None} for key in ("sha256", "source_sha256")}
    found = [row for row in rows if any(row[key] in same[key] for key in same)]
    known = {row["image_id"] for row in (*named, *found)}
    there = [row for row in named if (folder / row["path"]).is_file()]
    others = [row for row in rows if row["image_id"] not in known and (folder / row["path"]).is_file()]
    if not there or not others:
        return found
    pairs = near_pairs(*(as_bits([row["phash"] for row in part]) for part in (there, others)))
    again = {
        other
        for one, other in pairs.tolist()
        if look_the_same(folder / there[one]["path"], folder / others[other]["path"])
    }
    return [*found, *(others[number] for number in sorted(again))]


def mark(folder: Path, image_ids: Collection[str], *, at: datetime) -> None:
    """Write into the rows of these pictures that they are deleted; what says so already keeps its time."""
    wanted = set(image_ids)
    with writing(folder / "catalog.parquet") as temporary, pq.ParquetWriter(temporary, SCHEMA) as writer:
        for batch in stream_table(folder):
            rows = batch.to_pylist()
            for row in rows:
                if row["image_id"] in wanted and row["deleted_at"] is None:
                    row["deleted_at"] = at
            writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))


def delete(folder: Path, *, image_ids: Collection[str], subjects: Collection[str], at: datetime) -> int:
    """Delete pictures by id or subject, and their copies; gives how many.

    Rows get ``deleted_at``, files are removed, the contact sheet is drawn without them.

    Raises:
        ConfigError: nothing is named, or nothing that is named is in the catalog.
    """
    if not image_ids and not subjects:
        raise ConfigError("Nothing to delete: name pictures by id or by subject.")
    found = find(folder, image_ids=image_ids, subjects=subjects)
    if not found:
        raise ConfigError(f"{folder} holds none of the pictures or subjects named. See `fade catalog show`.")
    # The table first: a row never names a file that is gone without saying it. Cut off here, `find` has them again.
    mark(folder, [one.image_id for one in found if not one.marked], at=at)
    for one in found:
        one.path.unlink(missing_ok=True)
    draw_sheet(folder)
    return len(found)
