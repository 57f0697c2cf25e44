"""Deletion: pictures leave a catalog; their rows stay and say when, so that they never come back."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fade.data.catalog import SCHEMA, stream_table
from fade.errors import ConfigError
from fade.files import writing


def find(folder: Path, *, image_ids: Sequence[str], subjects: Sequence[str]) -> list[Path]:
    """Files of the pictures that are named by id or subject and are not deleted yet."""
    found = []
    for batch in stream_table(folder, ["image_id", "subject", "path", "deleted_at"]):
        for row in batch.to_pylist():
            named = row["image_id"] in image_ids or row["subject"] in subjects
            if named and row["deleted_at"] is None:
                found.append(folder / row["path"])
    return found


def delete(folder: Path, *, image_ids: Sequence[str], subjects: Sequence[str], at: datetime) -> int:
    """Delete pictures by id or subject: files are removed, rows get ``deleted_at``; gives how many.

    Raises:
        ConfigError: nothing is named, or nothing that is named is in the catalog.
    """
    found: list[str] = []
    if not image_ids and not subjects:
        raise ConfigError("Nothing to delete: name pictures by id or by subject.")
    with writing(folder / "catalog.parquet") as temporary:
        with pq.ParquetWriter(temporary, SCHEMA) as writer:
            for batch in stream_table(folder):
                rows = batch.to_pylist()
                for row in rows:
                    named = row["image_id"] in image_ids or row["subject"] in subjects
                    if named and row["deleted_at"] is None:
                        row["deleted_at"] = at
                        found.append(row["path"])
                writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
        if not found:
            raise ConfigError(f"{folder} holds none of the pictures or subjects named. See `fade catalog show`.")
    for path in found:  # after the table says so: a row never names a file that is gone without saying it
        (folder / path).unlink(missing_ok=True)
    return len(found)
