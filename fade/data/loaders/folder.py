"""Any image folder, as Hugging Face's ImageFolder reads them.

Either ``metadata.csv`` or ``metadata.jsonl`` beside the pictures (columns ``file_name``, ``object`` or
``label``; optional ``style``, ``text`` or ``caption``, ``split``, ``subject``, ``image_id``, ``licence``), or a
folder a class; ``train`` and ``test`` or ``val`` above the class folders are splits.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from fade.concepts import PLAIN_STYLE
from fade.data.loaders.files import folder_of, opaque, picture_id, pictures_below, subfolders, words
from fade.data.sets import PHOTO_TEMPLATES, STYLE_TEMPLATES, Item, PictureSet, Rejected
from fade.errors import DataError, listing

SPLITS = {
    "train": "train",
    "training": "train",
    "test": "holdout",
    "val": "holdout",
    "valid": "holdout",
    "validation": "holdout",
    "holdout": "holdout",
}


def folder(root: Path, *, domain: str = "object") -> PictureSet:
    """Pictures of a folder.

    Args:
        domain: what its subjects are: object, person, scene ... Of persons, ids do not carry file names.

    Raises:
        DataError: the folder or a column is missing, or the table cannot be read.
    """
    folder_of(root, "of pictures")
    tables = [root / name for name in ("metadata.csv", "metadata.jsonl") if (root / name).is_file()]
    if len(tables) > 1:
        raise DataError(f"{root} holds both metadata.csv and metadata.jsonl: keep one of them.")
    if not tables:
        return PictureSet(_by_class(root, domain), root.name, domain=domain, person=domain == "person")
    rows = list(_table(tables[0]))
    if not rows:
        raise DataError(f"{tables[0]} holds no rows: expected one a picture.")
    columns = {name for row in rows for name in row}
    if missing := [n for n, others in (("file_name", ()), ("object", ("label",))) if not {n, *others} & columns]:
        raise DataError(f"{tables[0]} lacks the columns {', '.join(missing)}; it has {listing(sorted(columns))}.")
    own = bool({"text", "caption"} & columns)
    templates = STYLE_TEMPLATES if "style" in columns else PHOTO_TEMPLATES
    person = domain == "person"
    items = (_nameless(item) if person else item for item in (_item(root, row, domain) for row in rows))
    return PictureSet(items, root.name, domain=domain, person=person, own_captions=own, templates=templates)


def _table(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            if path.suffix == ".csv":
                yield from csv.DictReader(stream, strict=True)
                return
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise DataError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}.")
                    yield row
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({error}). Save it as UTF-8, one row a picture.") from None


def _item(root: Path, row: dict[str, Any], domain: str) -> Item | Rejected:
    name = _text(row.get("file_name"))
    if not name:
        return Rejected("a row of the metadata", "has no file_name")
    label = _text(row.get("object")) or _text(row.get("label"))
    if not label or label.lower() in ("nan", "none", "null"):
        return Rejected(name, f"has no label (got {row.get('object', row.get('label'))!r})")
    path = root / name
    outside = PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts
    if outside or not PurePosixPath(name).name or not path.resolve().is_relative_to(root.resolve()):
        return Rejected(name, "leaves the folder; name files within it")
    split = _text(row.get("split"))
    if split and split.lower() not in SPLITS:
        return Rejected(name, f"has an unknown split {split!r}: expected {', '.join(sorted(SPLITS))}")
    given = _text(row.get("image_id")) or (opaque("picture", name) if domain == "person" else picture_id(root, path))
    return Item(
        image_id=given,
        name=name,
        source=path,
        object=label,
        style=_text(row.get("style")) or PLAIN_STYLE,
        split=SPLITS[split.lower()] if split else None,
        caption=_text(row.get("text")) or _text(row.get("caption")) or None,
        subject=_text(row.get("subject")) or None,
        licence=_text(row.get("licence")) or None,
    )


def _text(value: object) -> str:
    """A cell as text; what is no text and no number is none."""
    if value is None or isinstance(value, dict | list) or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(value).strip()


def _by_class(root: Path, domain: str) -> Iterator[Item | Rejected]:
    above = subfolders(root, "class folders, or metadata.csv or metadata.jsonl")
    if all(path.name.lower() in SPLITS for path in above):
        classes = [(SPLITS[part.name.lower()], path) for part in above for path in subfolders(part, "class folders")]
    else:
        classes = [("", path) for path in above]
    for split, place in classes:
        for path in pictures_below(root, place):
            if isinstance(path, Rejected):
                yield _nameless(path) if domain == "person" else path
                continue
            shown = path.relative_to(root).as_posix()
            item = Item(picture_id(root, path), shown, path, words(place.name), split=split or None)
            if domain == "person":
                named = replace(item, image_id=opaque("picture", shown), subject=opaque("folder", place.name))
                yield _nameless(named)
            else:
                yield item


def _nameless(item: Item | Rejected) -> Item | Rejected:
    """The same under a name that says nobody's: folders and files of persons are often called by theirs."""
    return replace(item, name=opaque("picture", item.name))
