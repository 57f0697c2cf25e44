"""Data sets on the Hugging Face hub, or folders that ``datasets`` reads: a column of pictures, a column of labels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fade.concepts import PLAIN_STYLE
from fade.data.loaders.files import words
from fade.data.loaders.folder import SPLITS
from fade.data.sets import PHOTO_TEMPLATES, STYLE_TEMPLATES, Item, PictureSet, Rejected
from fade.errors import ConfigError, DataError, listing

LABELS = ("object", "label", "labels", "class", "fine_label")
CAPTIONS = ("text", "caption")


def hub(source: Path) -> PictureSet:
    """A data set by name or folder; its ``test`` and ``validation`` are holdout.

    Columns: one of pictures, one of ``LABELS`` (class labels or words); optional ``style``, ``text`` or ``caption``.

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
    columns = dict(next(iter(parts.values())).features)
    pictures = [column for column, feature in columns.items() if isinstance(feature, datasets.Image)]
    label = next((column for column in LABELS if column in columns), None)
    if not pictures or label is None:
        raise DataError(
            f"{name} has the columns {listing(sorted(columns))}: expected one of pictures, and {', '.join(LABELS)}."
        )
    caption = next((column for column in CAPTIONS if column in columns), None)
    undecoded = datasets.Image(decode=False)
    raw = {split: part.cast_column(pictures[0], undecoded) for split, part in parts.items()}
    return PictureSet(
        _items(raw, name, (pictures[0], label, caption), names=getattr(columns[label], "names", None)),
        name,
        domain="class",
        own_captions=caption is not None,
        templates=STYLE_TEMPLATES if "style" in columns else PHOTO_TEMPLATES,
    )


def _items(
    parts: dict[str, Any], name: str, columns: tuple[str, str, str | None], *, names: list[str] | None
) -> Iterator[Item | Rejected]:
    column, label, caption = columns
    for split, rows in parts.items():
        for number, row in enumerate(rows):
            image_id = f"{split}/{number:07d}"
            told, shown = row[column], row[label]
            if told is None or shown is None or (names is not None and shown < 0):  # -1: the label is withheld
                yield Rejected(f"{name}/{image_id}", f"has no {'picture' if told is None else 'label'}")
                continue
            yield Item(
                image_id,
                f"{name}/{image_id}",
                told["bytes"] if told["bytes"] is not None else Path(told["path"]),
                words(names[shown] if names is not None else str(shown)),
                words(str(row.get("style") or PLAIN_STYLE)),
                split=SPLITS.get(split),
                caption=row[caption] if caption is not None else None,
            )
