"""The built-in canvas as a picture set like any other (``fade/data/canvas.py`` renders it)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fade.concepts import slug
from fade.data.canvas import LICENCES, OBJECTS, SPLITS, render_all
from fade.data.sets import STYLE_TEMPLATES, Item, PictureSet
from fade.data.styles import STYLES


def canvas(params: dict[str, Any]) -> PictureSet:
    """The canvas; ``params``: ``seed``, and pictures a pair by split, as in params.yaml."""
    objects = [
        {"name": name, "kind": "object", "aliases": list(known.aliases), "person": known.person, "domain": "object"}
        for name, known in OBJECTS.items()
    ]
    styles = [{"name": name, "kind": "style", "aliases": [], "person": False, "domain": "style"} for name in STYLES]
    return PictureSet(_items(params), "canvas", templates=STYLE_TEMPLATES, concepts=(*objects, *styles))


def _items(params: dict[str, Any]) -> Iterator[Item]:
    for split in SPLITS:
        for picture in render_all(split=split, per_pair=params[f"{split}_per_pair"], seed=params["seed"]):
            known = OBJECTS[picture.object]
            name = f"{slug(picture.style)}/{slug(picture.object)}/{split}-{picture.index:03d}"
            yield Item(
                image_id=name,
                name=f"canvas/{name}",
                source=picture.pixels,
                object=picture.object,
                style=picture.style,
                split=split,
                person=known.person,
                origin=f"{known.package}/{known.file}",
                licence=LICENCES[picture.object],
            )
