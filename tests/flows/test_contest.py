"""Methods compared: the table and what stands under it, and the flow on a tiny base."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from fade.errors import ConfigError, DataError
from fade.evaluation.contest import best_methods, contest_markdown, contest_table, scatter_figure, sequence_figure
from fade.methods.registry import NAMES
from flows.cli.app import app
from flows.studies.contest import plan_contest
from tasks import trials
from tests.tiny import PROJECT


def _row(method: str, ua: float, **more: Any) -> dict[str, Any]:
    rates = {"ua": ua, "ira": 0.9, "cra": 0.9}
    row: dict[str, Any] = {
        "method": method,
        "drift": 0.02,
        "method_seconds": 3.0,
        "adapter_bytes": 5000,
        "peak_mib": 900,
    }
    for name, value in rates.items():
        row |= {name: value, f"{name}_count": 100}
    return row | more


ROWS = [
    _row("ours", 1.0, inversion=0.5, ira=0.8),
    _row("ours", 0.9, inversion=0.3, ira=0.8),
    _row("uce", 0.9, inversion=1.0, ira=1.0, method_seconds=0.1),
    _row("uce", 0.9, inversion=1.0, ira=1.0, method_seconds=0.1),
]


def test_means_and_pooled_intervals_by_method() -> None:
    table = contest_table(ROWS).set_index("method")
    assert table.loc["ours", "ua"] == pytest.approx(0.95)
    assert table.loc["ours", "ua_low"] < 0.95 < table.loc["ours", "ua_high"]
    assert table.loc["ours", "inversion"] == pytest.approx(0.4)
    # A figure that one erasure of a method lacks is none of that method's.
    gone = [*ROWS[:3], {key: value for key, value in ROWS[3].items() if key != "inversion"}]
    assert pd.isna(contest_table(gone).set_index("method").loc["uce", "inversion"])
    with pytest.raises(DataError, match="0 erasures"):
        contest_table([])


def test_the_best_cell_is_bold_also_where_a_baseline_wins_and_the_text_says_so() -> None:
    table = contest_table(ROWS)
    best = best_methods(table)
    assert best["ua"] == ["ours"]
    assert best["method_seconds"] == ["uce"]
    assert best["cra"] == ["ours", "uce"]  # a tie is shared
    text = contest_markdown(table, ours=["ours"], base={"inversion": 1.0})
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert "**95.0% [" in lines["ours"]
    assert "**100.0% [" in lines["uce"]
    assert "100%" in lines["the base"]
    assert "IRA: uce leads with 100.0%; the best of ours, ours, has 80.0%, beyond the intervals." in text
    assert "s: uce leads with 0.1; the best of ours, ours, has 3.0." in text
    assert "UA: " not in text


def test_figures_are_drawn() -> None:
    assert len(scatter_figure(ROWS).axes) == 3
    points = pd.DataFrame([{"method": "a", "erased": n, "ua": 1.0, "ira": 1 - n / 10, "cra": 1.0} for n in (1, 2)])
    assert len(sequence_figure(points).axes) == 3


@pytest.mark.parametrize(
    ("methods", "concepts", "changes", "said"),
    [
        (["uces"], ["cat"], {}, "Did you mean 'uce'"),
        (["uce"], ["cart"], {}, "cat"),
        (["uce", "uce"], ["cat:horse"], {}, "given twice"),
        (["uce"], ["cat:horse"], {"ca.steps": 1}, "not among the methods"),
        (["ca"], ["cat:horse"], {"ca.stepz": 1}, "stepz"),
    ],
)
def test_a_wrong_contest_is_refused_before_anything_runs(
    workspace: Path, methods: list[str], concepts: list[str], changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        plan_contest(methods, concepts, project=PROJECT, changes=changes)


def test_every_method_has_a_plan_of_its_own(workspace: Path) -> None:
    entries = plan_contest(list(NAMES), ["cat:horse"], project=PROJECT, seeds=[1, 2])
    assert len({entry.folder for entry in entries}) == 2 * len(NAMES)
    assert {entry.spec.distill.seed for entry in entries} == {1, 2}
    # All are judged on the same pictures.
    assert len({(str(entry.spec.evaluate), str(entry.spec.gate)) for entry in entries}) == 1


@pytest.mark.slow
def test_a_contest_has_a_row_for_each_erasure_and_goes_on_where_it_was(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without a process for each trial: that its rows are those of one is a sweep's test.
    here = SimpleNamespace(submit=lambda folder, **given: trials.trial.submit(folder, **{**given, "here": True}))
    monkeypatch.setattr("flows.studies.study.trial", here)
    file = tmp_path / "found.json"
    # A worker's files share one workspace: others' trials may be there.
    before = set(Path("data/trials").glob("e*/curve.csv"))
    asked = ["benchmark", "canvas", "--methods", "uce", "--attacks", "switch", "--set", "attacks.seeds=[188]"]
    asked += ["--json", str(file)]
    result = CliRunner().invoke(app, [*asked, "--concepts", "cat:horse,neon:photo", "--sequential"])
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    assert [(row["method"], row["concept"]) for row in found["rows"]] == [("uce", "cat"), ("uce", "neon")]
    assert all({"switch", "base_switch", "peak_mib", "fid_judge"} <= set(row) for row in found["rows"])
    folder = workspace / found["folder"]
    assert len(pd.read_parquet(folder / "rows.parquet")) == 2
    assert "| uce |" in (folder / "table.md").read_text()
    assert (folder / "scatter.png").stat().st_size > 5000
    points = pd.read_parquet(folder / "sequence.parquet")
    assert points["erased"].tolist() == [1, 2]
    # One alone together is that one: its figures are those of its own evaluation.
    assert points["ua"].tolist()[0] == found["rows"][0]["ua"]
    written = {path: path.stat().st_mtime_ns for path in set(Path("data/trials").glob("e*/curve.csv")) - before}
    assert len(written) == 2
    again = CliRunner().invoke(app, [*asked, "--concepts", "cat:horse"])
    assert again.exit_code == 0, again.output
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert json.loads(file.read_text())["rows"] == found["rows"][:1]
