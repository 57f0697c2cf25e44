"""Trials, sweeps, the benchmark and calibration on a tiny base: resumed, shared, counted, never half a result."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from fade.asking.prepare import prepare_spec
from fade.config import Gate, load_settings
from fade.errors import ConfigError, DataError
from fade.evaluation.tradeoff import means
from fade.evaluation.verdicts import Verdict
from fade.lineage import ROOT
from fade.spec import Spec, load_spec, save_spec
from fade.steps import saliency as saliency_step
from fade.steps.adapter import make_adapter
from fade.steps.mask import mask
from fade.steps.saliency import saliency
from fade.steps.split import split
from fade.studies import trial as trial_step
from fade.studies.trial import TRIALS, run_trial
from flows.cli.app import app
from flows.studies.calibrate import LADDER, _smallest, calibrate
from flows.studies.study import plan
from tasks.trials import trial
from tests.figures import evaluation, judged_figures
from tests.tiny import PROJECT, SETTINGS

pytestmark = pytest.mark.timeout(600)


def _request(**changes: object) -> Spec:
    settings = load_settings(Path("params.yaml"), changes=changes)
    return prepare_spec("astronaut", "cameraman", project=PROJECT, settings=settings)


def test_a_finished_trial_is_not_run_again_and_a_torn_one_goes_on(workspace: Path, tmp_path: Path) -> None:
    request, ran = _request(), []  # type: ignore[var-annotated]
    first = run_trial(request, attacks=["inversion"], root=tmp_path, say=ran.append)
    assert ran == ["split", "saliency", "mask", "distill", "evaluate", "attack-inversion"]
    assert first["adapter_bytes"] > 0
    assert 0 <= first["inversion"] <= 1
    ran.clear()
    assert run_trial(request, attacks=["inversion"], root=tmp_path, say=ran.append) == first
    assert ran == []
    (tmp_path / request.id / "evaluation").rename(tmp_path / "gone")
    again = run_trial(request, attacks=["inversion"], root=tmp_path, say=ran.append)
    assert ran == ["evaluate"]
    assert again == first


def test_trials_that_differ_in_density_alone_share_their_saliency(workspace: Path, tmp_path: Path) -> None:
    ran: list[str] = []
    few = run_trial(_request(**{"mask.density": 0.1}), root=tmp_path, say=ran.append)
    many = run_trial(_request(**{"mask.density": 0.9}), root=tmp_path, say=ran.append)
    assert ran.count("saliency") == 1
    assert few["adapter_bytes"] < many["adapter_bytes"]


def test_other_code_runs_a_trial_anew(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request, ran = _request(), []  # type: ignore[var-annotated]
    run_trial(request, root=tmp_path)
    monkeypatch.setattr(trial_step, "made_by", lambda *_: "other code")
    run_trial(request, root=tmp_path, say=ran.append)
    assert ran == ["split", "saliency", "mask", "distill", "evaluate"]


def _invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def test_a_sweep_has_a_row_for_each_erasure_a_table_and_a_picture(workspace: Path, tmp_path: Path) -> None:
    file = tmp_path / "sweep.json"
    asked = ["--concepts", "astronaut:cameraman,neon:photo", "--vary", "mask.density=0.2,0.8", "--seeds", "1,2"]
    _invoke("sweep", *asked, "--name", "S.0,1", "--parallel", "2", "--one-base", "--json", str(file))
    found = json.loads(file.read_text())
    assert len(found["rows"]) == 8
    assert len({row["adapter_sha256"] for row in found["rows"]}) == 8
    assert {row["mask.density"] for row in found["rows"]} == {0.2, 0.8}
    table = means(found["rows"], ["mask.density", "seed"])
    assert len(table) == 4
    assert table["erasures"].tolist() == [2, 2, 2, 2]
    assert (workspace / "data/studies/S.0,1/tradeoff.png").stat().st_size > 10_000
    assert "ua_worst" in (workspace / "data/studies/S.0,1/table.md").read_text()
    # Asked again, every trial is found on disk.
    written = {path: path.stat().st_mtime_ns for path in Path("data/trials").glob("*/curve.csv")}
    assert len(written) >= 8
    _invoke("sweep", *asked, "--name", "S.0,1", "--one-base", "--json", str(file))
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert json.loads(file.read_text())["rows"] == found["rows"]


@pytest.mark.slow
def test_a_sweep_on_one_base_has_the_rows_of_processes(workspace: Path, tmp_path: Path) -> None:
    file, rows = tmp_path / "sweep.json", []
    asked = ["sweep", "--concepts", "cat:horse,oil:photo", "--vary", "mask.density=0.3", "--json", str(file)]
    for more in ([], ["--one-base"]):
        shutil.rmtree(TRIALS, ignore_errors=True)
        _invoke(*asked, "--parallel", "2", *more)
        found = json.loads(file.read_text())["rows"]
        rows.append([{k: v for k, v in row.items() if not k.endswith(("seconds", "_mib"))} for row in found])
        logs = list(TRIALS.glob("*.log"))
        assert bool(logs) != bool(more), "a process of its own keeps a log, a thread has none"
    assert rows[0] == rows[1]
    for refused in (["--dask", "tcp://127.0.0.1:1"], ["--concepts", "cat", "--methods", "uce"]):
        command = [*asked, "--one-base"] if "--dask" in refused else ["benchmark", "canvas", "--one-base"]
        result = CliRunner().invoke(app, [*command, *refused])
        assert result.exit_code == 1
        assert "--one-base" in result.output


def test_one_failure_does_not_lose_the_others(workspace: Path, tmp_path: Path) -> None:
    file = tmp_path / "sweep.json"
    asked = ["--concepts", "astronaut:cameraman", "--vary", "distill.learning_rate=0.001,1.0e+30"]
    result = CliRunner().invoke(app, ["sweep", *asked, "--one-base", "--json", str(file)])
    assert result.exit_code == 1
    found = json.loads(file.read_text())
    assert [row["distill.learning_rate"] for row in found["rows"]] == [0.001]
    (reason,) = found["failures"].values()
    assert "must be finite" in reason


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--concepts", "astronaut:cameraman", "--vary", "mask.densty=0.1"], "mask.densty"),
        (["--concepts", "astronaut:cameraman", "--vary", "mask.density=2"], "mask.density"),
        (["--concepts", "astronaut:cameraman", "--vary", "mask.density"], "expected NAME=V1,V2"),
        (["--concepts", "astronaut:cameraman", "--vary", "mask.density=0.5,0.5"], "given twice"),
        (["--concepts", "astronout:cameraman", "--vary", "mask.density=0.5"], "astronaut"),
    ],
)
def test_a_wrong_sweep_is_refused_before_anything_runs(workspace: Path, arguments: list[str], said: str) -> None:
    before = set(Path("data/trials").glob("*"))
    result = CliRunner().invoke(app, ["sweep", *arguments])
    assert result.exit_code == 1
    assert said in result.output
    assert set(Path("data/trials").glob("*")) == before


def test_the_benchmark_writes_a_row_for_each_concept(workspace: Path, tmp_path: Path) -> None:
    file = tmp_path / "canvas.json"
    output = _invoke("benchmark", "canvas", "--concepts", "cat,oil", "--one-base", "--json", str(file))
    report = json.loads(file.read_text())
    asked = {"concept", "kind", "ua", "ira", "cra", "base_ira", "base_cra", "ua_low", "seconds", "adapter_bytes"}
    assert [row["concept"] for row in report["rows"]] == ["cat", "oil"]
    assert [row["kind"] for row in report["rows"]] == ["object", "style"]
    for row in report["rows"]:
        assert asked <= set(row)
        assert row["ua_low"] <= row["ua"]
        assert {"inversion", "base_inversion"} <= set(row)
    summary = report["summary"]
    assert summary["ua"]["mean"] == pytest.approx(sum(row["ua"] for row in report["rows"]) / 2)
    assert summary["ua"]["low"] <= summary["ua"]["mean"] <= summary["ua"]["high"]
    assert summary["ira"]["worst_loss"] >= summary["ira"]["mean_loss"]
    assert "inversion" in output
    assert not Path("benchmarks/results/canvas.json").exists()  # two concepts are not the benchmark


def test_halving_finds_what_a_search_from_below_finds() -> None:
    rungs = list(range(9))
    for least in range(10):
        asked: list[int] = []

        def passes(rung: int, least: int = least, asked: list[int] = asked) -> bool:
            asked.append(rung)
            return rung >= least

        expected = next((rung for rung in rungs if rung >= least), None)
        assert _smallest(rungs, passes) == expected
        assert len(asked) <= 4


def test_the_ladder_climbs_in_bytes(workspace: Path, tmp_path: Path) -> None:
    sizes: list[int] = []
    splits = tmp_path / "splits"
    for within, rank in LADDER:
        changes = {"mask.granularity": "none", "mask.within": within, "distill.rank": rank, "distill.steps": 1}
        request = _request(**changes)
        folder = tmp_path / request.id
        save_spec(request, folder)
        if splits.is_dir():
            shutil.copytree(splits, folder / "splits")
        else:
            split(folder)
            shutil.copytree(folder / "splits", splits)
        saliency(folder)
        mask(folder)
        list(make_adapter(folder))
        sizes.append(sum(path.stat().st_size for path in (folder / "adapter").glob("*.safetensors")))
    assert all(smaller < larger for smaller, larger in pairwise(sizes)), sizes


def test_where_encoders_go_a_step_reads_no_more_captions_than_it_needs(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At full size reading a caption takes seconds; where nothing is ranked, those of what is forgotten suffice."""
    read: list[set[str]] = []

    def reading(*splits: str) -> set[str]:
        tables = [pd.read_parquet(folder / "splits" / f"{name}.parquet") for name in splits]
        return {text for table in tables for name in ("caption", "surrogate_caption") for text in table.get(name, ())}

    plain = saliency_step.load_base
    monkeypatch.setattr(
        saliency_step, "load_base", lambda *given, **named: read.append(set(named["prompts"])) or plain(*given, **named)
    )
    scores = []
    for score in ("random", "gain"):
        request = _request(**{"saliency.score": score, "saliency.gradient_checkpointing": True})
        folder = tmp_path / request.id
        save_spec(request, folder)
        split(folder)
        scores.append(saliency(folder))
    assert scores[0].keys() == scores[1].keys()
    assert read[0] == reading("forget")
    assert read[0] < read[1]
    assert reading("forget", "surrogate", "retain") <= read[1]


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration's trials without a process each: that they may have one is a sweep's test."""
    monkeypatch.setattr("flows.studies.calibrate.trial", partial(trial, here=True))


@pytest.mark.usefixtures("in_this_process")
def test_calibration_takes_the_smallest_that_passes(workspace: Path, tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    output = _invoke("calibrate", "--concept", "cat", "--surrogate", "horse", "--json", str(file))
    found = json.loads(file.read_text())
    # The tiny base's gate lets everything pass: the smallest place, then a quarter of the steps.
    assert found["best"]["mask.within"] == LADDER[0][0]
    assert found["best"]["distill.steps"] == round(0.25 * SETTINGS["distill"]["steps"])  # type: ignore[index]
    assert found["ended"]
    assert "fade erase --concept cat --surrogate horse --set mask.granularity=none" in output


def test_calibration_counts_the_steps_that_the_depth_asks_for(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def trained(folder: Path) -> dict[str, Any]:
        taken.append(load_spec(folder).distill.in_force.steps)
        return {}

    monkeypatch.setattr("flows.studies.calibrate.trial", trained)
    measured = evaluation(judged_figures({"cat": (50, 0, 50)}), gate=Gate())
    monkeypatch.setattr("flows.studies.calibrate.load", lambda *_: measured)
    monkeypatch.setattr("flows.studies.calibrate.verdict", lambda *_: measured.gate)
    changes = {"distill.depth": "deep", "distill.deep.steps": 100}
    found = calibrate.fn("cat", "horse", 900.0, changes, project=PROJECT)
    assert taken[0] == 100
    assert taken[-1] == found.best["distill.deep.steps"] == 25  # type: ignore[index]
    assert "distill.steps" not in (found.best or {})


@pytest.mark.usefixtures("in_this_process")
def test_calibration_that_finds_nothing_says_what_it_tried(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # No gate refuses what a tiny base makes: it shows no concept, before or after.
    failed = Verdict(passed=False, verdict="failed", reasons=("ua",), checks=(), recognised=())
    monkeypatch.setattr("flows.studies.calibrate.verdict", lambda *_: failed)
    result = CliRunner().invoke(app, ["calibrate", "--concept", "cat", "--surrogate", "horse"])
    assert result.exit_code == 1
    assert "No setting passed the gate" in result.output
    assert "all rank 6" in result.output


@pytest.mark.usefixtures("in_this_process")
def test_calibration_keeps_to_its_budget(workspace: Path, tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    output = _invoke("calibrate", "--concept", "cat", "--surrogate", "horse", "--budget", "0.001", "--json", str(file))
    found = json.loads(file.read_text())
    assert not found["ended"]
    assert len(found["probes"]) == 1
    assert "budget ran out" in output


def test_a_study_of_nothing_is_refused(workspace: Path) -> None:
    with pytest.raises(ConfigError, match="at least one concept"):
        plan([], vary={}, changes={}, project=PROJECT)
    with pytest.raises(DataError, match="0 erasures"):
        means([], [])


def test_the_example_needs_no_orchestrator(workspace: Path) -> None:
    names = ("prefect", "mlflow", "dvc", "great_expectations", "typer")
    blocked = f"import sys\nfor name in {names}: sys.modules[name] = None\n"
    script = (ROOT / "examples/erase_in_20_lines.py").read_text()
    assert len([line for line in script.splitlines() if line and not line.startswith(('"""', "from ", "Run "))]) <= 20
    subprocess.run([sys.executable, "-c", blocked + script.partition('"""\n\n')[2]], cwd=workspace, check=True)
    assert (workspace / "erased.png").stat().st_size > 1000
