"""Data sets on the Hugging Face hub, or folders that ``datasets`` reads: a column of pictures, a column of labels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fade.concepts import PLAIN_STYLE
from fade.data.loaders.files import splits_of, words
from fade.data.sets import PHOTO_TEMPLATES, STYLE_TEMPLATES, Item, PictureSet, Rejected
from fade.errors import ConfigError, DataError, listing
from fade.names import name_key

LABELS = ("object", "label", "labels", "class", "fine_label")
CAPTIONS = ("text", "caption")


def hub(source: Path) -> PictureSet:
    """A data set by name or folder; its ``test`` and ``validation`` are holdout.

    Columns: one of pictures, one of ``LABELS``; optional ``style``, ``text`` or ``caption``, in any case. Labels and
    styles are words, or numbers for which the data set has the words.

    Raises:
        ConfigError: the package ``datasets`` is not installed.
        DataError: there is no such data set, or it lacks pictures or labels.
    """
    try:
        import datasets
    except ModuleNotFoundError:
        raise ConfigError(
            "Data sets of the hub are read by the package datasets: pip install 'fade-erasure[hub]'."
        ) from None
    name = source.as_posix()
    try:
        parts = datasets.load_dataset(name)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:  # offline and not found are OSErrors
        reason = str(error).partition("\n")[0]
        raise DataError(f"No data set {name} ({reason}). A name on the hub needs HF_HUB_OFFLINE=0.") from None
    features = dict(next(iter(parts.values())).features)
    pictures = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    called = {name_key(column): column for column in reversed(features)}  # of equal ones the first
    label, caption, style = (
        next((called[column] for column in wanted if column in called), None)
        for wanted in ([name_key(one) for one in LABELS], CAPTIONS, ("style",))
    )
    if not pictures or label is None:
        raise DataError(
            f"{name} has the columns {listing(sorted(features))}: expected one of pictures, and {', '.join(LABELS)}."
        )
    undecoded = datasets.Image(decode=False)
    raw = {split: part.cast_column(pictures[0], undecoded) for split, part in parts.items()}
    columns = _Columns(pictures[0], _Words(label, features), _Words(style, features), caption)
    return PictureSet(
        _items(raw, name, columns),
        name,
        domain="class",
        own_captions=caption is not None,
        templates=PHOTO_TEMPLATES if style is None else STYLE_TEMPLATES,
    )


class _Words:
    """A column of words, of numbers that stand for words (class labels), or of lists of one of them."""

    def __init__(self, column: str | None, features: dict[str, Any]) -> None:
        feature = features.get(column) if column is not None else None
        names = getattr(getattr(feature, "feature", feature), "names", None)
        self.column, self.names = column, names

    def of(self, row: dict[str, Any]) -> str | None:
        """The words of a row; empty if it has none, None if it has several."""
        value = row.get(self.column) if self.column is not None else None
        if isinstance(value, list):
            if len(value) > 1:
                return None
            value = value[0] if value else None
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return ""
        if self.names is not None and not isinstance(value, str):
            return words(self.names[value]) if 0 <= value < len(self.names) else ""  # -1: the label is withheld
        return words(str(value))


@dataclass(frozen=True, slots=True)
class _Columns:
    """Where a data set keeps what a catalog asks for."""

    picture: str
    label: _Words
    style: _Words
    caption: str | None


def _items(parts: dict[str, Any], name: str, columns: _Columns) -> Iterator[Item | Rejected]:
    splits = splits_of(parts)
    for split, rows in parts.items():
        for number, row in enumerate(rows):
            image_id = f"{split}/{number:07d}"
            item = _item(row, image_id, f"{name}/{image_id}", columns)
            yield item if isinstance(item, Rejected) else replace(item, split=splits.get(split))


def _item(row: dict[str, Any], image_id: str, name: str, columns: _Columns) -> Item | Rejected:
    told, shown, style = row[columns.picture], columns.label.of(row), columns.style.of(row)
    if told is None or not (told["bytes"] or told["path"]):
        return Rejected(name, "has no picture")
    for what, found in (("label", shown), ("style", style)):
        if found is None:
            return Rejected(name, f"has more than one {what}: every picture shows one subject in one style")
    if not shown or (not style and columns.style.names is not None):
        return Rejected(name, f"has no {'style' if shown else 'label'}")
    said = row[columns.caption] if columns.caption is not None else None
    if isinstance(said, list):  # several sentences of one picture: the first
        said = next((one for one in said if isinstance(one, str) and one.strip()), None)
    source = told["bytes"] if told["bytes"] is not None else Path(told["path"])
    caption = said if isinstance(said, str) else None
    return Item(image_id, name, source, shown, style or PLAIN_STYLE, caption=caption)
