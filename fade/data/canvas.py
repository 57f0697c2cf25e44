"""The canvas: a miniature of UnlearnCanvas made from real photographs, without a download.

12 objects (the astronaut and the admiral are real persons) x 10 styles, 64 x 64 pixels. The
photographs are read from packages that are installed anyway, and are not copied. UnlearnCanvas
(arXiv:2402.11846) was made the same way: photographs, and style filters over each of them.

Any number of pictures per pair comes from crops, small rotations, light and (where the subject has
no left and right) flips. A picture is a function of (seed, split, object, index), and the style
filter on it: the same index shows the same crop in every style. Train and holdout crops are disjoint
by construction: the plane of crop offsets is cut into cells, and each split owns its own cells.

The packages' own notes say under which licence each photograph stands: see ``LICENCES``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from fade.data.styles import STYLES
from fade.errors import ConfigError, DataError, nearest
from fade.seeding import numpy_generator

SIZE = 64
SPLITS = ("train", "holdout")
_CELLS = 4
_WORK_SIZE = 128
_NEAR_DISPARITY = 35.0


@dataclass(frozen=True, slots=True)
class CanvasObject:
    """One subject: where its photograph lies and which part of it shows the subject.

    Attributes:
        package: the package that ships the photograph, and ``file`` below its folder.
        box: left, top, right, bottom in pixels of the photograph; may leave it (edge colour fills).
        jitter: largest crop offset, and change of size, as a fraction of the box.
        flips: whether mirror images are drawn too: only where left and right do not matter.
        aliases: other names the captions use for it now and then.
        person: whether it is a human being.
        depth_file: stereo disparities of the photograph, used to fade a cluttered background.
    """

    package: str
    file: str
    box: tuple[int, int, int, int]
    aliases: tuple[str, ...]
    jitter: float = 0.04
    flips: bool = False
    person: bool = False
    depth_file: str | None = None


_SKIMAGE, _SKLEARN, _MATPLOTLIB = "skimage", "sklearn", "matplotlib"
OBJECTS: dict[str, CanvasObject] = {
    "astronaut": CanvasObject(_SKIMAGE, "data/astronaut.png", (105, -5, 345, 235), ("spacewoman",), person=True),
    "admiral": CanvasObject(
        _MATPLOTLIB, "mpl-data/sample_data/grace_hopper.jpg", (95, 0, 415, 320), ("officer",), person=True
    ),
    "cameraman": CanvasObject(_SKIMAGE, "data/camera.png", (80, 40, 380, 340), ("photographer",), person=True),
    "cat": CanvasObject(_SKIMAGE, "data/chelsea.png", (60, 0, 360, 300), ("kitten",)),
    "horse": CanvasObject(_SKIMAGE, "data/horse.png", (-10, -30, 410, 360), ("pony",)),
    "motorcycle": CanvasObject(
        _SKIMAGE,
        "data/motorcycle_left.png",
        (100, 40, 690, 470),
        ("motorbike",),
        jitter=0.03,
        depth_file="data/motorcycle_disp.npz",
    ),
    "rocket": CanvasObject(_SKIMAGE, "data/rocket.jpg", (195, 115, 465, 415), ("spaceship",), flips=True),
    "coffee": CanvasObject(_SKIMAGE, "data/coffee.png", (70, 0, 490, 400), ("espresso",)),
    "coins": CanvasObject(_SKIMAGE, "data/coins.png", (20, 10, 250, 240), ("money",), flips=True),
    "retina": CanvasObject(_SKIMAGE, "data/retina.jpg", (0, 0, 1411, 1411), ("eye",)),
    "flower": CanvasObject(_SKLEARN, "datasets/images/flower.jpg", (165, 60, 465, 360), ("dahlia",), flips=True),
    "temple": CanvasObject(_SKLEARN, "datasets/images/china.jpg", (20, 0, 400, 380), ("pagoda",), flips=True),
}

LICENCES: dict[str, str] = {
    "astronaut": "public domain (NASA)",
    "admiral": "public domain (US Navy)",
    "cameraman": "CC0 (Lav Varshney)",
    "cat": "CC0 (Stefan van der Walt)",
    "horse": "CC0 (Andreas Preuss)",
    "motorcycle": "Middlebury Stereo 2014 (D. Scharstein et al.), as shipped by scikit-image",
    "rocket": "public domain (SpaceX)",
    "coffee": "CC0 (Rachel Michetti)",
    "coins": "no known copyright restrictions (Brooklyn Museum)",
    "retina": "CC0 (M. Häggström)",
    "flower": "CC BY 2.0 (vultilion), as shipped by scikit-learn",
    "temple": "CC BY 2.0 (danielbuechele), as shipped by scikit-learn",
}


def _without_background(pixels: NDArray[np.uint8], disparities: Path) -> NDArray[np.uint8]:
    """The photograph with all that lies behind the subject faded to light grey, by stereo depth.

    Holes in the disparities (infinite: no match) take the largest value of their neighbourhood.
    """
    with np.load(disparities) as archive:
        disparity = archive[archive.files[0]].astype(np.float32)
    known = np.where(np.isfinite(disparity), disparity, 0.0)
    known = ndimage.grey_closing(ndimage.median_filter(known, 5), 9)
    near = ndimage.gaussian_filter((known > _NEAR_DISPARITY).astype(np.float32), 1.5)[..., None]
    return np.round(near * pixels + (1 - near) * (205 + 0.15 * pixels)).clip(0, 255).astype(np.uint8)


@cache
def photograph(name: str) -> Image.Image:
    """The part of the photograph around an object, RGB, 384 x 384 pixels.

    The object's box fills the middle third; what lies outside the photograph repeats its edge.

    Raises:
        DataError: the package or its file is missing.
    """
    subject = OBJECTS[name]
    spec = importlib.util.find_spec(subject.package)
    if spec is None or spec.origin is None:
        raise DataError(
            f"The photograph of {name!r} comes with the package {subject.package!r}, which is not installed."
        )
    path = Path(spec.origin).parent / subject.file
    if not path.is_file():
        raise DataError(f"The photograph of {name!r} is missing: expected {path}. Reinstall {subject.package!r}.")
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    if subject.depth_file is not None:
        pixels = _without_background(pixels, path.parents[1] / subject.depth_file)
    left, top, right, bottom = subject.box
    width, height = right - left, bottom - top
    rows = np.clip(np.arange(top - height, bottom + height), 0, pixels.shape[0] - 1)
    columns = np.clip(np.arange(left - width, right + width), 0, pixels.shape[1] - 1)
    around = Image.fromarray(pixels[np.ix_(rows, columns)])
    resized = around.resize((3 * _WORK_SIZE, 3 * _WORK_SIZE), Image.Resampling.LANCZOS)
    return resized


def _crop_offset(generator: np.random.Generator, split: str) -> tuple[float, float]:
    """An offset in [-1, 1]^2 from the cells that belong to ``split`` (holdout: one in four)."""
    while True:
        column, row = generator.integers(0, _CELLS, size=2)
        if ((column + row) % _CELLS == 0) == (split == "holdout"):
            inside = generator.random(2)
            return (
                float((column + inside[0]) / _CELLS * 2 - 1),
                float((row + inside[1]) / _CELLS * 2 - 1),
            )


def _crop(name: str, index: int, split: str, seed: int) -> NDArray[np.float32]:
    subject = OBJECTS[name]
    generator = numpy_generator(seed, "canvas", split, name, index)
    across, down = _crop_offset(generator, split)
    zoom = 1.0 + subject.jitter * generator.uniform(-1.0, 1.0)
    angle = np.deg2rad(generator.uniform(-3.0, 3.0))
    light, contrast = generator.uniform(-0.05, 0.05), generator.uniform(0.92, 1.08)
    mirrored = subject.flips and generator.random() < 0.5
    image = photograph(name)
    box = image.width / 3
    step = box * zoom / SIZE
    matrix = step * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centre = box * np.array([1.5 + across * subject.jitter, 1.5 + down * subject.jitter])
    origin = centre - matrix @ np.array([SIZE / 2, SIZE / 2])
    cut = image.transform(
        (SIZE, SIZE),
        Image.Transform.AFFINE,
        (matrix[0, 0], matrix[0, 1], origin[0], matrix[1, 0], matrix[1, 1], origin[1]),
        resample=Image.Resampling.BICUBIC,
    )
    picture = np.asarray(cut, dtype=np.float32) / 255.0
    picture = np.clip((picture - 0.5) * np.float32(contrast) + np.float32(0.5 + light), 0.0, 1.0)
    return np.ascontiguousarray(picture[:, ::-1] if mirrored else picture)


def render(name: str, index: int, *, split: str, seed: int) -> dict[str, NDArray[np.uint8]]:
    """One crop of an object in every style: style name to picture (64, 64, 3) uint8.

    Args:
        index: which of the arbitrarily many crops of this object and split.
        split: ``train`` or ``holdout``; their crops never coincide.

    Raises:
        ConfigError: unknown object or split.
    """
    if name not in OBJECTS:
        raise ConfigError(f"Unknown canvas object {name!r}. {nearest(name, OBJECTS)}")
    if split not in SPLITS:
        raise ConfigError(f"Unknown split {split!r}: expected one of {', '.join(SPLITS)}.")
    crop = _crop(name, index, split, seed)
    return {style: np.round(np.clip(paint(crop), 0.0, 1.0) * 255.0).astype(np.uint8) for style, paint in STYLES.items()}


@dataclass(frozen=True, slots=True)
class CanvasPicture:
    """A rendered picture and what it shows."""

    object: str
    style: str
    index: int
    pixels: NDArray[np.uint8]


def render_all(*, split: str, per_pair: int, seed: int) -> Iterator[CanvasPicture]:
    """``per_pair`` pictures of every pair, in the order object, index, style."""
    for name in OBJECTS:
        for index in range(per_pair):
            for style, pixels in render(name, index, split=split, seed=seed).items():
                yield CanvasPicture(name, style, index, pixels)
