from __future__ import annotations

import os
from pathlib import Path

import pytest

from fade.environment import Environment, environment, load_file, table, variables
from fade.errors import ConfigError
from fade.lineage import ROOT
from flows.erasing import parameters

DOCS = ROOT / "docs/settings.md"
EXAMPLE = ROOT / "infra/environment.example"


def test_variables_are_typed_and_the_environment_is_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment().drain_attempts == 5
    monkeypatch.setenv("FADE_DRAIN_ATTEMPTS", "7")
    monkeypatch.setenv("FADE_INTAKE_TOKEN", "")
    found = environment()
    assert found.drain_attempts == 7
    assert found.intake_token is None, "an empty variable is one that is not set"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("FADE_LEDGER_ULR", "x", r"FADE_LEDGER_ULR is no setting\. Did you mean LEDGER_URL"),
        ("FADE_NONSENSE", "x", r"FADE_NONSENSE is no setting\. No name is like it"),
        ("FADE_DRAIN_RUNNING", "many", "FADE_DRAIN_RUNNING Input should be a valid integer"),
        ("FADE_DRAIN_RUNNING", "0", "FADE_DRAIN_RUNNING Input should be greater than or equal to 1"),
        ("FADE_SERVICE_TOKEN", "short", "FADE_SERVICE_TOKEN must hold at least 16 characters: got 5"),
        ("FADE_LOG_FORMAT", "xml", "FADE_LOG_FORMAT Input should be 'plain' or 'json'"),
    ],
)
def test_a_wrong_variable_is_an_error_that_shows_no_value(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    environment()
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message) as caught:
        environment()
    if value == "short":
        assert value not in str(caught.value)


def test_all_faults_are_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FADE_QUEUE", "x")
    monkeypatch.setenv("FADE_DRAIN_RUNNING", "many")
    with pytest.raises(ConfigError, match=r"FADE_QUEUE is no setting.*FADE_DRAIN_RUNNING"):
        environment()


def test_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FADE_SERVICE_TOKEN", "a-token-nobody-sees")
    monkeypatch.setenv("FADE_LEDGER_URL", "postgresql://fade:password@host/fade")
    shown = repr(environment())
    assert "nobody-sees" not in shown
    assert "password" not in shown


def test_a_file_gives_variables_and_those_set_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "environment"
    path.write_text(
        "# comment\nFADE_DRAIN_ATTEMPTS=3\nFADE_DRAIN_RUNNING=4\nMLFLOW_TRACKING_URI=\nFADE_TEST_X=1\nFADE_IMAGE=x\n"
    )
    for name in ("FADE_DRAIN_ATTEMPTS", "MLFLOW_TRACKING_URI", "FADE_TEST_X", "FADE_IMAGE"):
        monkeypatch.setenv(name, "9")  # so that what the file sets is undone afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("FADE_DRAIN_RUNNING", "2")
    load_file(tmp_path / "missing")
    load_file(path)
    assert environment().drain_attempts == 3
    assert environment().drain_running == 2
    assert "MLFLOW_TRACKING_URI" not in os.environ
    path.write_text("FADE_DRAIN_ATTEMPT=3\n")
    with pytest.raises(ConfigError, match=r"environment: FADE_DRAIN_ATTEMPT is no setting\. Did you mean"):
        load_file(path)
    path.write_text("FADE_DRAIN_ATTEMPTS\n")
    with pytest.raises(ConfigError, match="expected NAME=VALUE"):
        load_file(path)


def test_the_documented_table_is_the_codes_own() -> None:
    assert len(variables()) == len(Environment.model_fields) > 10
    assert table() in DOCS.read_text(), "write it anew: python -m fade.environment"
    assert all(description for description in variables().values())


def test_the_documented_settings_of_an_erasure_are_the_codes_own() -> None:
    found = parameters.table()
    assert found in DOCS.read_text(), "write it anew: python -m flows.erasing.parameters"
    rows = [row.split(" | ") for row in found.splitlines()[2:]]
    assert len(rows) > 70
    assert all(len(row) == 4 and row[3] != "|" for row in rows), "each has a description"
    assert "| `mask.density` | `0.75` | number above 0, at most 1 | share that may change |" in found


def test_the_example_file_names_known_variables_alone() -> None:
    lines = [line for line in EXAMPLE.read_text().splitlines() if line and not line.startswith("#")]
    named = {line.partition("=")[0] for line in lines if line.startswith("FADE_")}
    assert named
    assert named <= set(variables())


def test_nothing_else_reads_a_variable_of_ours() -> None:
    """One place reads them; FADE_ROOT is needed before there is a project."""
    for folder in ("fade", "tasks", "flows"):
        for path in (ROOT / folder).rglob("*.py"):
            for line in path.read_text().splitlines():
                if "os.environ" in line and "FADE_" in line:
                    assert "FADE_ROOT" in line, f"{path}: {line}"
