"""Contact sheets: many small pictures on one page, with labels a person can read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

_MARGIN = 150
_HEADER = 26
_ROWS, _COLUMNS, _SIDE = 24, 12, 64
CELL = 128
"""Longest side of a picture on a labelled sheet, in pixels: a base may draw 1024."""


def contact_sheet(rows: Sequence[Sequence[NDArray[np.uint8]]], *, zoom: int = 1, gap: int = 2) -> Image.Image:
    """Pictures in rows and columns, white gaps between."""
    height, width, _ = rows[0][0].shape
    across, down = width * zoom + gap, height * zoom + gap
    sheet = Image.new("RGB", (across * max(len(row) for row in rows) + gap, down * len(rows) + gap), "white")
    for y, row in enumerate(rows):
        for x, pixels in enumerate(row):
            image = Image.fromarray(pixels)
            if zoom > 1:
                image = image.resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
            sheet.paste(image, (gap + x * across, gap + y * down))
    return sheet


def labelled_sheet(
    rows: Sequence[tuple[str, Sequence[NDArray[np.uint8]]]], columns: Sequence[str], *, title: str, zoom: int = 2
) -> Image.Image:
    """A contact sheet with a title, a label before each row and a heading over each column; large pictures small."""
    shown = [[thumbnail(pixels, CELL) for pixels in pictures] for _, pictures in rows]
    sheet = contact_sheet(shown, zoom=max(1, min(zoom, CELL // max(shown[0][0].shape[:2]))))
    page = Image.new("RGB", (sheet.width + _MARGIN, sheet.height + 2 * _HEADER), "white")
    page.paste(sheet, (_MARGIN, 2 * _HEADER))
    draw = ImageDraw.Draw(page)
    small, large = ImageFont.load_default(15), ImageFont.load_default(18)
    draw.text((8, 6), title, fill="black", font=large)
    down, across = sheet.height // len(rows), sheet.width // len(columns)
    for y, (label, _) in enumerate(rows):
        colour = "#b00020" if label.endswith("after") else "black"
        draw.multiline_text((8, 2 * _HEADER + y * down + down // 3), label.replace(", ", "\n"), fill=colour, font=small)
    for x, name in enumerate(columns):
        draw.text((_MARGIN + x * across + 6, _HEADER + 4), name, fill="black", font=small)
    return page


def first_pictures(
    objects: Sequence[str], styles: Sequence[str], pictures: Mapping[tuple[str, str], Path]
) -> Image.Image:
    """The first picture of each pair of object (rows) and style (columns); at most 24 rows and 12 columns."""
    shown = [name for name in objects if any((name, style) in pictures for style in styles)][:_ROWS]
    blank = np.full((_SIDE, _SIDE, 3), 255, dtype=np.uint8)
    rows = [
        [_thumbnail(pictures[name, style]) if (name, style) in pictures else blank for style in styles[:_COLUMNS]]
        for name in shown
    ]
    return contact_sheet(rows, zoom=2)


def thumbnail(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """A picture (H, W, 3) whose longer side is at most ``side``; smaller ones as they are."""
    height, width, _ = pixels.shape
    scale = side / max(height, width)
    if scale >= 1:
        return pixels
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def _thumbnail(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        small = image if image.size == (_SIDE, _SIDE) else image.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        return np.asarray(small.convert("RGB"))
