"""Tables beside pictures: ``metadata.csv``, ``.jsonl`` or ``.parquet``, as spreadsheets and libraries save them.

A CSV's cells are parted by commas, semicolons, tabs or bars, whichever its header is; text is UTF-8, or what its
byte order mark says. Columns are known in any case, with blanks or underscores.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fade.data.loaders.files import is_added
from fade.errors import DataError, listing
from fade.names import name_key

NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_DELIMITERS = (",", ";", "\t", "|")
_ALSO = {"filename": "file_name", "license": "licence"}
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # begins as the mark of UTF-16 does, so it is looked for first
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


@dataclass(frozen=True, slots=True)
class Row:
    """A row: cells by column, and what is wrong with it as a whole."""

    cells: dict[str, Any]
    wrong: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """A table and the folder that its file names start from."""

    path: Path
    columns: frozenset[str]
    rows: tuple[Row, ...]

    @property
    def folder(self) -> Path:
        """Where the table lies."""
        return self.path.parent


def find_tables(root: Path) -> list[Path]:
    """The tables below a folder, those of a folder before those within it.

    Raises:
        DataError: a folder holds two.
    """
    found = []
    for place, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not is_added(name))
        here = sorted(name for name in files if name.lower() in NAMES)
        if len(here) > 1:
            raise DataError(f"{place} holds {listing(here)}: keep one of them.")
        found += [Path(place) / name for name in here]
    return found


def read_table(path: Path) -> Table:
    """A table, whole.

    Raises:
        DataError: it cannot be read, has no rows, or names a column twice.
    """
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            rows = [Row(_known(each, path)) for each in pq.read_table(path).to_pylist()]
        else:
            text = _decoded(path)
            rows = list(_of_csv(text, path) if kind == ".csv" else _of_lines(text, path))
    except (UnicodeDecodeError, csv.Error, pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read ({error}). Save it as UTF-8, one row a picture.") from None
    if not rows:
        raise DataError(f"{path} holds no rows: expected one a picture.")
    return Table(path, frozenset(column for row in rows for column in row.cells), tuple(rows))


def _decoded(path: Path) -> str:
    raw = path.read_bytes()
    encoding = next((name for mark, name in _MARKS.items() if raw.startswith(mark)), "utf-8")
    if encoding == "utf-8" and b"\0" in raw:
        raise DataError(f"{path} cannot be read (it holds zero bytes, and no mark of UTF-16). Save it as UTF-8.")
    return raw.decode(encoding)


def _of_csv(text: str, path: Path) -> Iterator[Row]:
    first, _, rest = text.partition("\n")
    if first.lower().startswith("sep="):  # a spreadsheet's own first line
        delimiter, text = first.rstrip("\r")[4:5] or ",", rest
    else:
        delimiter = next((one for one in _DELIMITERS if "file_name" in _columns(first, one)), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    header: list[str] = []
    for cells in _numbered(reader):
        if not any(cell.strip() for cell in cells):
            continue
        if not header:
            header = [_column(cell) for cell in cells]
            _check_twice([name for name in header if name], path)
            continue
        wrong = ""
        if any(cell.strip() for cell in cells[len(header) :]):
            wrong = (
                f"line {reader.line_num} of {path.name} has {len(cells)} cells, the header {len(header)}: put texts "
                f"that hold {delimiter!r} in quotes"
            )
        filled = [*cells, *[None] * (len(header) - len(cells))]
        yield Row({name: cell for name, cell in zip(header, filled, strict=False) if name}, wrong)


def _numbered(reader: Any) -> Iterator[list[str]]:
    """The rows; an error says its line."""
    try:
        yield from reader
    except csv.Error as error:
        raise csv.Error(f"line {reader.line_num}: {error}") from None


def _columns(line: str, delimiter: str) -> list[str]:
    return [_column(cell) for cell in next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])]


def _of_lines(text: str, path: Path) -> Iterator[Row]:
    for number, line in enumerate(io.StringIO(text), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{path} cannot be read (line {number}: {error}). Write one JSON object a line.") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}.")
        yield Row(_known(row, path))


def _known(row: dict[str, Any], path: Path) -> dict[str, Any]:
    _check_twice([_column(name) for name in row], path)
    return {_column(name): value for name, value in row.items()}


def _column(name: str) -> str:
    column = name_key(name).replace(" ", "_")
    return _ALSO.get(column, column)


def _check_twice(names: Iterable[str], path: Path) -> None:
    names = list(names)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{path} names a column twice: {listing(twice)}. Keep one of each.")
