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
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from fade.errors import DataError

MAX_PIXELS = 64_000_000
MAX_BYTES = 256 * 2**20
MIN_SIDE = 16
_FAINT = 2**14 - 1
"""Brightest value of a 16-bit picture that is rather taken for one of fewer bits than for a dark one."""
_NEW_SUBFILE_TYPE = 254
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture upright, by EXIF's orientation."""
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


def prepare(
    source: Path | bytes | NDArray[np.uint8],
    *,
    size: int | None,
    max_pixels: int = MAX_PIXELS,
    bits: int | None = None,
) -> Prepared:
    """Read a picture and make it ready for a catalog.

    Args:
        source: a file, a file's bytes, or pixels that were drawn (they are stored as they are).
        size: side of the square that is cut from the middle and resampled; None keeps the picture's own.
        bits: how many of the 16 of grey pictures are used; None: all, and a picture that looks as if not is refused.

    Raises:
        DataError: with the reason, if it is no picture to train on.
    """
    if isinstance(source, np.ndarray):
        image, content = Image.fromarray(source), encode_png(source)
        digest, width, height, mode = hashlib.sha256(content).hexdigest(), image.width, image.height, image.mode
    else:
        raw = _read(source)
        image, mode = _decoded(raw, max_pixels, bits)
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


def _decoded(content: bytes, max_pixels: int, bits: int | None) -> tuple[Image.Image, str]:
    """The picture as RGB, upright, and its own mode."""
    try:
        # The limit below is the one that counts: the header is read here, not the pixels.
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content)) as image:
            _check_header(image, max_pixels)
            mode, deep = image.mode, _has_16_bit_colours(image, content)
            image.load()
            return _rgb(_upright(image), bits=bits, deep=deep), mode
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError("is no picture that can be read (unknown format)") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"is too large ({error})") from None
    except Exception as error:  # a decoder raises whatever a damaged file leads it to, and this file alone is damaged
        raise DataError(f"does not decode ({str(error) or type(error).__name__})") from None


def _check_header(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise DataError(f"has {width} x {height} pixels; at most {max_pixels} are decoded")
    if min(width, height) < MIN_SIDE:
        raise DataError(f"is {width} x {height}; expected at least {MIN_SIDE} pixels a side")
    if (frames := getattr(image, "n_frames", 1)) > 1 and not _is_a_cameras(image, frames):
        raise DataError(f"is animated or has pages: {frames} frames, expected one")


def _is_a_cameras(image: Image.Image, frames: int) -> bool:
    """Whether the further frames are what a camera adds to one picture: previews, depth or gain maps, second views."""
    if image.format == "MPO":
        return True
    if not isinstance(image, TiffImageFile):
        return False
    reduced = []
    for frame in range(1, frames):
        image.seek(frame)
        reduced.append(bool(image.tag_v2.get(_NEW_SUBFILE_TYPE, 0) & 1))
    image.seek(0)
    return all(reduced)


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says.

    ``ImageOps.exif_transpose`` writes all of the EXIF anew, which one broken field prevents. EXIF that cannot be
    read says nothing, and the picture stays as it is stored.
    """
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # as of decoders
        turn = None
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image, *, bits: int | None, deep: bool) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion clips instead of scaling
        return _scaled(np.asarray(image, dtype=np.float64), bits)
    if image.mode == "F":
        raise DataError("holds floating-point pixels, whose range is not known; save it with 8 bits")
    if deep and _brightest(image) <= _FAINT >> 8:  # Pillow keeps the upper eight bits
        raise DataError(
            "holds 16-bit colours of a quarter of the range at most, so it would be all but black: scale what are 12 "
            "or 14 bits to 65535 and save it again"
        )
    if image.has_transparency_data:
        clear = image.convert("RGBA")
        white = Image.new("RGBA", clear.size, "white")
        return Image.alpha_composite(white, clear).convert("RGB")
    return image.convert("RGB")


def _scaled(values: NDArray[np.float64], bits: int | None) -> Image.Image:
    """Grey values of up to 16 bits as 8.

    Raises:
        DataError: there are others; or ``bits`` is not given and the upper quarters of the range are empty, as in
            files of 16 bits that hold the 12 or 14 of a sensor.
    """
    least, most, full = int(values.min()), int(values.max()), 2 ** (bits or 16) - 1
    if least < 0 or most > full:
        raise DataError(f"holds values from {least} to {most}; expected 0 to {full} ({bits or 16} bits)")
    if bits is None and most <= _FAINT:
        raise DataError(
            f"holds 16-bit values of at most {most}, so it would be all but black: if the full range are "
            f"{max(8, most.bit_length())} bits, or 12 or 14, say so with --bits"
        )
    return Image.fromarray(np.round(values / (full / 255.0)).clip(0, 255).astype(np.uint8)).convert("RGB")


def _has_16_bit_colours(image: Image.Image, content: bytes) -> bool:
    if image.format == "PNG":
        return content[24] == 16  # the bit depth in IHDR, which always comes first
    return isinstance(image, TiffImageFile) and max(image.tag_v2.get(ExifTags.Base.BitsPerSample, (8,))) == 16


def _brightest(image: Image.Image) -> int:
    bands = [band for name, band in zip(image.getbands(), image.split(), strict=True) if name != "A"]
    return max(int(np.asarray(band).max()) for band in bands)
