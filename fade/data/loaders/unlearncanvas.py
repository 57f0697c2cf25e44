"""UnlearnCanvas (arXiv:2402.11846): ``<Style>/<Object>/<number>.jpg``, the photographs under ``Seed_Images``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fade.concepts import PLAIN_STYLE
from fade.data.loaders.files import folder_of, loose_pictures, picture_id, pictures_below, subfolders, words
from fade.data.sets import STYLE_TEMPLATES, Item, PictureSet, Rejected
from fade.errors import DataError

SEED_STYLE = "Seed_Images"


def unlearncanvas(root: Path) -> PictureSet:
    """The benchmark's folder, or any other of that layout; one number is one photograph in every style.

    Raises:
        DataError: the folder is missing, or its styles hold no folders of objects.
    """
    styles = subfolders(folder_of(root, "that holds a folder a style"), "<Style>/<Object>/<number>.jpg")
    if wrong := [path.name for path in styles if path.name.lower() == SEED_STYLE.lower() and path.name != SEED_STYLE]:
        raise DataError(f"{root / wrong[0]}: expected the name {SEED_STYLE!r}, letter by letter. Rename the folder.")
    for style in styles:
        subfolders(style, "a folder an object")
    return PictureSet(_items(root, styles), "UnlearnCanvas", templates=STYLE_TEMPLATES)


def _items(root: Path, styles: list[Path]) -> Iterator[Item | Rejected]:
    for style in styles:
        name = PLAIN_STYLE if style.name == SEED_STYLE else words(style.name)
        for path in pictures_below(root, style):
            if isinstance(path, Rejected):
                yield path
                continue
            shown = path.relative_to(root)
            if len(shown.parts) != 3:
                yield Rejected(shown.as_posix(), "lies at the wrong depth: expected <Style>/<Object>/<number>.jpg")
                continue
            subject = words(path.parent.name)
            yield Item(picture_id(root, path), shown.as_posix(), path, subject, name, group=f"{subject}/{path.stem}")
    for path in loose_pictures(root):
        yield Rejected(path.name, "lies at the wrong depth: expected <Style>/<Object>/<number>.jpg")
