"""DVC plots: the training of an erasure and the benchmarks' kept results, shown by the real command."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fade.files import read_json
from fade.lineage import ROOT
from tasks.dvc.versioning import root_pipeline, write_pipeline
from tests.tiny import plain_spec

CURVE = "step,forget_loss,retain_loss,gradient_norm,held_out\n1,0.5,0.1,1.0,\n2,0.25,0.1,1.0,\n3,0.2,0.1,1.0,0.4\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DVC project with the kept results and one erasure's curve."""
    monkeypatch.chdir(tmp_path)
    _dvc("init", "--no-scm", "-q")
    shutil.copytree(ROOT / "benchmarks/results", "benchmarks/results")
    for name in ("example", "e123"):
        Path("data/erasures", name).mkdir(parents=True)
        Path("data/erasures", name, "curve.csv").write_text(CURVE)
    return tmp_path


def _dvc(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "failed to load" not in done.stderr, done.stderr
    return done.stdout


def _points(shown: dict[str, Any], name: str) -> list[dict[str, Any]]:
    (plot,) = shown["data"][name]
    points: Any = plot["anchor_definitions"]["<DVC_METRIC_DATA>"]
    found: list[dict[str, Any]] = json.loads(points) if isinstance(points, str) else points
    return found


def test_the_projects_plots_show_training_and_benchmarks(project: Path) -> None:
    plots = root_pipeline()["plots"]
    Path("dvc.yaml").write_text(yaml.safe_dump({"plots": plots}, sort_keys=False))
    shown = json.loads(_dvc("plots", "show", "--json", "--split"))
    assert not shown.get("errors")
    names = [next(iter(plot)) for plot in plots]
    assert set(shown["data"]) == set(names)
    assert {"training", "erasures live at once", "concepts: drift and seconds"} <= set(names)
    # As many points as there are figures: of each curve one a step.
    assert len(_points(shown, "training")) == 2 * 3
    curve = read_json(ROOT / "benchmarks/results/sequence.json")["curve"]
    assert len(_points(shown, "erasures live at once")) == 3 * len(curve)
    rows = read_json(ROOT / "benchmarks/results/canvas.json")["rows"]
    found = sorted(float(point["drift"]) for point in _points(shown, "concepts: drift and seconds"))
    assert found == pytest.approx(sorted(row["drift"] for row in rows))
    page = Path(_dvc("plots", "show", "-o", "page").strip().removeprefix("file://"))
    assert page.read_text().count("vega") >= len(names)


def test_an_erasures_own_pipeline_plots_its_training(project: Path) -> None:
    folder = Path("data/erasures/e123")
    write_pipeline(folder, plain_spec())
    assert yaml.safe_load((folder / "dvc.yaml").read_text())["plots"] == [
        {
            "training": {
                "x": {"curve.csv": "step"},
                "y": {"curve.csv": ["forget_loss", "retain_loss"]},
                "y_label": "loss",
            }
        }
    ]
    shown = json.loads(_dvc("plots", "show", "--json", "--split"))
    (name,) = shown["data"]
    assert len(_points(shown, name)) == 2 * 3
    # What another tool made was not trained here.
    write_pipeline(folder, plain_spec(imported="0" * 64))
    assert yaml.safe_load((folder / "dvc.yaml").read_text())["plots"] == []
