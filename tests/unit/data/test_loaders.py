"""Every kind of picture set from its real layout; every bad input is refused or set aside, never half taken in."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import skimage.data
from PIL import Image
from scipy.io import savemat

from fade.data.canvas import photograph
from fade.data.catalog import load_catalog, load_concepts, load_templates, stream_table
from fade.data.deletion import delete, mark
from fade.data.intake import add, build
from fade.data.loaders.breeds import breeds
from fade.data.loaders.folder import folder
from fade.data.loaders.hub import hub
from fade.data.loaders.imagenette import imagenette
from fade.data.loaders.lfw import lfw
from fade.data.loaders.stamps import wide_canvas
from fade.data.loaders.sun import sun
from fade.data.loaders.unlearncanvas import unlearncanvas
from fade.data.loaders.webdataset import webdataset
from fade.data.sets import PictureSet
from fade.errors import ConfigError, DataError, FadeError
from fade.files import read_json
from fade.spec import make_spec, save_spec
from fade.steps.catalog import KINDS
from fade.steps.split import split

NOW = datetime(2026, 1, 2, tzinfo=UTC)


def _picture(name: str, turn: int = 0) -> Image.Image:
    return photograph(name).rotate(7 * turn).crop((100, 100, 300, 260))


def _save(path: Path, name: str = "cat", turn: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    _picture(name, turn).save(path)
    return path


def _take(pictures: PictureSet, out: Path, **options: Any) -> Any:
    for _ in build(out, pictures, size=64, added_at=NOW, workers=1, **options):
        pass
    return load_catalog(out, further=("domain", "subject", "attributes", "phash", "source_width", "source_height"))


def _rejected(out: Path) -> dict[str, str]:
    return {entry["name"]: entry["reason"] for entry in read_json(out / "rejected.json")["rejected"]}


def test_unlearncanvas(tmp_path: Path) -> None:
    for style in ("Pop_Art", "Seed_Images"):
        for subject in ("Cats", "Flowers"):
            for number in range(1, 8):
                _save(tmp_path / "in" / style / subject / f"{number}.jpg", "cat", number)
    table = _take(unlearncanvas(tmp_path / "in"), tmp_path / "out")
    assert len(table) == 28
    assert set(table["style"]) == {"pop art", "photo"}
    assert set(table["caption"]) >= {"a cats image in pop art style."}
    assert (table["width"] == 64).all()
    assert (table["source_width"] == 200).all()
    assert set(table["split"]) == {"train", "holdout"}
    by_photograph = table.assign(number=table["image_id"].str.split("/").str[-1]).groupby(["object", "number"])["split"]
    assert (by_photograph.nunique() == 1).all()


def test_imagenette(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for wnid in ("n01440764", "n03425413"):
            _save(tmp_path / "in" / part / wnid / f"{wnid}_1.JPEG")
    table = _take(imagenette(tmp_path / "in"), tmp_path / "out")
    assert set(table["object"]) == {"tench", "gas pump"}
    assert table.groupby("split").size().to_dict() == {"train": 2, "holdout": 2}
    assert "a photo of gas pump" in set(table["caption"])
    (tmp_path / "in/train/n99999999").mkdir()
    with pytest.raises(DataError, match="n99999999 is no class of Imagenette"):
        imagenette(tmp_path / "in")


def test_labeled_faces_keep_names_out_of_ids_and_files(tmp_path: Path) -> None:
    faces = skimage.data.lfw_subset()[:4]
    for number, face in enumerate(faces):
        person = ("Ann_Example", "Bo_Example")[number % 2]
        path = tmp_path / "in" / person / f"{person}_{number // 2 + 1:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((face * 255).astype(np.uint8)).save(path)
    (tmp_path / "in/Ann_Example/ann_example_0009.JPG").write_bytes(b"x")
    table = _take(lfw(tmp_path / "in"), tmp_path / "out")
    assert set(table["object"]) == {"Ann Example", "Bo Example"}
    assert set(table["domain"]) == {"person"}
    assert table["person"].all()
    assert table["subject"].nunique() == 2
    assert not table["image_id"].str.contains("Example").any()
    assert not any("Example" in path.name for path in (tmp_path / "out/pictures").rglob("*"))
    (tmp_path / "in/Bo_Example/Bo_Example_0009.txt").write_bytes(b"x")
    table = _take(lfw(tmp_path / "in"), tmp_path / "again")
    reasons = " ".join(_rejected(tmp_path / "again").values())
    assert "not named as LFW" in reasons
    assert "no picture by its name" in reasons
    assert load_concepts(tmp_path / "again")["Ann Example"].person
    whole = pd.read_parquet(tmp_path / "again/catalog.parquet")
    for column in set(whole.columns) - {"object", "caption"}:  # what says the concept, as an erasure must
        assert not whole[column].astype(str).str.contains("Example").any(), column
    assert "xample" not in (tmp_path / "again/rejected.json").read_text()
    assert set(whole["uri"]) == {f"lfw/{name}" for name in whole["image_id"]}


@pytest.mark.parametrize("table", [False, True])
def test_a_folder_of_persons_keeps_their_names_to_the_concept(table: bool, tmp_path: Path) -> None:
    _save(tmp_path / "in/Ann Example/ann_example.jpg")
    (tmp_path / "in/Ann Example/ann_example.gif").write_bytes(b"")
    if table:
        rows = [{"file_name": f"Ann Example/ann_example.{s}", "object": "Ann Example"} for s in ("jpg", "gif")]
        rows.append({"file_name": "Ann Example/none.jpg", "object": "Ann Example"})
        (tmp_path / "in/metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    _take(folder(tmp_path / "in", domain="person"), tmp_path / "out")
    whole = pd.read_parquet(tmp_path / "out/catalog.parquet")
    assert set(whole["object"].str.lower()) == {"ann example"}
    for column in set(whole.columns) - {"object", "caption"}:
        assert not whole[column].astype(str).str.contains("(?i)example").any(), column
    rejected = (tmp_path / "out/rejected.json").read_text()
    assert "0 bytes" in rejected
    assert "xample" not in rejected


def test_breeds(tmp_path: Path) -> None:
    for name in ("akita dog", "affenpinscher dog"):
        _save(tmp_path / "in" / name / "Image_1.jpg")
    table = _take(breeds(tmp_path / "in"), tmp_path / "out")
    assert set(table["object"]) == {"akita dog", "affenpinscher dog"}
    assert set(table["domain"]) == {"breed"}


@pytest.mark.parametrize(("opened", "place"), [(breeds, "akita dog"), (unlearncanvas, "Oil/Cats"), (folder, "cat")])
def test_a_picture_beside_the_folders_is_set_aside(
    opened: Callable[[Path], PictureSet], place: str, tmp_path: Path
) -> None:
    for name in (f"{place}/1.jpg", "loose.jpg"):
        _save(tmp_path / "in" / name)
    assert len(_take(opened(tmp_path / "in"), tmp_path / "out")) == 1
    assert list(_rejected(tmp_path / "out")) == ["loose.jpg"]


def _sun(root: Path) -> Path:
    names = ["a/abbey/sun_aaa.jpg", "a/apartment_building/outdoor/sun_bbb.jpg"]
    for name in names:
        _save(root / "images" / name, "temple")
    cells = np.empty((2, 1), dtype=object)
    cells[:, 0] = names
    words = np.empty((3, 1), dtype=object)
    words[:, 0] = ["sailing", "praying", "stone"]
    savemat(root / "images.mat", {"images": cells})
    savemat(root / "attributes.mat", {"attributes": words})
    savemat(root / "attributeLabels_continuous.mat", {"labels_cv": np.array([[0, 1, 0.67], [0.33, 0, 1]])})
    return root


def test_sun_attributes(tmp_path: Path) -> None:
    table = _take(sun(_sun(tmp_path / "in")), tmp_path / "out")
    assert set(table["object"]) == {"abbey", "apartment building outdoor"}
    found = {row.object: list(row.attributes) for row in table.itertuples()}
    assert found == {"abbey": ["praying", "stone"], "apartment building outdoor": ["stone"]}


def _tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def _jpeg(name: str = "cat", turn: int = 0) -> bytes:
    stream = io.BytesIO()
    _picture(name, turn).save(stream, format="JPEG")
    return stream.getvalue()


def test_webdataset(tmp_path: Path) -> None:
    members = {"000.jpg": _jpeg(), "000.json": b'{"object": "cat", "style": "oil"}', "001.jpg": _jpeg("horse")}
    members |= {"001.cls": b"horse", "001.txt": b"a horse on grass", "002.jpg": _jpeg(), "../../003.jpg": _jpeg()}
    members["../../003.cls"] = b"cat"
    table = _take(webdataset(_tar(tmp_path / "in/0.tar", members)), tmp_path / "out")
    assert dict(zip(table["image_id"], table["caption"], strict=True)) == {
        "0/000": "a photo of cat",
        "0/001": "a horse on grass",
    }
    assert set(table["style"]) == {"oil", "photo"}
    assert set(_rejected(tmp_path / "out")) == {"0.tar/002", "0.tar/../../003"}


def test_hub_data_sets_by_their_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    names = datasets.ClassLabel(names=["gas_pump", "tench"])
    features = datasets.Features({"image": datasets.Image(), "label": names})
    (tmp_path / "in").mkdir()
    for part, labels in (("train", [0, 1, 1]), ("test", [0, None, -1])):
        shown = [{"bytes": _jpeg("cat", i + len(part)), "path": None} for i in range(len(labels))]
        rows = datasets.Dataset.from_dict({"image": shown, "label": labels}, features=features)
        rows.to_parquet(tmp_path / "in" / f"{part}.parquet")
    table = _take(hub(tmp_path / "in"), tmp_path / "out")
    assert table.groupby(["object", "split"]).size().to_dict() == {
        ("gas pump", "holdout"): 1,
        ("gas pump", "train"): 1,
        ("tench", "train"): 2,
    }
    assert list(_rejected(tmp_path / "out").values()) == ["has no label", "has no label"]
    with pytest.raises(DataError, match="No data set nobody/nothing"):
        hub(Path("nobody/nothing"))


def test_hub_styles_and_labels_that_are_numbers_are_told_by_their_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    styles = datasets.ClassLabel(names=["Abstract_Expressionism", "Baroque"])
    labels = datasets.Sequence(datasets.ClassLabel(names=["cityscape", "portrait"]))
    features = datasets.Features({"Image": datasets.Image(), "Label": labels, "Style": styles})
    rows = [([0], 0), ([1], 1), ([0], -1), ([0, 1], 0), ([], 0)]
    given = {
        "Image": [{"bytes": _jpeg("cat", i), "path": None} for i in range(len(rows))],
        "Label": [label for label, _ in rows],
        "Style": [style for _, style in rows],
    }
    (tmp_path / "in").mkdir()
    datasets.Dataset.from_dict(given, features=features).to_parquet(tmp_path / "in/train.parquet")
    table = _take(hub(tmp_path / "in"), tmp_path / "out")
    assert table["object"].tolist() == ["cityscape", "portrait"]
    assert table["style"].tolist() == ["abstract expressionism", "baroque"]
    assert set(table["split"]) == {"train"}  # the first of each pair; the next would be holdout
    reasons = list(_rejected(tmp_path / "out").values())
    assert reasons[0] == "has no style"
    assert "more than one label" in reasons[1]
    assert reasons[2] == "has no label"


def test_a_folder_with_a_table_keeps_its_own_captions(tmp_path: Path) -> None:
    rows = [
        {"file_name": f"{i}.png", "object": "Rex", "text": f"my dog Rex, picture {i}", "subject": "s1"}
        for i in range(3)
    ]
    for i in range(3):
        _save(tmp_path / "in" / f"{i}.png", "cat", i)
    (tmp_path / "in/metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    table = _take(folder(tmp_path / "in"), tmp_path / "out")
    assert table["caption"].tolist() == [row["text"] for row in rows]
    assert set(table["subject"]) == {"s1"}
    assert load_templates(tmp_path / "out") is None


def test_class_folders_may_lie_under_splits(tmp_path: Path) -> None:
    for part in ("train", "test"):
        _save(tmp_path / "in" / part / "Cat" / "1.jpg")
    table = _take(folder(tmp_path / "in"), tmp_path / "out")
    assert dict(zip(table["image_id"], table["split"], strict=True)) == {
        "train/Cat/1": "train",
        "test/Cat/1": "holdout",
    }


def test_two_processes_write_what_one_writes(tmp_path: Path) -> None:
    for i in range(140):
        _save(tmp_path / "in" / "cat" / f"{i}.jpg", "cat", i)
    _take(folder(tmp_path / "in"), tmp_path / "one")
    for _ in build(tmp_path / "two", folder(tmp_path / "in"), size=64, added_at=NOW, workers=2):
        pass
    assert (tmp_path / "one/catalog.parquet").read_bytes() == (tmp_path / "two/catalog.parquet").read_bytes()


def test_what_was_deleted_does_not_come_back(tmp_path: Path) -> None:
    for i in range(6):
        _save(tmp_path / "in" / "cat" / f"{i}.jpg", "cat", i)
    _take(folder(tmp_path / "in"), tmp_path / "out")
    gone = tmp_path / "out/pictures/cat/3.png"
    assert gone.is_file()
    assert delete(tmp_path / "out", image_ids=["cat/3"], subjects=[], at=NOW) == 1
    assert not gone.exists()
    assert "cat/3" not in set(load_catalog(tmp_path / "out")["image_id"])
    with pytest.raises(ConfigError, match="holds none"):
        delete(tmp_path / "out", image_ids=["cat/3"], subjects=[], at=NOW)
    (tmp_path / "in/cat/3.jpg").rename(tmp_path / "in/cat/another.jpg")
    _save(tmp_path / "in/cat/new.jpg", "horse")
    for _ in add(tmp_path / "out", folder(tmp_path / "in"), size=64, added_at=NOW, workers=1):
        pass
    assert "deleted" in _rejected(tmp_path / "out")["cat/another.jpg"]
    assert "cat/new" in set(load_catalog(tmp_path / "out")["image_id"])
    assert sum(batch.num_rows for batch in stream_table(tmp_path / "out")) == 7


def test_a_deleted_picture_goes_with_its_copies_and_comes_back_in_no_form(tmp_path: Path) -> None:
    """Copies under other names, and the same photograph saved again: in the catalog, and among what is added later."""
    for i in range(5):
        _save(tmp_path / "in/cat" / f"{i}.jpg", "cat", i)
        _save(tmp_path / "in/horse" / f"{i}.jpg", "horse", i)
    copies = ("0 copy.jpg", "0_small.jpg")
    shutil.copy(tmp_path / "in/cat/0.jpg", tmp_path / "in/cat" / copies[0])
    with Image.open(tmp_path / "in/cat/0.jpg") as image:
        image.save(tmp_path / "in/cat" / copies[1], quality=60)
        (tmp_path / "more/cat").mkdir(parents=True)
        image.save(tmp_path / "more/cat/again.png")
    shutil.copy(tmp_path / "in/cat" / copies[1], tmp_path / "more/cat/small.jpg")
    _save(tmp_path / "more/cat/new.jpg", "cat", 7)
    _take(folder(tmp_path / "in"), tmp_path / "out")
    before, sheet = set(load_catalog(tmp_path / "out")["image_id"]), (tmp_path / "out/sheet.png").read_bytes()
    assert delete(tmp_path / "out", image_ids=["cat/0"], subjects=[], at=NOW) == 3
    assert before - set(load_catalog(tmp_path / "out")["image_id"]) == {"cat/0", "cat/0 copy", "cat/0_small"}
    assert (tmp_path / "out/sheet.png").read_bytes() != sheet, "the sheet showed it"
    for _ in add(tmp_path / "out", folder(tmp_path / "more"), size=64, added_at=NOW, workers=1):
        pass
    refused = {name: reason for name, reason in _rejected(tmp_path / "out").items() if "deleted" in reason}
    assert set(refused) == {"cat/again.png", "cat/small.jpg"}
    assert "cat/new" in set(load_catalog(tmp_path / "out")["image_id"])


def test_a_deletion_that_was_cut_off_is_gone_on_with(tmp_path: Path) -> None:
    for i in range(4):
        _save(tmp_path / "in/cat" / f"{i}.jpg", "cat", i)
    _take(folder(tmp_path / "in"), tmp_path / "out")
    mark(tmp_path / "out", ["cat/2"], at=NOW)
    assert (tmp_path / "out/pictures/cat/2.png").is_file()
    assert delete(tmp_path / "out", image_ids=["cat/2"], subjects=[], at=NOW) == 1
    assert not (tmp_path / "out/pictures/cat/2.png").exists()


def test_adding_keeps_the_catalogs_sentences_and_what_was_set_aside(tmp_path: Path) -> None:
    for style in ("Pop_Art", "Seed_Images"):
        _save(tmp_path / "canvas" / style / "Cats/1.jpg", "cat")
    (tmp_path / "canvas/Pop_Art/Cats/2.jpg").write_bytes(b"")
    _save(tmp_path / "more/horse/1.jpg", "horse")
    (tmp_path / "more/horse/2.jpg").write_bytes(b"x")
    _take(unlearncanvas(tmp_path / "canvas"), tmp_path / "out")
    templates = load_templates(tmp_path / "out")
    assert templates != folder(tmp_path / "more").templates
    for _ in add(tmp_path / "out", folder(tmp_path / "more"), added_at=NOW, workers=1):
        pass
    assert load_templates(tmp_path / "out") == templates
    table = load_catalog(tmp_path / "out")
    assert table.set_index("image_id")["caption"]["horse/1"] == "a horse image in photo style."
    assert set(table["width"]) == {64}
    assert set(_rejected(tmp_path / "out")) == {"Pop_Art/Cats/2.jpg", "horse/2.jpg"}
    _save(tmp_path / "more/horse/2.jpg", "horse", 2)
    for _ in add(tmp_path / "out", folder(tmp_path / "more"), added_at=NOW, workers=1):
        pass
    assert "horse/2" in set(load_catalog(tmp_path / "out")["image_id"])
    assert set(_rejected(tmp_path / "out")) == {"Pop_Art/Cats/2.jpg", "horse/1.jpg"}
    with pytest.raises(DataError, match=r"are 64 x 64: got --size 32"):
        next(add(tmp_path / "out", folder(tmp_path / "more"), size=32, added_at=NOW))
    _take(folder(tmp_path / "more"), tmp_path / "photos")
    with pytest.raises(DataError, match="name no style"):
        next(add(tmp_path / "photos", unlearncanvas(tmp_path / "canvas"), added_at=NOW))


# Bad pictures: one good one beside each; the bad one is set aside with a reason.


def _raw(content: bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.write_bytes(content)

    return make


def _image(mode: str, size: tuple[int, int] = (40, 40), **options: Any) -> Callable[[Path], None]:
    return lambda path: Image.new(mode, size).save(path, **options)


def _png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return start + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


def _frames(path: Path) -> None:
    frames = [Image.new("RGB", (40, 40), color) for color in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def _cut(length: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        _picture("cat").save(path)
        os.truncate(path, length)

    return make


def _link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


BAD_PICTURES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "truncated jpeg": ("b.jpg", _raw(_jpeg()[:900]), "does not decode"),
    "jpeg header alone": ("b.jpg", _raw(_jpeg()[:20]), "unknown format|does not decode"),
    "zero bytes": ("b.jpg", _raw(b""), "0 bytes"),
    "text": ("b.jpg", _raw(b"hello"), "unknown format"),
    "html": ("b.png", _raw(b"<html>404</html>"), "unknown format"),
    "noise": ("b.png", _raw(bytes(range(256)) * 8), "unknown format"),
    "png without pixels": ("b.png", _raw(_png_header(40, 40)), "does not decode"),
    "png of 20 000 pixels a side": ("b.png", _raw(_png_header(20_000, 20_000)), "at most|too large"),
    "png of 2 000 000 pixels a side": ("b.png", _raw(_png_header(2_000_000, 2_000_000)), "too large|at most"),
    "png with damaged header": ("b.png", _raw(_png_header(40, 40)[:25] + b"xxxxxxxx"), "does not decode|unknown"),
    "one pixel": ("b.png", _image("RGB", (1, 1)), "at least 16"),
    "a line": ("b.png", _image("RGB", (4000, 3)), "at least 16"),
    "animated gif": ("b.gif", _frames, "2 frames"),
    "tiff of two pages": ("b.tif", _frames, "2 frames"),
    "animated webp": ("b.webp", _frames, "2 frames"),
    "floating point tiff": ("b.tif", _image("F"), "floating-point"),
    "truncated png": ("b.png", _cut(3000), "does not decode"),
    "truncated tiff": ("b.tif", _cut(900), "decode|unknown"),
    "svg": ("b.svg", _raw(b"<svg/>"), "no picture by its name"),
    "pdf": ("b.pdf", _raw(b"%PDF"), "no picture by its name"),
    "pickle": ("b.pkl", _raw(b"\x80\x04."), "no picture by its name"),
    "no suffix": ("b", _raw(_jpeg()), "no picture by its name"),
    "link out of the folder": ("b.jpg", _link("/etc/hostname"), "link that leaves"),
    "link to nowhere": ("b.jpg", _link("nowhere.jpg"), "link that leaves"),
    "link to itself": ("b.jpg", _link("b.jpg"), "link that leaves"),
    "pipe": ("b.jpg", os.mkfifo, "no regular file"),
    "name with a backslash": ("b\\c.jpg", _raw(_jpeg()), "not UTF-8|control"),
    "name with a newline": ("b\nc.jpg", _raw(_jpeg()), "control"),
    "name that is not UTF-8": (os.fsdecode(b"b\xff\xfe.jpg"), _raw(_jpeg()), "UTF-8"),
    "very long name": ("b" * 210 + ".jpg", _raw(_jpeg()), "longer than 200"),
}


@pytest.mark.parametrize("case", BAD_PICTURES)
def test_a_bad_picture_is_set_aside_with_its_reason(case: str, tmp_path: Path) -> None:
    name, make, reason = BAD_PICTURES[case]
    _save(tmp_path / "in/cat/a.jpg")
    make(tmp_path / "in/cat" / name)
    table = _take(folder(tmp_path / "in"), tmp_path / "out")
    assert table["image_id"].tolist() == ["cat/a"]
    (entry,) = read_json(tmp_path / "out/rejected.json")["rejected"]
    assert re.search(reason, entry["reason"]), entry
    assert [path.name for path in (tmp_path / "out/pictures").rglob("*.png")] == ["a.png"]


GOOD_MODES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "cmyk": ("a.jpg", _image("CMYK")),
    "16 bits": ("a.png", lambda p: Image.fromarray(np.full((40, 40), 40_000, np.uint16)).save(p)),
    "gray": ("a.png", _image("L")),
    "one bit": ("a.png", _image("1")),
    "palette": ("a.gif", _image("P")),
    "clear": ("a.png", _image("RGBA")),
    "gray and clear": ("a.png", _image("LA")),
    "lab": ("a.tif", _image("LAB")),
    "upper case suffix": ("a.JPG", _raw(_jpeg())),
}


@pytest.mark.parametrize("case", GOOD_MODES)
def test_other_modes_become_rgb(case: str, tmp_path: Path) -> None:
    name, make = GOOD_MODES[case]
    (tmp_path / "in/cat").mkdir(parents=True)
    make(tmp_path / "in/cat" / name)
    table = _take(folder(tmp_path / "in"), tmp_path / "out")
    with Image.open(tmp_path / "out" / table["path"][0]) as image:
        assert image.mode == "RGB"
        assert image.size == (64, 64)
        values = np.asarray(image)
    if case == "16 bits":
        assert abs(int(values.mean()) - 40_000 // 257) <= 1
    if "clear" in case:
        assert (values == 255).all()


BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "no label": ({"file_name": "b.jpg", "object": None}, "no label"),
    "label not a number": ({"file_name": "b.jpg", "object": float("nan")}, "no label"),
    "label of blanks": ({"file_name": "b.jpg", "object": "  "}, "no label"),
    "label a list": ({"file_name": "b.jpg", "object": ["cat"]}, "no label"),
    "label with control characters": ({"file_name": "b.jpg", "object": "c\x00at"}, "no readable text"),
    "label very long": ({"file_name": "b.jpg", "object": "cat" * 100}, "longer than 200"),
    "no file name": ({"object": "cat"}, "no file_name"),
    "upwards": ({"file_name": "../b.jpg", "object": "cat"}, "leaves the folder"),
    "upwards in the middle": ({"file_name": "x/../../b.jpg", "object": "cat"}, "leaves the folder"),
    "absolute": ({"file_name": "/etc/hostname", "object": "cat"}, "leaves the folder"),
    "missing": ({"file_name": "none.jpg", "object": "cat"}, "is missing"),
    "a folder": ({"file_name": ".", "object": "cat"}, "no regular file|leaves|empty part"),
    "same row twice": ({"file_name": "a.jpg", "object": "cat"}, "is taken"),
    "same id twice": ({"file_name": "b.jpg", "object": "cat", "image_id": "a"}, "is taken"),
    "id upwards": ({"file_name": "b.jpg", "object": "cat", "image_id": "../../b"}, "leaves the folder"),
    "id absolute": ({"file_name": "b.jpg", "object": "cat", "image_id": "/b"}, "leaves the folder"),
    "unknown split": ({"file_name": "b.jpg", "object": "cat", "split": "dev7"}, "unknown split"),
    "caption without the concept": ({"file_name": "b.jpg", "object": "cat", "text": "a dog"}, "does not mention"),
    "no caption beside captions": ({"file_name": "b.jpg", "object": "cat", "text": ""}, "has no caption"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_set_aside_with_its_reason(case: str, tmp_path: Path) -> None:
    row, reason = BAD_ROWS[case]
    good = {"file_name": "a.jpg", "object": "cat", "image_id": "a"}
    if "text" in row:
        good["text"] = "a cat"
    if case == "same row twice":
        row = dict(good)
    for name in {"a.jpg", row.get("file_name")} & {"a.jpg", "b.jpg"}:  # a picture that no row names is set aside too
        _save(tmp_path / "in" / name)
    (tmp_path / "in/metadata.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    table = _take(folder(tmp_path / "in"), tmp_path / "out")
    assert table["image_id"].tolist() == ["a"]
    (entry,) = read_json(tmp_path / "out/rejected.json")["rejected"]
    assert re.search(reason, entry["reason"]), entry


def _write(name: str, content: str | bytes) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def _without(name: str) -> Callable[[Path], None]:
    return lambda root: (_sun(root) / name).unlink()


def _short_votes(root: Path) -> None:
    savemat(_sun(root) / "attributeLabels_continuous.mat", {"labels_cv": np.zeros((2, 2))})


def _other_variable(root: Path) -> None:
    savemat(_sun(root) / "images.mat", {"pictures": np.zeros((2, 2))})


BAD_SETS: dict[str, tuple[Callable[[Path], PictureSet], Callable[[Path], None], str]] = {
    "empty folder": (folder, lambda root: None, "holds no folders"),
    "empty csv": (folder, _write("metadata.csv", ""), "holds no rows"),
    "csv without labels": (folder, _write("metadata.csv", "file_name\na.jpg\n"), "lacks the columns object"),
    "csv without files": (folder, _write("metadata.csv", "object\ncat\n"), "lacks the columns file_name"),
    "csv in latin 1": (folder, _write("metadata.csv", "file_name,object\na.jpg,ch\xe9\n".encode("latin-1")), "UTF-8"),
    "jsonl of half a line": (folder, _write("metadata.jsonl", '{"file_name": "a'), "metadata.jsonl cannot be read"),
    "jsonl of lists": (folder, _write("metadata.jsonl", "[1]\n"), "line 1: expected a JSON object"),
    "every row bad": (folder, _write("metadata.csv", "file_name,object\nnone.jpg,cat\n"), "Not one picture.*missing"),
    "empty class folder": (folder, lambda root: (root / "cat").mkdir(), "Not one picture"),
    "canvas without objects": (unlearncanvas, _write("Oil/1.jpg", b"x"), "holds no folders"),
    "seed images in lower case": (unlearncanvas, _write("seed_images/Cats/1.jpg", b"x"), "letter by letter"),
    "imagenette without val": (imagenette, _write("train/n01440764/1.JPEG", b"x"), "val is missing"),
    "imagenette in upper case": (imagenette, _write("Train/n01440764/1.JPEG", b"x"), "train is missing"),
    "lfw without persons": (lfw, _write("a.jpg", b"x"), "holds no folders.*found a.jpg"),
    "breeds without folders": (breeds, _write("a.jpg", b"x"), "holds no folders"),
    "sun without images.mat": (sun, _without("images.mat"), "images.mat is missing"),
    "sun without attributes.mat": (sun, _without("attributes.mat"), "attributes.mat is missing"),
    "sun without votes": (sun, _without("attributeLabels_continuous.mat"), "Labels_continuous.mat is missing"),
    "sun with other votes": (sun, _short_votes, "expected 2 images x 3 attributes"),
    "sun with another variable": (sun, _other_variable, "holds no variable 'images'"),
    "sun with a damaged table": (
        sun,
        lambda root: _write("images.mat", b"MATLAB 5.0 nonsense" * 20)(_sun(root)),
        "images.mat is no MATLAB table",
    ),
    "no tar": (webdataset, lambda root: None, "holds no tar files"),
    "a tar of text": (webdataset, _write("0.tar", "no tar at all"), "0.tar: is no whole tar file"),
    "half a tar": (
        webdataset,
        lambda root: os.truncate(_tar(root / "0.tar", {"0.jpg": _jpeg(), "0.cls": b"cat"}), 2000),
        "0.tar: is no whole tar file",
    ),
}


@pytest.mark.parametrize("case", BAD_SETS)
def test_a_broken_set_is_refused_and_leaves_nothing(case: str, tmp_path: Path) -> None:
    opened, make, message = BAD_SETS[case]
    (tmp_path / "in").mkdir()
    make(tmp_path / "in")
    with pytest.raises(FadeError, match=message):
        _take(opened(tmp_path / "in"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_every_kind_of_set_meets_a_broken_one() -> None:
    own = {hub, wide_canvas}  # whose tests are elsewhere
    assert {opened for opened, _, _ in BAD_SETS.values()} == set(KINDS.values()) - own


def test_strict_refuses_what_would_be_set_aside(tmp_path: Path) -> None:
    _save(tmp_path / "in/cat/a.jpg")
    (tmp_path / "in/cat/b.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"1 pictures cannot be taken in: cat/b.jpg: is empty"):
        _take(folder(tmp_path / "in"), tmp_path / "out", strict=True)
    assert not (tmp_path / "out").exists()


def _splits_of(out: Path, **asked: Any) -> dict[str, Any]:
    folder_ = out.parent / "erasure"
    spec = make_spec(
        concept="cat",
        kind="object",
        surrogate="horse",
        base="b",
        base_sha256="0" * 64,
        catalog=str(out),
        judges="j",
        **asked,
    )
    save_spec(spec, folder_)
    split(folder_)
    return {name: pd.read_parquet(folder_ / "splits" / f"{name}.parquet") for name in ("forget", "retain")}


def test_a_copy_of_a_picture_to_forget_is_kept_out_of_the_retain_set(tmp_path: Path) -> None:
    for name in ("cat", "horse", "coffee"):
        for i in range(6):
            _save(tmp_path / "in" / name / f"{i}.jpg", name, i)
    _picture("cat", 2).save(tmp_path / "in/coffee/copy.jpg", quality=40)
    _picture("cat", 2).save(tmp_path / "in/cat/2.jpg")
    _take(folder(tmp_path / "in"), tmp_path / "out")
    many = {"forget_per_pair": 9, "retain_per_pair": 9, "holdout_per_pair": 1}
    retain = _splits_of(tmp_path / "out", split=many)["retain"]
    assert "coffee/0" in set(retain["image_id"])
    assert "coffee/copy" not in set(retain["image_id"])
    chosen = _splits_of(tmp_path / "out", split=many, image_ids=("cat/0", "cat/1"))
    assert set(chosen["forget"]["image_id"]) == {"cat/0", "cat/1"}
    with pytest.raises(DataError, match="holds no picture cat/99"):
        _splits_of(tmp_path / "out", split=many, image_ids=("cat/99",))
