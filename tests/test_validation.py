from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest

from fade.config import load_settings, make_request, save_request
from fade.errors import DataError
from fade.steps.request import prepare_request
from fade.steps.split import split
from tasks._validation import validate


@pytest.fixture
def folder(workspace: Path, tmp_path: Path) -> Path:
    """An erasure's folder with splits, over a catalog that a test may damage."""
    shutil.copytree(workspace / "data/catalog/canvas", tmp_path / "catalog")
    request = prepare_request("astronaut", "cameraman", settings=load_settings(Path("params.yaml")))
    save_request(make_request(**{**request.model_dump(), "catalog": str(tmp_path / "catalog")}), tmp_path / "erasure")
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
    sha256 = pd.read_parquet(folder / "splits/forget.parquet")["sha256"][0]
    assert not any(sha256 in page.read_text() for page in pages if "validations" in str(page))


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
