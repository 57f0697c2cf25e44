"""A step that is added as one row and one function is everywhere that the steps are gone through."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fade import pipeline
from fade.asking.prepare import prepare_spec
from fade.config import load_settings
from fade.files import read_json
from fade.pipeline import STEPS, Step
from fade.spec import Spec
from fade.studies.trial import run_trial
from flows.erasing.erase import erase, prepare_folder
from flows.proving.traces import traces_of
from flows.queue.drain import step_of
from tasks.dvc import versioning
from tasks.dvc.objects import stores
from tasks.mlflow import tracking
from tests.tiny import PROJECT

pytestmark = pytest.mark.timeout(1800)

TOY = Step(
    name="toy",
    function="tests.toy:count_words",
    inputs=("mask",),
    outputs=("words.txt",),
    parameters=("concept", "threads"),
    personal=("words.txt",),
    logged=("words.txt",),
    applies=lambda spec: not spec.person,
)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table with the toy after the mask."""
    place = 1 + next(number for number, step in enumerate(STEPS) if step.name == "mask")
    monkeypatch.setattr(pipeline, "STEPS", (*STEPS[:place], TOY, *STEPS[place:]))


def _spec(concept: str, surrogate: str) -> Spec:
    return prepare_spec(concept, surrogate, project=PROJECT, settings=load_settings(Path("params.yaml")))


def test_it_is_run_recorded_timed_logged_and_purged(workspace: Path, table: None) -> None:
    spec = _spec("motorcycle", "coins")
    folder = prepare_folder(spec)
    stages = yaml.safe_load((folder / "dvc.yaml").read_text())["stages"]
    assert list(stages) == ["split", "validate", "saliency", "mask", "toy", "distill", "evaluate"]
    assert stages["toy"]["cmd"] == f"python -m fade.pipeline tests.toy:count_words {folder.as_posix()}"
    assert stages["toy"]["outs"] == [f"{folder.as_posix()}/words.txt"]
    assert f"{folder.as_posix()}/mask" in stages["toy"]["deps"]
    assert any(dep.endswith("tests/toy.py") for dep in stages["toy"]["deps"]), "its code"
    assert "/words.txt" in (folder / ".gitignore").read_text().splitlines()

    version = erase(spec.id)
    assert int((folder / "words.txt").read_text()) > 0
    assert set(read_json(folder / "timings.json")) == set(stages)
    run = tracking.run_record(version)
    assert {"seconds_toy", "peak_mib_toy"} <= set(run.metrics)

    with stores() as opened:
        things = [thing for thing in traces_of(folder, [], opened).things if "words.txt" in thing.name]
    assert {thing.place for thing in things if not thing.keep} >= {"work tree", "dvc cache", "mlflow"}

    assert step_of(folder) == "register"
    lock = yaml.safe_load((folder / "dvc.lock").read_text())
    lock["stages"].pop("toy")
    (folder / "dvc.lock").write_text(yaml.safe_dump(lock))
    assert step_of(folder) == "toy"
    assert not versioning.is_current(folder, "toy")
    assert versioning.is_current(folder, "mask")


def test_it_is_in_trials_and_only_where_it_applies(workspace: Path, tmp_path: Path, table: None) -> None:
    said: list[str] = []
    spec = _spec("motorcycle", "coins")
    run_trial(spec, root=tmp_path, say=said.append)
    assert said == ["split", "saliency", "mask", "toy", "distill", "evaluate"]
    assert "toy" in read_json(tmp_path / spec.id / "timings.json")
    assert "toy" not in [step.name for step in pipeline.steps_of(_spec("astronaut", "cameraman"))]
