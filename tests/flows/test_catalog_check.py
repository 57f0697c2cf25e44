"""What `fade catalog check` finds before an erasure would."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from fade.data.catalog import scarce_concepts
from fade.data.intake import build
from fade.data.sets import Item, PictureSet
from fade.errors import DataError
from fade.files import read_json, write_json
from flows.cli.app import app
from tasks.expectations.validation import validate_catalog

LEAVES, PARTS = "one concept can be erased and others stay", "some pictures are to train on and some are held out"


def catalog(folder: Path, *shown: tuple[str, str], split: str | None = None, count: int = 3) -> Path:
    """Pictures of noise, some of each object and style."""
    draws = np.random.default_rng(len(shown))
    items = [
        Item(f"p{i}-{number}", f"p{i}-{number}", draws.integers(0, 255, (32, 32, 3), np.uint8), one, style, split=split)
        for i, (one, style) in enumerate(shown)
        for number in range(count)
    ]
    list(build(folder, PictureSet(items, "noise", person=True, domain="person"), workers=1))
    return folder


def test_a_catalog_of_one_concept_is_told_before_an_erasure(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{LEAVES} failed.*fade catalog add") as told:
        validate_catalog(catalog(tmp_path / "one", ("Ann Example", "photo")))
    assert "Ann" not in str(told.value)
    two_styles = validate_catalog(catalog(tmp_path / "styles", ("Ann Example", "photo"), ("Ann Example", "oil")))
    two_people = validate_catalog(catalog(tmp_path / "people", ("Ann Example", "photo"), ("Bo Example", "photo")))
    assert all(two_styles.values())
    assert all(two_people.values())
    assert LEAVES in two_people


def test_a_catalog_without_holdout_pictures_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{PARTS} failed"):
        validate_catalog(catalog(tmp_path / "out", ("cat", "photo"), ("dog", "photo"), split="train"))


def test_a_label_that_is_spelled_otherwise_than_its_concept_is_told(tmp_path: Path) -> None:
    out = catalog(tmp_path / "out", ("cat", "photo"), ("dog", "photo"))
    known = read_json(out / "concepts.json")
    known["concepts"][0]["name"] = "Cat"
    write_json(out / "concepts.json", known)
    with pytest.raises(DataError, match="objects are concepts of the catalog, spelled as they are there failed"):
        validate_catalog(out)


def test_concepts_of_one_picture_are_counted_and_not_named(tmp_path: Path) -> None:
    out = catalog(tmp_path / "out", ("Ann Example", "photo"), ("Bo Example", "photo"))
    assert scarce_concepts(out) == []
    out = catalog(tmp_path / "few", ("Ann Example", "photo"), ("Bo Example", "photo"), count=2)
    assert scarce_concepts(out) == ["Ann Example", "Bo Example"]
    result = CliRunner().invoke(app, ["catalog", "check", str(out)])
    assert result.exit_code == 0, result.output
    assert "2 concepts have fewer than two training pictures" in " ".join(result.output.split())
    assert "Example" not in result.output
