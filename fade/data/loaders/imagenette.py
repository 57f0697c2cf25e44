"""Imagenette: ``train|val/n0.../*.JPEG`` of the 160, 320 or full archive, unpacked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fade.data.loaders.files import folder_of, picture_id, pictures_below, subfolders
from fade.data.sets import Item, PictureSet, Rejected
from fade.errors import DataError, listing

CLASSES = {
    "n01440764": "tench",
    "n02102040": "english springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "french horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
"""WordNet ids to the words captions use."""

_SPLITS = {"train": "train", "val": "holdout"}


def imagenette(root: Path) -> PictureSet:
    """The unpacked archive; its own ``val`` is holdout.

    Raises:
        DataError: train or val is missing, or a class folder is none of Imagenette's.
    """
    folder_of(root, "imagenette2, with train and val in it")
    folders = []
    for part, split in _SPLITS.items():
        for folder in subfolders(folder_of(root / part, f"{part} of Imagenette"), "class folders n0..."):
            if folder.name not in CLASSES:
                raise DataError(f"{folder} is no class of Imagenette: expected one of {listing(CLASSES, 10)}.")
            folders.append((split, folder))
    return PictureSet(_items(root, folders), "Imagenette", domain="class")


def _items(root: Path, folders: list[tuple[str, Path]]) -> Iterator[Item | Rejected]:
    for split, folder in folders:
        for path in pictures_below(root, folder):
            if isinstance(path, Rejected):
                yield path
            else:
                shown = path.relative_to(root).as_posix()
                yield Item(picture_id(root, path), shown, path, CLASSES[folder.name], split=split)
