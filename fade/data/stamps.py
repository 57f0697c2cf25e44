"""The wide canvas: 129 photographed objects x 8 styles, 64 x 64, with true neighbours and near styles   (ours).

The built-in canvas has twelve objects and ten styles that lie far apart, and every method reads 100 % on it. Here are
objects by the dozen that look alike (horse, donkey, zebra; three apples; two tigers) and styles in near pairs: two
line drawings, two posterisations, two tints, beside the photograph and a mosaic.

The photographs are the stamps of Tux Paint, cut out on transparent ground, which Debian ships as
``tuxpaint-stamps-default``. They are read from the package and not copied. Which of them are taken, what each is
called, with which others it is told apart only at a second look, and its licence stand in ``stamps.csv``: photographs
alone, no cartoons, drawings or mirror images. The package is under GPL-2 as a whole (copyright 2002-2022 Bill Kendrick
and contributors); a few pictures have a licence of their own, which its changelog names.

A picture is a function of (seed, split, object, index): where the stamp lies, its size, angle and light, and the ground
behind it. The same index shows the same rendering in every style. Positions of train and holdout are disjoint by
construction, as on the canvas.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from scipy import ndimage

from fade.data.styles import Picture, _grey, _ramp, _stretched, mosaic, photo, sketch
from fade.errors import ConfigError, DataError, listing
from fade.seeding import numpy_generator

SIZE = 64
SPLITS = ("train", "holdout")
PACKAGE = "tuxpaint-stamps-default"
_TABLE = Path(__file__).with_name("stamps.csv")
_BELOW = ("", "stamps", "usr/share/tuxpaint/stamps")
_WORK = 128
_FILLS = 0.86
_CELLS = 4
_JITTER = 0.05


@dataclass(frozen=True, slots=True)
class Stamp:
    """A photograph: ``file`` below the package's folder, the object's name, its group of neighbours, its licence."""

    file: str
    object: str
    group: str
    licence: str = "GPL-2"


@cache
def stamps() -> dict[str, Stamp]:
    """All that are taken, by object, in the table's order."""
    with _TABLE.open(encoding="utf-8", newline="") as file:
        return {row["object"]: Stamp(**row) for row in csv.DictReader(file)}


def charcoal(picture: Picture) -> Picture:
    """Soft broad lines and rubbed shadows in black on grey paper: the pencil's neighbour."""
    grey = _stretched(_grey(picture))
    dodge = np.clip(grey / np.maximum(ndimage.gaussian_filter(grey, 4.0), 0.08), 0.0, 1.0)
    tone = ndimage.gaussian_filter(np.clip(0.55 * dodge + 0.45 * grey, 0.0, 1.0), 0.5) ** 1.8
    return _ramp(tone, [(0.03, 0.03, 0.03), (0.80, 0.79, 0.77)])


def poster(picture: Picture) -> Picture:
    """Three flat steps in each of red, green and blue."""
    smooth = np.stack([ndimage.gaussian_filter(picture[..., c], 0.5) for c in range(3)], axis=-1)
    return np.clip(np.floor(smooth * 3), 0, 2) / 2


def screenprint(picture: Picture) -> Picture:
    """Four flat steps of lightness in the picture's own, strengthened colour: the poster's neighbour."""
    smooth = np.stack([ndimage.gaussian_filter(picture[..., c], 0.5) for c in range(3)], axis=-1)
    grey = _stretched(_grey(smooth))
    step = (np.clip(np.floor(grey * 4), 0, 3) / 3)[..., None]
    colour = np.round(2 * (smooth - _grey(smooth)[..., None])) / 4
    return np.clip(0.12 + 0.76 * step + 1.2 * colour, 0.0, 1.0)


def sepia(picture: Picture) -> Picture:
    """A photograph toned yellowish brown."""
    return _ramp(_stretched(_grey(picture)), [(0.13, 0.07, 0.02), (0.62, 0.45, 0.25), (1.0, 0.95, 0.80)])


def selenium(picture: Picture) -> Picture:
    """A photograph toned purplish brown: the sepia's neighbour."""
    return _ramp(_stretched(_grey(picture)), [(0.12, 0.03, 0.08), (0.58, 0.39, 0.43), (0.98, 0.92, 0.92)])


STYLES: dict[str, Callable[[Picture], Picture]] = {
    "photo": photo,
    "pencil": sketch,
    "charcoal": charcoal,
    "poster": poster,
    "screenprint": screenprint,
    "sepia": sepia,
    "selenium": selenium,
    "mosaic": mosaic,
}
NEAR = {
    "pencil": "line drawings",
    "charcoal": "line drawings",
    "poster": "posterisations",
    "screenprint": "posterisations",
    "sepia": "tints",
    "selenium": "tints",
}
"""The groups of styles that are near each other."""


def find_stamps(root: Path) -> Path:
    """The folder with ``animals``, ``food`` ... in it: the package's own, or within an unpacked .deb.

    Raises:
        DataError: it is none, or the package lacks photographs of the table; names them.
    """
    if root.is_file():
        raise DataError(
            f"{root} is a file: expected a folder. Unpack the package (`dpkg-deb -x {root.name} FOLDER`), or install "
            f"it (`apt-get install {PACKAGE}`) and give /usr/share/tuxpaint/stamps."
        )
    wanted = [stamp.file for stamp in stamps().values()]
    folder = max((root / below for below in _BELOW), key=lambda at: sum((at / file).is_file() for file in wanted))
    if missing := [file for file in wanted if not (folder / file).is_file()]:
        raise DataError(
            f"{root} lacks {len(missing)} of the {len(wanted)} photographs of the wide canvas: {listing(missing)}. "
            f"Expected the folder of Debian's {PACKAGE} (/usr/share/tuxpaint/stamps), or an unpacked .deb of it."
        )
    return folder


@lru_cache(maxsize=4)
def cut_out(path: Path) -> NDArray[np.float32]:
    """A stamp cut to what it shows, its longer side 128 pixels, in the middle of (256, 256, 4), 0..1, premultiplied.

    Raises:
        DataError: the file is no picture, or is transparent all over.
    """
    try:
        with Image.open(path) as image:
            whole = image.convert("RGBA")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise DataError(f"{path} does not decode ({error}). Install {PACKAGE} again.") from None
    box = whole.getchannel("A").point(lambda value: 255 if value > 40 else 0).getbbox()
    if box is None:
        raise DataError(f"{path} shows nothing: it is transparent all over. Install {PACKAGE} again.")
    shown = whole.crop(box)
    scale = _WORK / max(shown.size)
    width, height = (max(1, round(side * scale)) for side in shown.size)
    # Premultiplied, so that what is transparent lends the edge no colour.
    pixels = np.asarray(shown, dtype=np.float32) / 255.0
    pixels[..., :3] *= pixels[..., 3:]
    sheet = np.zeros((2 * _WORK, 2 * _WORK, 4), dtype=np.float32)
    top, left = _WORK - height // 2, _WORK - width // 2
    for channel in range(4):
        layer = Image.fromarray(pixels[..., channel]).resize((width, height), Image.Resampling.LANCZOS)
        sheet[top : top + height, left : left + width, channel] = np.clip(np.asarray(layer), 0.0, 1.0)
    return sheet


def _offset(generator: np.random.Generator, split: str) -> tuple[float, float]:
    """An offset in [-1, 1]^2 from the cells that belong to ``split`` (holdout: one in four)."""
    while True:
        column, row = generator.integers(0, _CELLS, size=2)
        if ((column + row) % _CELLS == 0) == (split == "holdout"):
            x, y = generator.random(2)
            return float((column + x) / _CELLS * 2 - 1), float((row + y) / _CELLS * 2 - 1)


def _ground(generator: np.random.Generator, shown: float) -> Picture:
    """A soft ground (64, 64, 3): two colours that run into each other, with clouds; light behind what is dark."""
    light = generator.uniform(0.72, 0.88) if shown < 0.5 else generator.uniform(0.12, 0.28)
    colours = [np.clip(light + generator.uniform(-0.09, 0.09, size=3), 0.0, 1.0) for _ in range(2)]
    angle = generator.uniform(0.0, 2 * np.pi)
    rows, columns = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]
    clouds = ndimage.gaussian_filter(generator.standard_normal((SIZE, SIZE)), 10.0, mode="wrap")
    along = 0.5 + 0.35 * (np.cos(angle) * columns + np.sin(angle) * rows) + 5.0 * clouds
    share = np.clip(along, 0.0, 1.0)[..., None]
    return ((1 - share) * colours[0] + share * colours[1]).astype(np.float32)


def render(stamp: Stamp, folder: Path, index: int, *, split: str, seed: int) -> dict[str, NDArray[np.uint8]]:
    """One rendering of an object in every style: style name to picture (64, 64, 3) uint8.

    Args:
        folder: as ``find_stamps`` gives it.
        index: which of the arbitrarily many renderings of this object and split.
        split: ``train`` or ``holdout``; their positions never coincide.

    Raises:
        ConfigError: unknown split.
        DataError: the stamp does not decode.
    """
    if split not in SPLITS:
        raise ConfigError(f"Unknown split {split!r}: expected one of {', '.join(SPLITS)}.")
    generator = numpy_generator(seed, "stamps", split, stamp.object, index)
    sheet = cut_out(folder / stamp.file)
    across, down = _offset(generator, split)
    zoom = generator.uniform(0.94, 1.06)
    angle = np.deg2rad(generator.uniform(-4.0, 4.0))
    brightness, contrast = generator.uniform(-0.04, 0.04), generator.uniform(0.93, 1.07)
    step = _WORK / (_FILLS * SIZE) / zoom
    turn = step * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centre = np.full(2, _WORK - 0.5) - turn @ (_JITTER * SIZE * np.array([down, across]))
    origin = centre - turn @ np.full(2, (SIZE - 1) / 2)
    # A pixel of the picture covers about two and a half of the sheet: blurred by as much before it is sampled.
    layers = [
        ndimage.affine_transform(ndimage.gaussian_filter(sheet[..., c], step / 3), turn, origin, (SIZE, SIZE), order=1)
        for c in range(4)
    ]
    cut = np.stack(layers, axis=-1)
    colour, cover = cut[..., :3], cut[..., 3:]
    covered = float(cover.sum())
    shown = float(_grey(colour).sum()) / max(covered, 1.0)
    picture = colour + (1 - cover) * _ground(generator, shown)
    picture = np.clip((picture - 0.5) * contrast + 0.5 + brightness, 0.0, 1.0).astype(np.float32)
    painted = {style: paint(picture) for style, paint in STYLES.items()}
    return {style: np.round(np.clip(values, 0.0, 1.0) * 255.0).astype(np.uint8) for style, values in painted.items()}


@dataclass(frozen=True, slots=True)
class StampPicture:
    """A rendered picture and what it shows."""

    stamp: Stamp
    style: str
    split: str
    index: int
    pixels: NDArray[np.uint8]


def render_all(folder: Path, *, split: str, per_pair: int, seed: int) -> Iterator[StampPicture]:
    """``per_pair`` pictures of every pair, in the order object, index, style."""
    for stamp in stamps().values():
        for index in range(per_pair):
            for style, pixels in render(stamp, folder, index, split=split, seed=seed).items():
                yield StampPicture(stamp, style, split, index, pixels)
