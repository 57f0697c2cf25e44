from __future__ import annotations

import io
import re
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fade.asking.prepare import prepare_spec
from fade.asking.tables import read_overwrite
from fade.config import load_settings
from fade.data.catalog import SCHEMA
from fade.data.pictures import prepare
from fade.data.sets import generated_by
from fade.errors import ConfigError, DataError
from fade.spec import load_spec, make_spec, save_spec
from fade.steps.split import split
from tasks.expectations.validation import validate
from tests.tiny import PROJECT


@pytest.fixture
def folder(workspace: Path, tmp_path: Path) -> Path:
    """An erasure's folder with splits, over a catalog that a test may damage."""
    shutil.copytree(workspace / "data/catalog/canvas", tmp_path / "catalog")
    spec = prepare_spec("astronaut", "cameraman", project=PROJECT, settings=load_settings(Path("params.yaml")))
    save_spec(make_spec(**{**spec.model_dump(), "catalog": str(tmp_path / "catalog")}), tmp_path / "erasure")
    split(tmp_path / "erasure")
    return tmp_path / "erasure"


def _change(folder: Path, name: str, **columns: object) -> None:
    path = folder / "splits" / f"{name}.parquet"
    table = pd.read_parquet(path)
    table.loc[table.index[0], list(columns)] = list(columns.values())
    table.to_parquet(path, index=False)


def test_good_splits_pass_with_pages_that_carry_no_values(folder: Path) -> None:
    held = validate(folder)
    assert len(held) > 50
    assert all(held.values())
    pages = list((folder / "docs").rglob("*.html"))
    assert any("validations" in str(page) for page in pages)
    for page in pages:  # opening one asks no other host for anything
        assert not re.search(r"""<(script|link|img)[^>]*(src|href)\s*=""", page.read_text()), page
    first = (folder / "docs/index.html").read_text()
    assert "all " in first
    assert "FAILS</td>" not in first
    sha256 = pd.read_parquet(folder / "splits/forget.parquet")["sha256"][0]
    assert not any(sha256 in page.read_text() for page in pages if "validations" in str(page))


def test_pictures_with_surrogates_of_their_own_pass_and_others_do_not(folder: Path, tmp_path: Path) -> None:
    first, second = pd.read_parquet(folder / "splits/forget.parquet")["image_id"][:2]
    table = tmp_path / "overwrite.csv"
    table.write_text(f"image_id,overwrite\n{first},admiral\n{second},nothing\n")
    spec = prepare_spec(
        "astronaut",
        "cameraman",
        project=PROJECT,
        settings=load_settings(Path("params.yaml")),
        overwrite=read_overwrite(table),
    )
    save_spec(make_spec(**{**spec.model_dump(), "catalog": str(tmp_path / "catalog")}), folder)
    _change(folder, "forget", surrogate_caption="a coffee image in oil style.")
    with pytest.raises(DataError, match="target captions mention the surrogate"):
        validate(folder)
    split(folder)
    targets = pd.read_parquet(folder / "splits/forget.parquet").set_index("image_id")["surrogate_caption"]
    assert "admiral" in targets[first]
    assert targets[second] == ""
    assert all(validate(folder).values())


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "image_id\n1\n", "lacks the column overwrite"),
        ("a.csv", "image_id,overwrite\n1,\n", "row 1 is not complete"),
        ("a.jsonl", '{"image_id": "1", "overwrite": "cat"}\n{"image_id": "1", "overwrite": "cat"}\n', "twice: 1"),
        ("a.json", "no table", "cannot be read as a table"),
    ],
)
def test_a_table_of_surrogates_is_checked(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=said):
        read_overwrite(tmp_path / name)


def test_a_corrupt_picture_stops_with_its_name(folder: Path) -> None:
    path = pd.read_parquet(folder / "splits/forget.parquet")["path"][0]
    picture = folder.parent / "catalog" / path
    picture.write_bytes(picture.read_bytes()[:100])
    with pytest.raises(DataError, match=rf"{path}: its hash differs.*index.html"):
        validate(folder)
    assert not (folder / "validation.json").exists()


def test_a_missing_picture_stops_with_its_name(folder: Path) -> None:
    path = pd.read_parquet(folder / "splits/retain.parquet")["path"][0]
    (folder.parent / "catalog" / path).unlink()
    with pytest.raises(DataError, match=f"{path}: missing"):
        validate(folder)


def test_a_picture_to_forget_among_those_to_retain_stops(folder: Path) -> None:
    forget = pd.read_parquet(folder / "splits/forget.parquet").iloc[0]
    _change(folder, "retain", sha256=forget["sha256"], path=forget["path"], image_id=forget["image_id"])
    with pytest.raises(DataError, match="forget: shares no picture with retain failed"):
        validate(folder)
    first = (folder / "docs/index.html").read_text()
    assert "FAILS</td><td>forget: shares no picture with retain" in first
    assert f"{forget['path']}: is to be forgotten and in the retain set" in first
    linked = re.findall(r'href="(validations/[^"]+)"', first)
    assert len(linked) == 5
    assert all((folder / "docs" / page).is_file() for page in linked)


def test_a_caption_without_the_concept_stops(folder: Path) -> None:
    _change(folder, "forget", caption="a picture of nobody")
    with pytest.raises(DataError, match="forget: captions mention the concept failed"):
        validate(folder)


def test_the_erased_concept_among_those_to_retain_stops(folder: Path) -> None:
    _change(folder, "retain", object="astronaut")
    with pytest.raises(DataError, match="retain: shows no erased object failed"):
        validate(folder)


def test_an_empty_split_stops(folder: Path) -> None:
    path = folder / "splits" / "holdout.parquet"
    pd.read_parquet(path).iloc[:0].to_parquet(path, index=False)
    with pytest.raises(DataError, match="holdout: is not empty failed"):
        validate(folder)


def test_a_missing_column_stops(folder: Path) -> None:
    path = folder / "splits" / "forget.parquet"
    pd.read_parquet(path).drop(columns=["licence"]).to_parquet(path, index=False)
    with pytest.raises(DataError, match="forget: has column licence failed"):
        validate(folder)


def _catalog_says(folder: Path, image_id: str, **columns: object) -> None:
    path = folder.parent / "catalog/catalog.parquet"
    rows = pq.read_table(path).to_pylist()
    changed = [row.update(columns) for row in rows if row["image_id"] == image_id]
    assert len(changed) == 1
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)


def _row(folder: Path, name: str) -> pd.Series:
    return pd.read_parquet(folder / "splits" / f"{name}.parquet").iloc[0]


def test_a_near_duplicate_among_those_to_retain_stops_with_its_name(folder: Path) -> None:
    kept, gone = _row(folder, "retain"), _row(folder, "forget")
    with Image.open(folder.parent / "catalog" / gone["path"]) as image:
        copy = io.BytesIO()
        image.save(copy, format="JPEG", quality=60)
    ready = prepare(copy.getvalue(), size=None)
    assert ready.sha256 != gone["sha256"]
    (folder.parent / "catalog" / kept["path"]).write_bytes(ready.content)
    _catalog_says(folder, kept["image_id"], sha256=ready.sha256, phash=ready.phash)
    _change(folder, "retain", sha256=ready.sha256)
    with pytest.raises(DataError, match=rf"forget: has no near-duplicate in retain failed.*{kept['path']}: a near-dup"):
        validate(folder)


def test_a_row_deleted_from_the_catalog_stops_with_its_name(folder: Path) -> None:
    kept = _row(folder, "holdout")
    _catalog_says(folder, kept["image_id"], deleted_at=datetime(2026, 1, 2, tzinfo=UTC))
    with pytest.raises(DataError, match=rf"holdout: holds no deleted picture failed.*{kept['path']}: deleted"):
        validate(folder)


def test_a_subject_to_forget_among_those_to_retain_stops_with_its_picture(folder: Path) -> None:
    kept = _row(folder, "retain")
    for one in (kept, _row(folder, "forget")):
        _catalog_says(folder, one["image_id"], subject="s1")
    with pytest.raises(DataError, match=rf"forget: shares no subject with retain failed.*{kept['path']}: shows a sub"):
        validate(folder)


def test_a_target_that_differs_in_more_than_the_concept_stops(folder: Path) -> None:
    row = _row(folder, "forget")
    other = row["surrogate_caption"].replace(row["style"], "oil" if row["style"] != "oil" else "neon")
    assert "cameraman" in other != row["surrogate_caption"]
    _change(folder, "forget", surrogate_caption=other)
    with pytest.raises(DataError, match="forget: captions and targets differ in the concept alone failed"):
        validate(folder)


def test_a_retain_set_of_one_object_or_of_many_pictures_of_a_pair_stops(folder: Path) -> None:
    path = folder / "splits/retain.parquet"
    whole = pd.read_parquet(path)
    whole[whole["object"] == "cat"].to_parquet(path, index=False)
    with pytest.raises(DataError, match="retain: shows at least half of the other objects failed"):
        validate(folder)
    whole.assign(style="oil").to_parquet(path, index=False)
    with pytest.raises(DataError, match="retain: no pair has more pictures than the settings say, retain: shows at l"):
        validate(folder)


def test_one_picture_is_no_forget_set_unless_it_was_asked_for(folder: Path) -> None:
    path = folder / "splits/forget.parquet"
    pd.read_parquet(path).iloc[:1].to_parquet(path, index=False)
    with pytest.raises(DataError, match="forget: has two pictures or more failed"):
        validate(folder)
    asked = load_spec(folder).model_copy(update={"image_ids": (_row(folder, "forget")["image_id"],)})
    save_spec(asked, folder)
    assert all(validate(folder).values())


def test_a_picture_that_the_base_drew_among_those_of_the_catalog_stops(folder: Path) -> None:
    _change(folder, "retain", source=generated_by(load_spec(folder).base_sha256))
    with pytest.raises(DataError, match="retain: says which pictures the base drew failed"):
        validate(folder)
