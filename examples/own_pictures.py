"""A picture set to try your own miniature with: 12 drawn objects in 8 styles, in UnlearnCanvas' layout.

    python examples/own_pictures.py PICTURES            # 8 x 12 x 20 pictures, 96 x 96

README, "Your own pictures", says what to do with it. Nothing of the canvas is in it: the objects are drawn
here, the styles are Pillow's filters.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

SIDE = 192  # drawn at twice the size, then halved: smooth edges
Draw = ImageDraw.ImageDraw
Colour = tuple[int, int, int]


def _polygon(count: int, inner: float, radius: float = 70) -> list[tuple[float, float]]:
    """A star or regular polygon around the middle, its first corner up."""
    corners = []
    for i in range(2 * count):
        far = radius if i % 2 == 0 else radius * inner
        angle = math.pi * i / count
        corners.append((96 + far * math.sin(angle), 96 - far * math.cos(angle)))
    return corners


def _house(d: Draw, a: Colour, b: Colour) -> None:
    d.rectangle((40, 90, 152, 164), fill=a)
    d.polygon([(26, 92), (96, 30), (166, 92)], fill=b)
    d.rectangle((82, 120, 110, 164), fill=b)


def _tree(d: Draw, a: Colour, b: Colour) -> None:
    d.rectangle((84, 110, 108, 170), fill=b)
    for top, width in ((24, 34), (54, 48), (84, 62)):
        d.polygon([(96, top), (96 - width, top + 50), (96 + width, top + 50)], fill=a)


def _fish(d: Draw, a: Colour, b: Colour) -> None:
    d.ellipse((30, 62, 134, 130), fill=a)
    d.polygon([(124, 96), (168, 58), (168, 134)], fill=b)
    d.ellipse((48, 82, 62, 96), fill="black")


def _boat(d: Draw, a: Colour, b: Colour) -> None:
    d.polygon([(26, 124), (166, 124), (136, 162), (56, 162)], fill=a)
    d.rectangle((92, 30, 98, 124), fill="black")
    d.polygon([(102, 34), (102, 114), (158, 114)], fill=b)


def _star(d: Draw, a: Colour, b: Colour) -> None:
    d.polygon(_polygon(5, 0.42, 78), fill=a)


def _heart(d: Draw, a: Colour, b: Colour) -> None:
    d.ellipse((32, 42, 102, 112), fill=a)
    d.ellipse((90, 42, 160, 112), fill=a)
    d.polygon([(36, 92), (156, 92), (96, 166)], fill=a)


def _ball(d: Draw, a: Colour, b: Colour) -> None:
    d.ellipse((32, 32, 160, 160), fill=a)
    d.pieslice((32, 32, 160, 160), 0, 60, fill=b)
    d.pieslice((32, 32, 160, 160), 120, 180, fill=b)
    d.pieslice((32, 32, 160, 160), 240, 300, fill=b)


def _umbrella(d: Draw, a: Colour, b: Colour) -> None:
    d.pieslice((24, 36, 168, 180), 180, 360, fill=a)
    d.pieslice((72, 36, 120, 180), 180, 360, fill=b)
    d.rectangle((93, 100, 99, 160), fill="black")
    d.arc((70, 146, 99, 174), 0, 180, fill="black", width=6)


def _mushroom(d: Draw, a: Colour, b: Colour) -> None:
    d.rectangle((76, 96, 116, 164), fill="#f0e6d2")
    d.pieslice((30, 30, 162, 166), 180, 360, fill=a)
    for x, y in ((60, 66), (96, 46), (122, 70)):
        d.ellipse((x - 9, y - 9, x + 9, y + 9), fill="#f0e6d2")


def _arrow(d: Draw, a: Colour, b: Colour) -> None:
    d.rectangle((26, 80, 110, 112), fill=a)
    d.polygon([(104, 44), (104, 148), (168, 96)], fill=a)


def _ladder(d: Draw, a: Colour, b: Colour) -> None:
    for x in (60, 120):
        d.rectangle((x, 22, x + 12, 170), fill=a)
    for y in range(38, 170, 28):
        d.rectangle((60, y, 132, y + 9), fill=b)


def _kite(d: Draw, a: Colour, b: Colour) -> None:
    d.polygon([(96, 20), (144, 74), (96, 146), (48, 74)], fill=a)
    d.polygon([(96, 20), (144, 74), (96, 74)], fill=b)
    d.polygon([(96, 146), (48, 74), (96, 74)], fill=b)
    d.line([(96, 146), (110, 158), (90, 166), (106, 180)], fill="black", width=4)


def _toned(image: Image.Image, black: str, white: str) -> Image.Image:
    return ImageOps.colorize(ImageOps.autocontrast(ImageOps.grayscale(image)), black, white)


def _striped(image: Image.Image) -> Image.Image:
    striped = image.copy()
    for top in range(0, image.height, 12):
        ImageDraw.Draw(striped).rectangle((0, top, image.width, top + 3), fill="white")
    return striped


OBJECTS: dict[str, Callable[[Draw, Colour, Colour], None]] = {
    "House": _house,
    "Tree": _tree,
    "Fish": _fish,
    "Boat": _boat,
    "Star": _star,
    "Heart": _heart,
    "Ball": _ball,
    "Umbrella": _umbrella,
    "Mushroom": _mushroom,
    "Arrow": _arrow,
    "Ladder": _ladder,
    "Kite": _kite,
}
STYLES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "Seed_Images": lambda image: image,
    "Negative": ImageOps.invert,
    "Sepia": lambda image: _toned(image, "#2b1a0a", "#f6e3c0"),
    "Night": lambda image: _toned(image, "#01030a", "#4a78ff"),
    "Contour": lambda image: image.filter(ImageFilter.CONTOUR),
    "Poster": lambda image: ImageOps.posterize(image, 1),
    "Pixels": lambda image: image.resize((12, 12), Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST),
    "Stripes": _striped,
}


def draw(name: str, number: int, generator: np.random.Generator) -> Image.Image:
    """One picture of an object: its colours, background, place, size and turn are drawn."""
    dark = [int(value) for value in generator.integers(20, 130, 6)]
    light = [int(value) for value in generator.integers(170, 250, 3)]
    image = Image.new("RGB", (SIDE, SIDE), (light[0], light[1], light[2]))
    dark[number % 3] += 110  # some colour, not only greys
    OBJECTS[name](ImageDraw.Draw(image), (dark[0], dark[1], dark[2]), (dark[3], dark[4], dark[5]))
    across, down = (float(value) for value in generator.uniform(-14, 14, 2))
    image = image.rotate(
        float(generator.uniform(-10, 10)),
        Image.Resampling.BICUBIC,
        translate=(round(across), round(down)),
        fillcolor=(light[0], light[1], light[2]),
    )
    return image.resize((SIDE // 2, SIDE // 2), Image.Resampling.LANCZOS)


def main() -> None:
    """Write ``<Style>/<Object>/<number>.jpg``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=20, help="pictures of each object in each style")
    arguments = parser.parse_args()
    for place, name in enumerate(OBJECTS):
        generator = np.random.default_rng([7, place])
        for number in range(1, arguments.count + 1):
            image = draw(name, number, generator)
            for style, paint in STYLES.items():
                path = arguments.folder / style / name / f"{number}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                paint(image).save(path, quality=92)


if __name__ == "__main__":
    main()
