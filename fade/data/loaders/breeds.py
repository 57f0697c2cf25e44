"""Dog breeds (AtharvaTaras/Dog-Breeds-Dataset): a folder a breed, ``akita dog/Image_10.jpg``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fade.data.loaders.files import folder_of, loose_pictures, picture_id, pictures_below, subfolders, words
from fade.data.sets import Item, PictureSet, Rejected


def breeds(root: Path) -> PictureSet:
    """A folder a breed.

    Raises:
        DataError: the folder is missing or holds no folders.
    """
    folders = subfolders(folder_of(root, "with a folder a breed"), "a folder a breed")
    return PictureSet(_items(root, folders), "Dog-Breeds-Dataset", domain="breed")


def _items(root: Path, folders: list[Path]) -> Iterator[Item | Rejected]:
    for folder in folders:
        for path in pictures_below(root, folder):
            if isinstance(path, Rejected):
                yield path
            else:
                yield Item(picture_id(root, path), path.relative_to(root).as_posix(), path, words(folder.name))
    for path in loose_pictures(root):
        yield Rejected(path.name, "lies in no breed's folder")
