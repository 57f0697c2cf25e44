"""Catalog: one parquet table of pictures, with their captions, concepts and hashes.

A catalog is a folder: ``catalog.parquet``, ``concepts.json`` and the pictures the table names.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from fade.concepts import Concept
from fade.errors import ConfigError, DataError, nearest
from fade.files import read_json

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


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """A picture as PNG bytes."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG", compress_level=6)
    return stream.getvalue()


def load_catalog(folder: Path) -> pd.DataFrame:
    """Read the table.

    Raises:
        DataError: the table is missing, or lacks a column.
    """
    path = folder / "catalog.parquet"
    if not path.is_file():
        raise DataError(f"No catalog in {folder}: expected {path}. Build it with `dvc repro catalog`.")
    table = pd.read_parquet(path)
    if missing := [column for column in COLUMNS if column not in table.columns]:
        raise DataError(f"{path} lacks the columns {', '.join(missing)}. Build the catalog again.")
    return table


def load_concepts(folder: Path) -> dict[str, Concept]:
    """The concepts of a catalog by name."""
    path = folder / "concepts.json"
    if not path.is_file():
        raise DataError(f"No concepts in {folder}: expected {path}. Build the catalog with `dvc repro catalog`.")
    entries = read_json(path)["concepts"]
    return {
        entry["name"]: Concept(entry["name"], entry["kind"], tuple(entry["aliases"]), entry["person"])
        for entry in entries
    }


def find_concept(concepts: dict[str, Concept], name: str) -> Concept:
    """A concept by name or alias, without regard to case, ``_`` or ``-``.

    Raises:
        ConfigError: there is none; suggests the nearest names.
    """
    wanted = " ".join(name.lower().replace("_", " ").replace("-", " ").split())
    for concept in concepts.values():
        if wanted in {concept.name.lower(), *(alias.lower() for alias in concept.aliases)}:
            return concept
    raise ConfigError(f"Unknown concept {name!r}. {nearest(wanted, concepts)}")


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
