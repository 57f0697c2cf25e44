"""Tables as people save them: dialects, encodings, columns, splits; nothing is guessed and nothing vanishes unsaid."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fade.data.catalog import load_catalog, load_templates
from fade.data.intake import build
from fade.data.loaders.folder import folder
from fade.errors import DataError
from fade.files import read_json

ROWS = [("a.png", "cat", "a cat in a café"), ("b.png", "cat", 'a "big" cat'), ("c.png", "horse", "a horse")]


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(list(path.as_posix().encode())).integers(0, 255, (20, 20, 3), np.uint8)
    Image.fromarray(noise).save(path)
    return path


def pictures(root: Path, *names: str) -> Path:
    for name in names or tuple(name for name, _, _ in ROWS):
        picture(root / name)
    return root


def taken(root: Path, *, domain: str = "object") -> tuple[pd.DataFrame, dict[str, str]]:
    out = root.with_name("out")
    list(build(out, folder(root, domain=domain), workers=1))
    aside = {one["name"]: one["reason"] for one in read_json(out / "rejected.json")["rejected"]}
    return load_catalog(out), aside


def table(delimiter: str = ",", header: tuple[str, ...] = ("file_name", "label", "text"), end: str = "\n") -> str:
    def quoted(cell: str) -> str:
        return '"' + cell.replace('"', '""') + '"' if {'"', delimiter} & set(cell) else cell

    return "".join(delimiter.join(map(quoted, row)) + end for row in (header, *ROWS))


SAVED: dict[str, bytes] = {
    "semicolons with a mark": table(";").encode("utf-8-sig"),
    "tabs of a spreadsheet": table("\t", end="\r\n").encode("utf-16"),
    "big-endian": b"\xfe\xff" + table().encode("utf-16-be"),
    "of four bytes": table("|").encode("utf-32"),
    "a first line for a spreadsheet": ("sep=;\r\n" + table(";", end="\r\n")).encode(),
    "other case and blanks": table(header=("File Name", " LABEL", "Text ")).encode(),
    "another word for the file": table(header=("filename", "Object", "Caption")).encode(),
    "blanks after commas": table().replace(",", ", ").encode(),
    "columns and rows left empty": (table().replace("\n", ",,\n") + "\n,,\n").encode(),
    "paths of another system": table().replace("a.png", ".\\a.png").encode(),
    "names in other case": table().replace("a.png", "A.PNG").encode(),
}


@pytest.mark.parametrize("how", SAVED)
def test_a_table_says_the_same_however_it_was_saved(how: str, tmp_path: Path) -> None:
    root = pictures(tmp_path / "in")
    assert SAVED[how] != table().encode()
    (root / "metadata.csv").write_bytes(SAVED[how])
    found, aside = taken(root)
    assert list(zip(found["image_id"] + ".png", found["object"], found["caption"], strict=True)) == [
        (name.replace(".png", ".png.png"), label, text) for name, label, text in ROWS
    ]
    assert aside == {}
    assert load_templates(tmp_path / "out") is None


def test_a_text_with_an_unquoted_comma_costs_its_row_and_says_so(tmp_path: Path) -> None:
    root = pictures(tmp_path / "in")
    (root / "metadata.csv").write_text(table().replace("a horse", "a horse, seen from above"))
    found, aside = taken(root)
    assert found["object"].tolist() == ["cat", "cat"]
    assert aside == {"c.png": "line 4 of metadata.csv has 4 cells, the header 3: put texts that hold ',' in quotes"}


REFUSED: dict[str, tuple[bytes, str]] = {
    "another encoding": (table().encode("cp1252"), "Save it as UTF-8"),
    "no mark": (table().encode("utf-16-le"), "no mark of UTF-16.*UTF-8"),
    "half a letter": (table().encode("utf-16")[:-1], "cannot be read"),
    "a column twice": (table(header=("file_name", "label", "Label ")).encode(), "names a column twice: label"),
    "a quote that never ends": (table().replace("a horse", '"a horse').encode(), r"cannot be read \(line 4: "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_table_that_cannot_be_told_is_refused(case: str, tmp_path: Path) -> None:
    content, reason = REFUSED[case]
    root = pictures(tmp_path / "in")
    (root / "metadata.csv").write_bytes(content)
    with pytest.raises(DataError, match=reason):
        folder(root)


def test_two_tables_for_the_same_pictures_are_refused(tmp_path: Path) -> None:
    root = pictures(tmp_path / "in")
    (root / "metadata.csv").write_text(table())
    (root / "Metadata.JSONL").write_text("{}")
    with pytest.raises(DataError, match=r"Metadata.JSONL, metadata.csv: keep one"):
        folder(root)


def _split_sets(root: Path, place: str, rows: bool) -> None:
    """Two splits, each with its own table; with labels in the table, or in class folders."""
    for split in ("train", "test"):
        lines = []
        for name in ("cat", "horse"):
            for number in range(2):
                file = place.format(name=name, number=number)
                picture(root / split / file)
                row = {"file_name": file, "text": f"a {name} that stands, {split} {number}"}
                lines.append(json.dumps(row | ({"label": name} if rows else {})))
        (root / split / "metadata.jsonl").write_text("\n".join(lines))


@pytest.mark.parametrize(("place", "rows"), [("{name}{number}.png", True), ("{name}/{number}.png", False)])
def test_a_table_in_each_split_is_read_and_keeps_its_captions(place: str, rows: bool, tmp_path: Path) -> None:
    _split_sets(tmp_path / "in", place, rows)
    found, aside = taken(tmp_path / "in")
    assert aside == {}
    assert found.groupby(["object", "split"]).size().to_dict() == {
        (name, split): 2 for name in ("cat", "horse") for split in ("train", "holdout")
    }
    assert set(found["caption"]) == {
        f"a {name} that stands, {split} {i}" for name in ("cat", "horse") for split in ("train", "test") for i in (0, 1)
    }
    assert load_templates(tmp_path / "out") is None


def test_a_table_of_columns_is_read_as_one_of_lines(tmp_path: Path) -> None:
    root = pictures(tmp_path / "in")
    pd.DataFrame(ROWS, columns=["file_name", "label", "text"]).to_parquet(root / "metadata.parquet")
    found, aside = taken(root)
    assert found["caption"].tolist() == [text for _, _, text in ROWS]
    assert aside == {}


@pytest.mark.parametrize("domain", ["object", "person"])
def test_pictures_that_no_table_names_are_said(domain: str, tmp_path: Path) -> None:
    root = pictures(tmp_path / "in", "Ann/0.png", "Ann/1.png", "Bo/0.png", "Bo/1.png", "loose.png")
    (root / "metadata.csv").write_text("file_name,label\nAnn/0.png,Ann\nBo/0.png,Bo\n")
    (root / "readme.txt").write_text("about these pictures")
    found, aside = taken(root, domain=domain)
    assert found["object"].tolist() == ["Ann", "Bo"]
    assert len(aside) == 3
    assert set(aside.values()) == {"no row of metadata.csv names it"}
    assert ("Ann/1.png" in aside) == (domain == "object")
    assert domain == "object" or not any("Ann" in name for name in aside)


def test_pictures_outside_of_class_folders_are_said_and_what_systems_add_is_no_class(tmp_path: Path) -> None:
    root = pictures(tmp_path / "in", "train/cat/0.png", "test/cat/0.png", "train/loose.png", "loose.png")
    pictures(root, "__MACOSX/train/cat/0.png", "train/@eaDir/0.png", "train/cat/@eaDir/0.png", "train/cat/._0.png")
    found, aside = taken(root)
    assert dict(zip(found["image_id"], found["split"], strict=True)) == {
        "test/cat/0.png": "holdout",
        "train/cat/0.png": "train",
    }
    assert set(found["object"]) == {"cat"}
    assert set(aside) == {"loose.png", "train/loose.png"}


def test_a_set_of_a_part_called_train_alone_keeps_some_pictures_back(tmp_path: Path) -> None:
    root = pictures(tmp_path / "in", *(f"train/{name}/{i}.png" for name in ("cat", "dog") for i in range(3)))
    found, _ = taken(root)
    assert found.groupby(["object", "split"]).size().to_dict() == {
        (name, split): count for name in ("cat", "dog") for split, count in (("train", 2), ("holdout", 1))
    }


def test_a_picture_with_two_labels_is_nobodys_and_one_named_twice_is_taken_once(tmp_path: Path) -> None:
    root = pictures(tmp_path / "in")
    rows = ["file_name,label", "a.png,cat", "a.png,Cat ", "b.png,cat", "b.png,horse", "c.png,horse"]
    (root / "metadata.csv").write_text("\n".join(rows))
    found, aside = taken(root)
    assert dict(zip(found["image_id"], found["object"], strict=True)) == {"a.png": "cat", "c.png": "horse"}
    assert "2 different labels" in aside["b.png"]
    assert "is taken" in aside["a.png"]


def test_a_file_is_found_in_whatever_form_its_name_is_written(tmp_path: Path) -> None:
    stored, written = (unicodedata.normalize(form, "café") for form in ("NFD", "NFC"))
    assert stored != written
    root = pictures(tmp_path / "in", f"{stored}.png", "b.png")
    (root / "metadata.csv").write_text(f"file_name,label\n{written}.png,cat\nB.PNG,horse\n")
    found, aside = taken(root)
    assert found["object"].tolist() == ["cat", "horse"]
    assert found["image_id"].tolist() == [f"{written}.png", "b.png"]
    assert aside == {}


def test_one_folder_for_all_pictures_is_no_label(tmp_path: Path) -> None:
    root = pictures(tmp_path / "in", "images/a.png", "images/b.png")
    (root / "metadata.csv").write_text("file_name,text\nimages/a.png,a cat\nimages/b.png,a horse\n")
    with pytest.raises(DataError, match="lacks the columns object"):
        folder(root)
