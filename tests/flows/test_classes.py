"""Class-wise protocols on small sets in their published layouts: trained judges, counted figures, resumed runs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from fade.data.catalog import load_concepts
from fade.data.intake import build
from fade.errors import ConfigError, DataError
from fade.evaluation.judges import load_judge
from fade.steps.catalog import open_set
from flows.cli.app import app
from flows.studies.classes import class_summary, judges_for, plan_classes
from tasks import trials
from tests.layouts import LAYOUTS
from tests.tiny import JUDGES, PROJECT
from tests.unit.data.test_loaders import NOW

BASE = "data/base/canvas"
KINDS = ("imagenette", "lfw", "breeds", "sun")


def catalog_of(kind: str, folder: Path) -> Path:
    out = folder / f"of-{kind}"
    for _ in build(out, open_set(kind, LAYOUTS[kind].make(folder / "set")), size=64, added_at=NOW, workers=1):
        pass
    return out


def judges_of(catalog: Path) -> Path:
    out, training = judges_for(catalog, JUDGES)
    for _ in training:
        pass
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_every_class_of_a_set_is_planned_with_judges_of_its_pictures(
    kind: str, workspace: Path, tmp_path: Path
) -> None:
    catalog = catalog_of(kind, tmp_path)
    classes = [one.name for one in load_concepts(catalog).values() if one.kind == "object"]
    assert len(classes) >= 2
    judges = judges_of(catalog)
    assert set(load_judge(judges, "report").objects) == {*classes, "scrambled"}
    protocol = plan_classes(PROJECT.at(catalog=str(catalog), judges=str(judges)), None, pictures=7)
    assert [cell.spec.concept for cell in protocol.cells] == classes
    for cell in protocol.cells:
        request = cell.spec
        assert len(set(request.evaluate.seeds)) == 7
        assert request.evaluate.seeds[:5] == (188, 288, 588, 688, 888)
        assert request.gate.sure is None
        # Nobody's face stands in for another's.
        assert (request.surrogate == "nothing") == (kind == "lfw")
        assert request.person == (kind == "lfw")
    # What is trained is found again; a set with other pictures gets judges of its own.
    again, training = judges_for(catalog, JUDGES)
    assert again == judges
    assert list(training) == []
    assert judges_for(catalog, {**JUDGES, "threads": 2})[0] != judges


def test_judges_that_do_not_know_the_classes_are_refused(workspace: Path, tmp_path: Path) -> None:
    catalog = catalog_of("breeds", tmp_path)
    with pytest.raises(ConfigError, match=r"lacks 3 of the 4 concepts .*akita dog"):
        plan_classes(PROJECT.at(catalog=str(catalog)), None)
    with pytest.raises(DataError, match="No judge 'development'"):
        plan_classes(PROJECT.at(catalog=str(catalog), judges=str(tmp_path / "none")), None)
    with pytest.raises(ConfigError, match="Unknown concept 'poodle'"):
        plan_classes(PROJECT.at(catalog=str(catalog), judges=str(judges_of(catalog))), ["poodle"])


def test_the_summary_is_that_of_its_rows() -> None:
    rows: list[dict[str, Any]] = [
        {"ua": 1.0, "ua_count": 10, "base_ua": 0.1, "ira": 0.5, "ira_count": 40, "base_ira": 0.9},
        {"ua": 0.6, "ua_count": 10, "base_ua": 0.3, "ira": 0.9, "ira_count": 40, "base_ira": 0.9},
    ]
    found = class_summary(rows)
    assert found["classes"] == 2
    assert found["ua"] == pytest.approx(
        {"mean": 0.8, "worst": 0.6, "base": 0.2, "low": 0.5840, "high": 0.9193}, abs=1e-4
    )
    assert found["ira"]["mean"] == pytest.approx(0.7)
    with pytest.raises(DataError, match="0 classes"):
        class_summary([])


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "kind", ["lfw", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "lfw")]
)
def test_one_command_erases_a_class_judges_it_and_goes_on_where_it_was(
    kind: str, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without a process for the trial: that its rows are those of one is a sweep's test.
    here = SimpleNamespace(submit=lambda folder, **given: trials.trial.submit(folder, **{**given, "here": True}))
    monkeypatch.setattr("flows.studies.study.trial", here)
    catalog, file = catalog_of(kind, tmp_path), tmp_path / "found.json"
    forget = LAYOUTS[kind].concept
    asked = ["benchmark", "classes", "--catalog", str(catalog), "--base", BASE, "--forget", forget]
    asked += ["--pictures", "2", "--no-attack", "--set", "threads=1", "--json", str(file)]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    (row,) = found["rows"]
    assert row["concept"] == forget
    classes = [one.name for one in load_concepts(catalog).values() if one.kind == "object"]
    assert row["ua_count"] == 2
    assert row["ira_count"] == 2 * (len(classes) - 1)
    assert 0 <= found["judges"]["report"]["object_accuracy"] <= 1
    # The figures are those of what the judge called each picture.
    trial = workspace / "data/trials" / row["erasure"]
    samples = pd.read_parquet(trial / "evaluation/samples.parquet")
    named = samples["object"] == forget
    right = samples["report_after_object"] == samples["object"]
    assert row["ua"] == 1 - right[named].mean()
    assert row["ira"] == right[~named].mean()
    assert row["base_ira"] == (samples["report_before_object"] == samples["object"])[~named].mean()
    assert (workspace / found["folder"] / "classes.json").is_file()
    made = {path: path.stat().st_mtime_ns for path in (trial / "curve.csv", *Path("data/classifiers").glob("*/*"))}
    assert len(made) > 3
    assert CliRunner().invoke(app, asked).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in made} == made
