"""Tables that a person gives with an erasure."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from fade.errors import ConfigError, listing


def read_table(path: Path) -> pd.DataFrame:
    """A table of texts: CSV, JSON or JSON lines, by the ending of its name.

    Raises:
        ConfigError: it cannot be read as one.
    """
    try:
        if path.suffix == ".csv":
            return pd.read_csv(path, dtype=str)
        return pd.read_json(path, dtype=False, lines=path.suffix == ".jsonl")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as a table (.csv, .json or .jsonl): {error}.") from None


def read_overwrite(path: Path) -> dict[str, str]:
    """What each picture gives way to: a table (CSV, JSON or JSON lines) with ``image_id`` and ``overwrite``.

    Raises:
        ConfigError: it is no such table, a field is empty, or a picture is there twice.
    """
    table = read_table(path)
    if missing := {"image_id", "overwrite"} - set(table.columns):
        raise ConfigError(f"{path} lacks the column {listing(sorted(missing))}: expected image_id and overwrite.")
    rows = table[["image_id", "overwrite"]]
    if bad := [number for number, empty in enumerate(rows.isna().any(axis=1), start=1) if empty]:
        raise ConfigError(f"{path}: row {bad[0]} is not complete: expected a picture's id and a concept's name.")
    if twice := sorted(set(rows["image_id"][rows["image_id"].duplicated()].astype(str))):
        raise ConfigError(f"{path} names a picture twice: {listing(twice)}. Give each one row.")
    return dict(zip(rows["image_id"].astype(str), rows["overwrite"].astype(str), strict=True))
