"""Labeled Faces in the Wild: ``<Person_Name>/<Person_Name>_0001.jpg``.

Only the concept says who it is, as an erasure must. Ids, stored names, origins and the report of what was
set aside say the subject instead: twelve digits of the SHA-256 of ``lfw/<Person_Name>``, so that whoever
holds the set finds the folder again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from fade.data.loaders.files import folder_of, opaque, pictures_below, subfolders
from fade.data.sets import Item, PictureSet, Rejected


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
                yield Rejected(f"{subject}/{opaque('lfw', path.name.rpartition('/')[2])}", path.reason)
                continue
            found = re.fullmatch(rf"{re.escape(person.name)}_(\d{{4}})\.jpg", path.name)
            if found is None:
                wrong = "is not named as LFW names pictures: expected <Person_Name>_0001.jpg"
                yield Rejected(f"{subject}/{opaque('lfw', path.name)}", wrong)
            else:
                reference = f"{subject}/{found[1]}"
                yield Item(reference, f"lfw/{reference}", path, name, subject=subject)
