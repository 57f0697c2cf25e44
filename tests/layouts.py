"""Small picture sets of each kind, laid out as they are published, from real pictures that packages ship."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image, ImageOps
from scipy.io import savemat

from fade.data.canvas import photograph

SHOWN = ("cat", "horse", "coffee")
COUNT = 6


@dataclass(frozen=True, slots=True)
class Layout:
    """How to lay a set out, and a concept of it with its surrogate."""

    make: Callable[[Path], Path]
    concept: str
    surrogate: str


def picture(name: str, turn: int) -> Image.Image:
    """A crop of a photograph; every turn is another picture."""
    return photograph(name).rotate(17 * turn).crop((90, 90, 300, 290))


def _save(path: Path, name: str, turn: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(name, turn).save(path)


def _folder(root: Path) -> Path:
    for name in SHOWN:
        for i in range(COUNT):
            _save(root / name / f"{i}.jpg", name, i)
    return root


def _unlearncanvas(root: Path) -> Path:
    for style in ("Seed_Images", "Gray_Days"):
        for name in SHOWN:
            for i in range(COUNT):
                path = root / style / f"{name.title()}s" / f"{i + 1}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                shown = picture(name, i)
                (shown if style == "Seed_Images" else ImageOps.invert(shown.convert("L"))).save(path)
    return root


def _imagenette(root: Path) -> Path:
    for part, count in (("train", COUNT), ("val", 2)):
        for wnid, name in (("n01440764", "cat"), ("n03028079", "temple"), ("n03425413", "motorcycle")):
            for i in range(count):
                _save(root / part / wnid / f"{wnid}_{i}.JPEG", name, i + (20 if part == "val" else 0))
    return root


def _lfw(root: Path) -> Path:
    for number, face in enumerate(skimage.data.lfw_subset()[: 3 * COUNT]):
        person = ("Ann_Example", "Bo_Example", "Cy_Example")[number % 3]
        path = root / person / f"{person}_{number // 3 + 1:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((face * 255).astype(np.uint8)).save(path, quality=95)
    return root


def _breeds(root: Path) -> Path:
    for breed, name in (("akita dog", "cat"), ("affenpinscher dog", "horse"), ("borzoi dog", "coffee")):
        for i in range(COUNT):
            _save(root / breed / f"Image_{i}.jpg", name, i)
    return root


def _sun(root: Path) -> Path:
    names = []
    for scene, name in (("a/abbey", "temple"), ("c/cafe", "coffee"), ("s/stable/indoor", "horse")):
        for i in range(COUNT):
            names.append(f"{scene}/sun_{i:03d}.jpg")
            _save(root / "images" / names[-1], name, i)
    cells, words = np.empty((len(names), 1), dtype=object), np.empty((2, 1), dtype=object)
    cells[:, 0], words[:, 0] = names, ["praying", "stone"]
    savemat(root / "images.mat", {"images": cells})
    savemat(root / "attributes.mat", {"attributes": words})
    savemat(root / "attributeLabels_continuous.mat", {"labels_cv": np.ones((len(names), 2)) / 3})
    return root


def _webdataset(root: Path) -> Path:
    root.mkdir(parents=True)
    with tarfile.open(root / "000000.tar", "w") as archive:
        for name in SHOWN:
            for i in range(COUNT):
                stream = io.BytesIO()
                picture(name, i).save(stream, format="JPEG")
                for suffix, content in (("jpg", stream.getvalue()), ("json", json.dumps({"object": name}).encode())):
                    info = tarfile.TarInfo(f"{name}{i}.{suffix}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    return root


LAYOUTS = {
    "folder": Layout(_folder, "cat", "horse"),
    "unlearncanvas": Layout(_unlearncanvas, "gray days", "photo"),
    "imagenette": Layout(_imagenette, "tench", "church"),
    "lfw": Layout(_lfw, "Ann Example", "Bo Example"),
    "breeds": Layout(_breeds, "akita dog", "borzoi dog"),
    "sun": Layout(_sun, "stable indoor", "abbey"),
    "webdataset": Layout(_webdataset, "cat", "horse"),
}
