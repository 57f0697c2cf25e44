"""Labeled Faces in the Wild: ``<Person_Name>/<Person_Name>_0001.jpg``. Ids and stored names do not say who it is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from fade.data.intake import Item, PictureSet, Rejected
from fade.data.loaders.files import folder_of, opaque, pictures_below, subfolders


def lfw(root: Path) -> PictureSet:
    """The folder ``lfw`` (or ``lfw_funneled``, ``lfw-deepfunneled``), a folder a person.

    Raises:
        DataError: it is missing or holds no folders.
    """
    people = subfolders(folder_of(root, "lfw, with a folder a person"), "<Person_Name>/<Person_Name>_0001.jpg")
    return PictureSet(_items(root, people), "Labeled Faces in the Wild", domain="person", person=True)


def _items(root: Path, people: list[Path]) -> Iterator[Item | Rejected]:
    for person in people:
        name, subject = " ".join(person.name.split("_")), opaque("lfw", person.name)
        for path in pictures_below(root, person):
            if isinstance(path, Rejected):
                yield path
                continue
            found = re.fullmatch(rf"{re.escape(person.name)}_(\d{{4}})\.jpg", path.name)
            shown = path.relative_to(root).as_posix()
            if found is None:
                yield Rejected(shown, "is not named as LFW names pictures: expected <Person_Name>_0001.jpg")
            else:
                yield Item(f"{subject}/{found[1]}", shown, path, name, subject=subject)
