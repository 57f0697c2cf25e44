"""Any image folder, as Hugging Face's ImageFolder reads them.

Either ``metadata.csv``, ``.jsonl`` or ``.parquet`` beside the pictures or above them, one for the whole set or one in
each split (columns ``file_name``, which starts from the table's folder, ``object`` or ``label``; optional ``style``,
``text`` or ``caption``, ``split``, ``subject``, ``image_id``, ``licence``), or a folder a class, or both: without a
column of labels the class folders say them. ``train`` and ``test`` or ``val`` above the class folders are splits.
A picture belongs to the nearest table above it; one that it does not name is set aside.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from fade.concepts import PLAIN_STYLE
from fade.data.loaders.files import (
    SPLITS,
    folder_of,
    loose_pictures,
    opaque,
    picture_id,
    pictures_below,
    splits_of,
    subfolders,
    words,
)
from fade.data.loaders.tables import Row, Table, find_tables, read_table
from fade.data.sets import PHOTO_TEMPLATES, STYLE_TEMPLATES, Item, PictureSet, Rejected
from fade.errors import DataError, listing
from fade.names import name_key, spelling

LABELS, CAPTIONS = ("object", "label"), ("text", "caption")


def folder(root: Path, *, domain: str = "object") -> PictureSet:
    """Pictures of a folder.

    Args:
        domain: what its subjects are: object, person, scene ... Of persons, ids do not carry file names.

    Raises:
        DataError: the folder or a column is missing, or a table cannot be read.
    """
    folder_of(root, "of pictures")
    person = domain == "person"
    tables = [read_table(path) for path in find_tables(root)]
    if not tables:
        return PictureSet(_by_class(root, person), root.name, domain=domain, person=person)
    layout = _Layout(root, person)
    for table in tables:
        _check_columns(table, layout)
    columns = {name for table in tables for name in table.columns}
    items = _told(layout, tables)
    return PictureSet(
        (_nameless(item) if person else item for item in items),
        root.name,
        domain=domain,
        person=person,
        own_captions=bool(columns & set(CAPTIONS)),
        templates=STYLE_TEMPLATES if "style" in columns else PHOTO_TEMPLATES,
    )


@dataclass(slots=True)
class _Layout:
    """What folders say of the pictures in them, and which files there are."""

    root: Path
    person: bool
    parted: bool = field(init=False)
    splits: dict[str, str] = field(init=False)
    _folded: dict[str, list[str]] | None = None

    def __post_init__(self) -> None:
        above = [path.name for path in subfolders(self.root, "", least=0)]
        self.parted = bool(above) and all(name.lower() in SPLITS for name in above)
        self.splits = splits_of(above) if self.parted else {}

    def place(self, shown: str) -> tuple[str | None, str]:
        """The split and the class that the folders of a file say; None and empty if they do not."""
        parts = PurePosixPath(shown).parts[:-1]
        split = self.splits.get(parts[0]) if parts else None
        inner = parts[1:] if self.parted else parts
        return split, inner[0] if inner else ""

    def found(self, shown: str) -> str:
        """The file that a table means: its own spelling may differ in case and in Unicode's form."""
        if (self.root / shown).exists():
            return shown
        if self._folded is None:
            self._folded = {}
            for path in pictures_below(self.root, self.root):
                if isinstance(path, Path):
                    name = path.relative_to(self.root).as_posix()
                    self._folded.setdefault(_folded(name), []).append(name)
        alike = self._folded.get(_folded(shown), [])
        return alike[0] if len(alike) == 1 else shown


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _check_columns(table: Table, layout: _Layout) -> None:
    missing = [] if "file_name" in table.columns else ["file_name"]
    if not table.columns & set(LABELS):
        named = [_shown(layout, table, row) for row in table.rows]
        # One folder for all is where the pictures lie, and says nothing of them.
        if len({layout.place(shown)[1] for shown in named if shown} - {""}) < 2:
            missing.append("object")
    if missing:
        raise DataError(
            f"{table.path} lacks the columns {', '.join(missing)}; it has {listing(sorted(table.columns))}."
        )


def _shown(layout: _Layout, table: Table, row: Row) -> str:
    """The path below the set's folder of the file that a row names; empty if it names none within."""
    name = _text(row.cells.get("file_name")).replace("\\", "/")
    path = PurePosixPath(name)
    if not path.name or path.is_absolute() or ".." in path.parts or re.match("[A-Za-z]:", name):
        return ""
    within = table.folder.relative_to(layout.root)
    return (PurePosixPath(within.as_posix()) / path).as_posix()


def _told(layout: _Layout, tables: Sequence[Table]) -> Iterator[Item | Rejected]:
    """What the rows say, in their order; then the pictures of which no row says anything."""
    labels: dict[str, set[str]] = {}
    for table in tables:
        for row in table.rows:
            if shown := _shown(layout, table, row):
                labels.setdefault(layout.found(shown), set()).add(name_key(_label(row)))
    for table in tables:
        yield from (_item(layout, table, row, labels) for row in table.rows)
    governed = {table.folder: table for table in tables}
    for path in pictures_below(layout.root, layout.root):
        if isinstance(path, Rejected):
            continue  # tables, texts and whatever else lies beside
        shown = path.relative_to(layout.root).as_posix()
        if shown in labels:
            continue
        nearest = next((governed[above] for above in path.parents if above in governed), None)
        if nearest is not None:
            yield Rejected(shown, f"no row of {nearest.path.name} names it")
        elif (place := layout.place(shown))[1]:
            yield _of_folder(layout, path, *place)
        else:
            yield Rejected(shown, "lies in no class folder, and no table names it")


def _label(row: Row) -> str:
    return next((found for name in LABELS if (found := _text(row.cells.get(name)))), "")


def _item(layout: _Layout, table: Table, row: Row, labels: dict[str, set[str]]) -> Item | Rejected:
    cells = row.cells
    name = _text(cells.get("file_name"))
    if not name:
        return Rejected("a row of the metadata", "has no file_name")
    if row.wrong:
        return Rejected(name, row.wrong)
    shown = _shown(layout, table, row)
    if not shown or not (layout.root / shown).resolve().is_relative_to(layout.root.resolve()):
        return Rejected(name, "leaves the folder; name files within it")
    shown = layout.found(shown)
    by_folder = layout.place(shown)
    own = bool(table.columns & set(LABELS))
    label = _label(row) if own else words(by_folder[1])
    split = _text(cells.get("split")).lower()
    if wrong := _wrong_cells(row, label, split, len(labels[shown]) if own else 1):
        return Rejected(shown, wrong)
    path = layout.root / shown
    made = opaque("picture", shown) if layout.person else picture_id(layout.root, path)
    subject = _text(cells.get("subject")) or (opaque("folder", by_folder[1]) if layout.person and not own else None)
    return Item(
        image_id=_text(cells.get("image_id")) or made,
        name=shown,
        source=path,
        object=label,
        style=_text(cells.get("style")) or PLAIN_STYLE,
        split=SPLITS[split] if split else by_folder[0],
        caption=next((said for column in CAPTIONS if (said := _text(cells.get(column)))), None),
        subject=subject or None,
        licence=_text(cells.get("licence")) or None,
    )


def _wrong_cells(row: Row, label: str, split: str, different: int) -> str:
    if not label or label.lower() in ("nan", "none", "null"):
        return f"has no label (got {row.cells.get('object', row.cells.get('label'))!r})"
    if different > 1:
        return f"has rows of {different} different labels: every picture shows one subject"
    if split and split not in SPLITS:
        return f"has an unknown split {split!r}: expected {', '.join(sorted(SPLITS))}"
    return ""


def _text(value: object) -> str:
    """A cell as text; what is no text and no number is none."""
    if value is None or isinstance(value, dict | list) or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(value).strip()


def _by_class(root: Path, person: bool) -> Iterator[Item | Rejected]:
    layout = _Layout(root, person)
    above = subfolders(root, "class folders, or metadata.csv or metadata.jsonl")
    classes = [one for part in above for one in subfolders(part, "class folders")] if layout.parted else above
    for place in classes:
        for path in pictures_below(root, place):
            if isinstance(path, Rejected):
                yield _nameless(path) if person else path
            else:
                yield _of_folder(layout, path, *layout.place(path.relative_to(root).as_posix()))
    for place in (root, *(above if layout.parted else ())):
        for path in loose_pictures(place):
            stray = Rejected(path.relative_to(root).as_posix(), "lies in no class folder, and no table names it")
            yield _nameless(stray) if person else stray


def _of_folder(layout: _Layout, path: Path, split: str | None, place: str) -> Item | Rejected:
    shown = path.relative_to(layout.root).as_posix()
    if not layout.person:
        return Item(picture_id(layout.root, path), shown, path, words(place), split=split)
    subject = opaque("folder", place)
    return _nameless(Item(opaque("picture", shown), shown, path, spelling(place), split=split, subject=subject))


def _nameless(item: Item | Rejected) -> Item | Rejected:
    """The same under a name that says nobody's: folders and files of persons are often called by theirs."""
    return replace(item, name=opaque("picture", item.name))
