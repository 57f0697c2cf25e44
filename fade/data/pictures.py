"""Pictures from anywhere: read with limits, made RGB, cut to a square of one size, and hashed.

Whoever sends a picture may send anything under its name, so a file is looked at before it is decoded:
its kind, its number of frames and its pixels. What cannot be a training picture raises ``DataError``
with a reason that fits one line of a report.
"""

from __future__ import annotations

import hashlib
import io
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from fade.errors import DataError

MAX_PIXELS = 64_000_000
MAX_BYTES = 256 * 2**20
MIN_SIDE = 16
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})


@dataclass(frozen=True, slots=True)
class Prepared:
    """A picture as a catalog stores it, and what it was made from.

    Attributes:
        content: PNG bytes, RGB.
        phash: 64-bit perceptual hash of what is stored, 16 hexadecimal digits.
        source_sha256: of the original's bytes, with its ``source_width`` and ``source_height``.
        mode: the original's colour mode.
    """

    content: bytes
    sha256: str
    phash: str
    width: int
    height: int
    source_sha256: str
    source_width: int
    source_height: int
    mode: str


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """A picture as PNG bytes."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG", compress_level=6)
    return stream.getvalue()


def perceptual_hash(image: Image.Image) -> str:
    """64-bit pHash (low frequencies of the cosine transform against their median), 16 hexadecimal digits."""
    return str(imagehash.phash(image))


def prepare(source: Path | bytes | NDArray[np.uint8], *, size: int | None, max_pixels: int = MAX_PIXELS) -> Prepared:
    """Read a picture and make it ready for a catalog.

    Args:
        source: a file, a file's bytes, or pixels that were drawn (they are stored as they are).
        size: side of the square that is cut from the middle and resampled; None keeps the picture's own.

    Raises:
        DataError: with the reason, if it is no picture to train on.
    """
    if isinstance(source, np.ndarray):
        image, content = Image.fromarray(source), encode_png(source)
        digest, width, height, mode = hashlib.sha256(content).hexdigest(), image.width, image.height, image.mode
    else:
        raw = _read(source)
        image, mode = _decoded(raw, max_pixels)
        digest, width, height = hashlib.sha256(raw).hexdigest(), image.width, image.height
        if size is not None and image.size != (size, size):
            image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
        content = encode_png(np.asarray(image))
    return Prepared(
        content=content,
        sha256=hashlib.sha256(content).hexdigest(),
        phash=perceptual_hash(image),
        width=image.width,
        height=image.height,
        source_sha256=digest,
        source_width=width,
        source_height=height,
        mode=mode,
    )


def _read(source: Path | bytes) -> bytes:
    if isinstance(source, bytes):
        content = source
    else:
        try:
            kind = source.stat()
            if not stat.S_ISREG(kind.st_mode):
                raise DataError("is no regular file")
            if kind.st_size > MAX_BYTES:
                raise DataError(f"has {kind.st_size} bytes; at most {MAX_BYTES} are read")
            content = source.read_bytes()
        except FileNotFoundError:
            raise DataError("is missing") from None
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror})") from None
    if not content:
        raise DataError("is empty (0 bytes)")
    return content


def _decoded(content: bytes, max_pixels: int) -> tuple[Image.Image, str]:
    """The picture as RGB, upright, and its own mode."""
    try:
        # The limit below is the one that counts: the header is read here, not the pixels.
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content)) as image:
            _check_header(image, max_pixels)
            mode = image.mode
            return _upright_rgb(image), mode
    except UnidentifiedImageError:
        raise DataError("is no picture that can be read (unknown format)") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"is too large ({error})") from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, ZeroDivisionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"does not decode ({error})") from None


def _check_header(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise DataError(f"has {width} x {height} pixels; at most {max_pixels} are decoded")
    if min(width, height) < MIN_SIDE:
        raise DataError(f"is {width} x {height}; expected at least {MIN_SIDE} pixels a side")
    if (frames := getattr(image, "n_frames", 1)) > 1:
        raise DataError(f"is animated or has pages: {frames} frames, expected one")


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # 16 bits: Pillow's own conversion clips instead of scaling
        values = np.asarray(upright, dtype=np.float64)
        return Image.fromarray(np.round(values / 257.0).clip(0, 255).astype(np.uint8)).convert("RGB")
    if upright.mode == "F":
        raise DataError("holds floating-point pixels, whose range is not known; save it with 8 bits")
    if upright.has_transparency_data:
        clear = upright.convert("RGBA")
        white = Image.new("RGBA", clear.size, "white")
        return Image.alpha_composite(white, clear).convert("RGB")
    return upright.convert("RGB")
