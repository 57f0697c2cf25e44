"""A picture's failure is its own: files that cameras, scanners and broken disks make, and what becomes of them."""

from __future__ import annotations

import io
import random
import struct
import zlib
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, TiffImagePlugin

from fade.data import intake
from fade.data.canvas import photograph
from fade.data.intake import build
from fade.data.loaders.folder import folder
from fade.data.pictures import prepare
from fade.errors import DataError, ResourceError
from fade.files import read_json

LYING = 6
"""EXIF's word for a picture that must be turned a quarter to the right."""


def shown(turn: int = 0) -> Image.Image:
    return photograph("cat").rotate(7 * turn).crop((100, 100, 164, 148))


def encoded(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    stream = io.BytesIO()
    (image or shown()).save(stream, format=kind, **options)
    return stream.getvalue()


def pixels(content: bytes, **options: Any) -> np.ndarray:
    with Image.open(io.BytesIO(prepare(content, size=None, **options).content)) as image:
        return np.asarray(image).astype(int)


def exif(*fields: tuple[int, int, bytes], further: bytes = b"") -> bytes:
    """EXIF of fields of count one: tag, type, and the four bytes of the value or of its place."""
    body = b"".join(struct.pack("<HHI", tag, kind, 1) + value for tag, kind, value in fields)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(fields)) + body + b"\0\0\0\0" + further


TURNED = (0x112, 3, struct.pack("<HH", LYING, 0))
DIVIDED_BY_ZERO = (0x11A, 10, struct.pack("<I", 38)), struct.pack("<ii", -1, 0)
BROKEN = {
    "a rational over zero": exif(TURNED, DIVIDED_BY_ZERO[0], further=DIVIDED_BY_ZERO[1]),
    "a value outside of the file": exif(TURNED, (0x11A, 10, struct.pack("<I", 10**6))),
    "a type that is none": exif(TURNED, (0x11A, 99, b"\0\0\0\0")),
    "a block that points at itself": exif(TURNED, (0x8769, 4, struct.pack("<I", 8))),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_field_of_exif_costs_neither_the_picture_nor_its_orientation(kind: str, fault: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    plain, turned = encoded(kind, **options), encoded(kind, exif=BROKEN[fault], **options)
    as_stored = pixels(plain)
    assert as_stored.shape == (48, 64, 3)
    np.testing.assert_array_equal(pixels(turned), np.rot90(as_stored, -1))


def test_exif_that_is_none_leaves_the_picture_as_it_is_stored() -> None:
    noise = b"Exif\0\0" + bytes(range(200, 256))
    np.testing.assert_array_equal(pixels(encoded("JPEG", exif=noise)), pixels(encoded("JPEG")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_made_upright(orientation: int) -> None:
    own = exif((0x112, 3, struct.pack("<HH", orientation, 0)))
    stored, found = pixels(encoded("PNG")), pixels(encoded("PNG", exif=own))
    assert found.shape == ((64, 48, 3) if orientation > 4 else (48, 64, 3))
    assert (orientation == 1) == (found.shape == stored.shape and bool((found == stored).all()))


def test_a_camera_adds_views_and_previews_to_one_picture() -> None:
    whole = pixels(encoded("JPEG"))
    several = encoded("MPO", save_all=True, append_images=[shown(3)])
    with Image.open(io.BytesIO(several)) as image:
        assert image.n_frames == 2
    np.testing.assert_array_equal(pixels(several), whole)
    preview = shown().resize((32, 24))
    preview.encoderinfo = {"tiffinfo": TiffImagePlugin.ImageFileDirectory_v2()}
    preview.encoderinfo["tiffinfo"][254] = 1
    with_preview = encoded("TIFF", save_all=True, append_images=[preview])
    np.testing.assert_array_equal(pixels(with_preview), pixels(encoded("TIFF")))
    with pytest.raises(DataError, match="2 frames"):
        prepare(encoded("TIFF", save_all=True, append_images=[shown(3)]), size=None)


def _deep(bits: int) -> np.ndarray:
    """The picture in grey with values of so many bits, in 16."""
    grey = np.asarray(shown().convert("L"), dtype=np.float64)
    grey = (grey - grey.min()) / (grey.max() - grey.min())
    return np.round(grey * (2**bits - 1)).astype(np.uint16)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("bits", [10, 12, 14])
def test_fewer_bits_in_a_file_of_sixteen_are_told_and_not_black(kind: str, bits: int) -> None:
    full = pixels(encoded(kind, Image.fromarray(_deep(16))))
    assert full.max() == 255
    few = encoded(kind, Image.fromarray(_deep(bits)))
    with pytest.raises(DataError, match=f"at most {2**bits - 1}.*--bits"):
        prepare(few, size=None)
    np.testing.assert_allclose(pixels(few, bits=bits), full, atol=1)
    with pytest.raises(DataError, match="from 0 to 65535; expected 0 to"):
        prepare(encoded(kind, Image.fromarray(_deep(16))), size=None, bits=bits)


def _png_of_colours(values: np.ndarray) -> bytes:
    """Pillow writes no colours of 16 bits: a grey file of three times the width, told to be one of colours."""
    height, width = values.shape
    rows = b"".join(b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in values)

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_colours_of_fewer_bits_in_sixteen_are_told() -> None:
    assert pixels(_png_of_colours(_deep(16))).max() == 255
    for bits in (12, 14):
        with pytest.raises(DataError, match="16-bit colours"):
            prepare(_png_of_colours(_deep(bits)), size=None)
    dark = Image.fromarray(np.full((48, 64, 3), 9, np.uint8))
    assert pixels(encoded("PNG", dark)).max() == 9  # of eight bits, dark is dark


def test_whole_numbers_of_no_known_range_are_told() -> None:
    wide = np.full((48, 64), 70_000, np.int32)
    wide[0] = -3
    with pytest.raises(DataError, match="from -3 to 70000"):
        prepare(encoded("TIFF", Image.fromarray(wide)), size=None)


FILES = {
    "jpeg": encoded("JPEG", exif=BROKEN["a rational over zero"]),
    "png": encoded("PNG", exif=BROKEN["a rational over zero"]),
    "webp": encoded("WEBP", exif=BROKEN["a rational over zero"]),
    "tiff": encoded("TIFF"),
    "tiff in strips": encoded("TIFF", compression="tiff_lzw"),
    "gif": encoded("GIF", shown().convert("P")),
    "bmp": encoded("BMP"),
    "mpo": encoded("MPO", save_all=True, append_images=[shown(3)]),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_file_is_a_picture_or_a_reason(kind: str) -> None:
    prepare(FILES[kind], size=32)
    draw, reasons = random.Random(kind), []
    for turn in range(150):
        damaged = bytearray(FILES[kind])
        for _ in range(draw.randrange(1, 6)):
            # Headers are short, and what they say is what decoders trip over.
            damaged[draw.randrange(min(len(damaged), 300 if turn % 2 else len(damaged)))] = draw.randrange(256)
        del damaged[draw.choice([len(damaged), draw.randrange(len(damaged))]) :]
        try:
            prepare(bytes(damaged), size=32)
        except DataError as error:
            reasons.append(str(error))
    assert len(reasons) > 10
    assert not any("\n" in reason for reason in reasons)


@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff", "bmp"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_file_that_was_cut_is_no_picture(kind: str, share: float) -> None:
    assert prepare(FILES[kind], size=None).width in (48, 64)
    with pytest.raises(DataError, match=r"does not decode|unknown format"):
        prepare(FILES[kind][: int(share * len(FILES[kind]))], size=None)


def test_whatever_a_decoder_raises_ends_that_picture_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "bad", "c"):
        (tmp_path / "in/cat").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"in/cat/{name}.png").write_bytes(encoded("PNG", shown(len(name))))
    (tmp_path / "in/cat/c.png.png").mkdir()
    (tmp_path / "in/cat/c.png.png/d.jpg").write_bytes(encoded("JPEG"))
    load = ImageFile.ImageFile.load

    def broken(image: ImageFile.ImageFile) -> Any:
        if isinstance(image.fp, io.BytesIO) and image.fp.getvalue() == encoded("PNG", shown(3)):
            raise TypeError
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", broken)
    list(build(tmp_path / "out", folder(tmp_path / "in"), workers=1))
    told = {one["name"]: one["reason"] for one in read_json(tmp_path / "out/rejected.json")["rejected"]}
    assert told["cat/bad.png"] == "does not decode (TypeError)"
    assert "name is taken" in told["cat/c.png.png/d.jpg"]
    assert set(told) == {"cat/bad.png", "cat/c.png.png/d.jpg"}


def test_a_process_that_is_ended_from_without_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def __enter__(self) -> Killed:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def submit(self, *_: Any) -> None:
            raise BrokenProcessPool

    for number in range(130):
        (tmp_path / "in/cat").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"in/cat/{number}.png").write_bytes(b"x")
    monkeypatch.setattr(intake, "ProcessPoolExecutor", Killed)
    with pytest.raises(ResourceError, match="want of memory"):
        list(build(tmp_path / "out", folder(tmp_path / "in"), workers=2))
    assert not (tmp_path / "out").exists()
