"""Pictures that an erasure forgets besides its forget set: of people who asked once the concept was erased already.

The erasure is not made again, as what it erases is erased for all. Its ``further.json`` has the pictures' hashes, and
a purge of the erasure takes them as it takes the forget set's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from fade.data.catalog import stream_table
from fade.errors import ConfigError, DataError, listing
from fade.files import read_json, write_json
from fade.spec import load_spec

FURTHER = "further.json"
_COLUMNS = ["image_id", "subject", "sha256", "object", "style", "deleted_at"]


def forget_too(folder: Path, *, image_ids: Sequence[str], subjects: Sequence[str]) -> int:
    """Add pictures of an erased concept to what its erasure forgets; gives how many are named and still there.

    Those that were deleted before are forgotten already, and are left out. Asked again, nothing changes.

    Raises:
        ConfigError: the erasure is not on this machine.
        DataError: a picture or subject is in no row of its catalog, or does not show a concept that it erases.
    """
    if not (folder / "spec.yaml").is_file():
        raise ConfigError(f"The erasure's folder {folder} is not on this machine. Run the request where it was made.")
    erased = load_spec(folder)
    rows = _named(Path(erased.catalog), image_ids, subjects)
    shown = {(pair.kind, pair.concept) for pair in erased.pairs}
    others = [row for row in rows if shown.isdisjoint((kind, row[kind]) for kind in ("object", "style"))]
    if others:
        raise DataError(f"{len(others)} pictures to forget do not show what is erased. Name their concept.")
    there = {row["sha256"] for row in rows if row["deleted_at"] is None}
    with FileLock(folder / ".further.lock", timeout=60):
        known = further_hashes(folder)
        if not there <= known:
            write_json(folder / FURTHER, {"sha256": sorted(known | there)})
    return len(there)


def further_hashes(folder: Path) -> set[str]:
    """SHA-256 of the pictures that an erasure forgets besides its forget set."""
    return set(read_json(folder / FURTHER)["sha256"]) if (folder / FURTHER).is_file() else set()


def _named(catalog: Path, image_ids: Sequence[str], subjects: Sequence[str]) -> list[dict[str, Any]]:
    wanted, people = set(image_ids), set(subjects)
    rows = [
        row
        for batch in stream_table(catalog, _COLUMNS)
        for row in batch.to_pylist()
        if row["image_id"] in wanted or row["subject"] in people
    ]
    if missing := wanted - {row["image_id"] for row in rows}:
        raise DataError(f"{catalog} holds no picture {listing(sorted(missing))}. Name pictures of this catalog.")
    if people - {row["subject"] for row in rows}:
        raise DataError(f"{catalog} holds no picture of the subject that the request names.")
    return rows
