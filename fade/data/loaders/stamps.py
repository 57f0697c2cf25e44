"""The wide canvas (``fade/data/stamps.py`` renders it): the folder of Debian's ``tuxpaint-stamps-default``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fade.concepts import slug
from fade.data.sets import STYLE_TEMPLATES, Item, PictureSet
from fade.data.stamps import NEAR, PACKAGE, STYLES, find_stamps, render_all, stamps

SEED = 29
PER_PAIR = {"train": 20, "holdout": 5}
"""Renderings of every object, each in all styles."""


def wide_canvas(root: Path) -> PictureSet:
    """The stamps as a picture set; every object's concept says which group of neighbours it is of.

    Raises:
        DataError: ``root`` is not the package's folder, or lacks photographs of the table.
    """
    folder = find_stamps(root)
    objects = [
        {"name": one.object, "kind": "object", "aliases": [], "person": False, "domain": "object", "group": one.group}
        for one in stamps().values()
    ]
    styles = [
        {"name": name, "kind": "style", "aliases": [], "person": False, "domain": "style"}
        | ({"group": NEAR[name]} if name in NEAR else {})
        for name in STYLES
    ]
    return PictureSet(_items(folder), PACKAGE, templates=STYLE_TEMPLATES, concepts=(*objects, *styles))


def _items(folder: Path) -> Iterator[Item]:
    for split, per_pair in PER_PAIR.items():
        for picture in render_all(folder, split=split, per_pair=per_pair, seed=SEED):
            name = f"{slug(picture.style)}/{slug(picture.stamp.object)}/{split}-{picture.index:03d}"
            yield Item(
                image_id=name,
                name=f"stamps/{name}",
                source=picture.pixels,
                object=picture.stamp.object,
                style=picture.style,
                split=split,
                origin=f"{PACKAGE}/{picture.stamp.file}",
                licence=picture.stamp.licence,
            )
