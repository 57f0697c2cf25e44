"""Stage ``catalog``: render the canvas to pictures, a table, the list of concepts and a contact sheet."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import pandas as pd

from fade.concepts import caption, slug
from fade.data.canvas import LICENCES, OBJECTS, SPLITS, render_all
from fade.data.catalog import COLUMNS, encode_png
from fade.data.styles import STYLES
from fade.files import read_yaml, write_json, writing
from fade.sheets import contact_sheet


def build_catalog(folder: Path, *, params: dict[str, Any]) -> None:
    """Write the canvas as a catalog.

    Args:
        params: the section ``catalog`` of params.yaml: ``seed``, and pictures a pair by split.
    """
    rows: list[dict[str, Any]] = []
    first: dict[tuple[str, str], Any] = {}
    with writing(folder) as temporary:
        for split in SPLITS:
            for picture in render_all(split=split, per_pair=params[f"{split}_per_pair"], seed=params["seed"]):
                first.setdefault((picture.object, picture.style), picture.pixels)
                name = f"{slug(picture.style)}/{slug(picture.object)}/{split}-{picture.index:03d}.png"
                content = encode_png(picture.pixels)
                path = temporary / "pictures" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                values = (
                    name.removesuffix(".png"),
                    f"pictures/{name}",
                    hashlib.sha256(content).hexdigest(),
                    picture.pixels.shape[1],
                    picture.pixels.shape[0],
                    "RGB",
                    caption(picture.object, picture.style),
                    picture.object,
                    picture.style,
                    split,
                    OBJECTS[picture.object].person,
                    f"{OBJECTS[picture.object].package}/{OBJECTS[picture.object].file}",
                    LICENCES[picture.object],
                )
                rows.append(dict(zip(COLUMNS, values, strict=True)))
        pd.DataFrame(rows).to_parquet(temporary / "catalog.parquet", index=False)
        objects = [
            {"name": name, "kind": "object", "aliases": list(subject.aliases), "person": subject.person}
            for name, subject in OBJECTS.items()
        ]
        styles: list[dict[str, Any]] = [
            {"name": name, "kind": "style", "aliases": [], "person": False} for name in STYLES
        ]
        write_json(temporary / "concepts.json", {"concepts": objects + styles})
        contact_sheet([[first[name, style] for style in STYLES] for name in OBJECTS], zoom=2).save(
            temporary / "sheet.png"
        )


def ensure_catalog(folder: Path, *, params: Path = Path("params.yaml")) -> bool:
    """Render the canvas unless it is there; give whether it was rendered. Takes about ten seconds."""
    if (folder / "catalog.parquet").is_file():
        return False
    build_catalog(folder, params=read_yaml(params)["catalog"])
    return True


def main() -> None:
    """Run the stage with the parameters in params.yaml."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    build_catalog(arguments.out, params=read_yaml(arguments.params)["catalog"])


if __name__ == "__main__":
    main()
