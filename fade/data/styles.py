"""The canvas' styles: ten image filters, each told from the others at a glance.

A filter takes and gives a float32 picture (64, 64, 3), values 0..1, and draws nothing at random, so
the style of a picture is a function of the picture alone.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Picture = NDArray[np.float32]

_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def _grey(picture: Picture) -> Picture:
    return (picture @ _LUMINANCE).astype(np.float32)


def _stretched(grey: Picture, low: float = 2.0, high: float = 98.0) -> Picture:
    """Contrast stretched between two percentiles: a dark photograph must not drown in a style."""
    bottom, top = np.percentile(grey, [low, high])
    return np.clip((grey - bottom) / max(float(top - bottom), 0.05), 0.0, 1.0).astype(np.float32)


def _edges(grey: Picture, sigma: float) -> Picture:
    smooth = ndimage.gaussian_filter(grey, sigma)
    edges = np.hypot(ndimage.sobel(smooth, axis=0), ndimage.sobel(smooth, axis=1))
    return _stretched(edges.astype(np.float32), 30.0, 97.0)


def _ramp(values: Picture, colours: list[tuple[float, float, float]]) -> Picture:
    """Piecewise linear colour map over 0..1."""
    table = np.array(colours, dtype=np.float32)
    at = np.linspace(0.0, 1.0, len(table))
    return np.stack([np.interp(values, at, table[:, c]) for c in range(3)], axis=-1)


def photo(picture: Picture) -> Picture:
    """The photograph itself."""
    return picture


def sketch(picture: Picture) -> Picture:
    """Pencil on paper: colour dodge of the grey picture with its blurred negative."""
    grey = _stretched(_grey(picture))
    dodge = np.clip(grey / np.maximum(ndimage.gaussian_filter(grey, 2.2), 0.08), 0.0, 1.0)
    line = np.clip(0.82 * dodge + 0.18 * grey, 0.0, 1.0) ** 1.4
    return _ramp(line, [(0.16, 0.15, 0.17), (0.97, 0.95, 0.90)])


def neon(picture: Picture) -> Picture:
    """Glowing lines on black; the colour runs from cyan over magenta to yellow down the picture."""
    edges = _edges(_grey(picture), 0.6)
    glow = np.clip(edges + 0.5 * ndimage.gaussian_filter(edges, 1.5), 0.0, 1.0)[..., None]
    rows = np.linspace(0.0, 1.0, picture.shape[0], dtype=np.float32)
    hue = _ramp(np.repeat(rows[:, None], picture.shape[1], 1), [(0.1, 0.9, 1.0), (1.0, 0.2, 0.9), (1.0, 0.9, 0.1)])
    return glow * hue + 0.25 * glow**4


def mosaic(picture: Picture) -> Picture:
    """Square tiles of four pixels, one colour each, with light grout between."""
    height, width, _ = picture.shape
    tiles = picture.reshape(height // 4, 4, width // 4, 4, 3).mean(axis=(1, 3))
    tiles = np.clip(0.5 + 1.35 * (tiles - 0.5), 0.0, 1.0)
    out = tiles.repeat(4, axis=0).repeat(4, axis=1)
    out[3::4] = 0.6 * out[3::4] + 0.38
    out[:, 3::4] = 0.6 * out[:, 3::4] + 0.38
    return out


def pop_art(picture: Picture) -> Picture:
    """Four flat inks by lightness: violet, red-pink, orange-yellow, pale cyan."""
    grey = _stretched(ndimage.gaussian_filter(_grey(picture), 0.6))
    inks = np.array([(0.20, 0.05, 0.45), (0.92, 0.12, 0.50), (1.0, 0.80, 0.10), (0.62, 0.95, 0.95)])
    return inks[np.clip((grey * 4).astype(int), 0, 3)]


def halftone(picture: Picture) -> Picture:
    """Round dots of dark ink on cream paper, four pixels apart, as large as the picture is dark."""
    grey = ndimage.gaussian_filter(_stretched(_grey(picture)), 0.7)
    scale = 4
    fine = ndimage.zoom(grey, scale, order=1)
    at = (np.arange(fine.shape[0]) + 0.5) / scale
    dots = np.cos(at[:, None] * np.pi / 2) * np.cos(at[None, :] * np.pi / 2)
    ink = ((dots * 0.5 + 0.5) ** 1.0 > fine).astype(np.float32)
    small = ink.reshape(grey.shape[0], scale, grey.shape[1], scale).mean(axis=(1, 3))
    return _ramp(small, [(0.98, 0.95, 0.84), (0.05, 0.22, 0.20)])


def thermal(picture: Picture) -> Picture:
    """An infrared camera's false colours, blue for dark to white for light."""
    grey = _stretched(ndimage.gaussian_filter(_grey(picture), 0.5))
    return _ramp(
        grey,
        [
            (0.02, 0.0, 0.25),
            (0.1, 0.1, 0.9),
            (0.0, 0.75, 0.75),
            (0.2, 0.9, 0.1),
            (1.0, 0.9, 0.0),
            (1.0, 0.25, 0.0),
            (1.0, 0.95, 0.9),
        ],
    )


def emboss(picture: Picture) -> Picture:
    """Grey relief lit from the upper left."""
    grey = _stretched(_grey(picture))
    smooth = ndimage.gaussian_filter(grey, 0.6)
    relief = smooth - np.roll(smooth, (2, 2), axis=(0, 1))
    relief[:2], relief[:, :2] = 0.0, 0.0
    level = np.clip(0.5 - 1.1 * relief + 0.12 * (grey - 0.5), 0.0, 1.0)
    return _ramp(level, [(0.0, 0.0, 0.0), (0.55, 0.55, 0.52), (1.0, 1.0, 0.98)])


def oil(picture: Picture) -> Picture:
    """Brush strokes (a Kuwahara filter) with raised paint, strong colours and a warm varnish."""
    window, shift = 3, 1
    grey = _grey(picture)
    mean = ndimage.uniform_filter(grey, window)
    spread = ndimage.uniform_filter(grey**2, window) - mean**2
    smooth = np.stack([ndimage.uniform_filter(picture[..., c], window) for c in range(3)], axis=-1)
    quarters = [(shift, shift), (shift, -shift), (-shift, shift), (-shift, -shift)]
    spreads = np.stack([np.roll(spread, quarter, axis=(0, 1)) for quarter in quarters])
    colours = np.stack([np.roll(smooth, quarter, axis=(0, 1)) for quarter in quarters])
    flattest = spreads.argmin(axis=0)[None, ..., None]
    painted = np.take_along_axis(colours, flattest, axis=0)[0]
    lightness = _grey(painted)
    rich = lightness[..., None] + 1.5 * (painted - lightness[..., None])
    relief = lightness - np.roll(lightness, (1, 1), axis=(0, 1))
    relief[0], relief[:, 0] = 0.0, 0.0
    ridges = 0.035 * np.sin(np.add.outer(np.arange(len(grey)), 2.0 * np.arange(len(grey[0]))) * 1.1)
    varnish = np.array([1.0, 0.86, 0.52], dtype=np.float32)
    return np.clip(rich + 0.5 * relief[..., None] + ridges[..., None], 0.0, 1.0) * varnish


def blueprint(picture: Picture) -> Picture:
    """White lines on a blue sheet with a fine grid."""
    edges = _edges(_grey(picture), 0.5)
    sheet = np.full(edges.shape, 0.06, dtype=np.float32)
    sheet[7::8], sheet[:, 7::8] = 0.22, 0.22
    return _ramp(np.maximum(sheet, edges), [(0.04, 0.16, 0.50), (0.93, 0.97, 1.0)])


STYLES: dict[str, Callable[[Picture], Picture]] = {
    "photo": photo,
    "sketch": sketch,
    "neon": neon,
    "mosaic": mosaic,
    "pop art": pop_art,
    "halftone": halftone,
    "thermal": thermal,
    "emboss": emboss,
    "oil": oil,
    "blueprint": blueprint,
}
