"""What lock files and cards say was made by the code they name; a stage depends on every setting that it reads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from fade import config, spec
from fade.asking.prepare import prepare_spec
from fade.config import Settings, load_settings
from fade.files import read_json
from fade.lineage import ROOT, processor_kind
from fade.pipeline import run, steps_of
from fade.spec import save_spec
from flows.operations.doctor import recorded
from tests.tiny import PROJECT

FROZEN = {
    "base": ("dvc.yaml", "data/base/canvas.card.json"),
    "flow_base": ("dvc.yaml", "data/base/canvas-flow.card.json"),
    "judges": ("dvc.yaml", "data/judges.card.json"),
    "canvas_clip": ("dvc.yaml", "data/canvas-clip.card.json"),
    "wide base": ("data/wide/dvc.yaml", "data/wide/base.card.json"),
    "wide judges": ("data/wide/dvc.yaml", "data/wide/judges.card.json"),
}
"""Each frozen stage's file and card."""


def _git(*arguments: str, cwd: Path = ROOT) -> str:
    return subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git tracks, as it is here now: what a newcomer has once it is committed and cloned."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: there is no clone to make")
    folder = tmp_path_factory.mktemp("fresh") / "clone"
    for name in _git("ls-files", "-z").split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    _git("init", "--quiet", cwd=folder)
    return folder


def _status(folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "dvc", "status", "--json"]
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout or "{}"))


def _stale(status: dict[str, Any]) -> list[str]:
    """What is not as recorded, but for what is not in git at all."""
    found = []
    for stage, changes in status.items():
        for change in changes:
            for kind, paths in change.items() if isinstance(change, dict) else [(change, {})]:
                for path, how in paths.items():
                    if how not in ("deleted", "not in cache"):
                        found.append(f"{stage}: {kind}: {path}: {how}")
    return found


def test_in_a_fresh_clone_nothing_is_stale(clone: Path) -> None:
    status = _status(clone)
    assert any("data/catalog/canvas" in str(changes) for changes in status.values()), "the catalog is not in git"
    assert _stale(status) == []


def test_a_fresh_clone_with_other_code_or_parameters_says_so(clone: Path) -> None:
    changed = [clone / "fade/data/catalog.py", clone / "params.yaml"]
    before = [path.read_text(encoding="utf-8") for path in changed]
    try:
        changed[0].write_text(before[0] + "# other code\n", encoding="utf-8")
        changed[1].write_text(before[1].replace("train_per_pair: 24", "train_per_pair: 23"), encoding="utf-8")
        stale = _stale(_status(clone))
    finally:
        for path, text in zip(changed, before, strict=True):
            path.write_text(text, encoding="utf-8")
    assert any("fade/data/catalog.py: modified" in line for line in stale)
    assert any(line.startswith("catalog") and "params.yaml" in line for line in stale)


@pytest.mark.parametrize("frozen", FROZEN)
def test_what_takes_hours_is_frozen_and_recorded_as_by_the_commit_that_made_it(frozen: str) -> None:
    file, where = FROZEN[frozen]
    stage = frozen.removeprefix("wide ")
    lock, params = (file.replace("dvc.yaml", name) for name in ("dvc.lock", "params.yaml"))
    assert yaml.safe_load((ROOT / file).read_text())["stages"][stage]["frozen"]
    card = read_json(ROOT / where)
    recorded = yaml.safe_load((ROOT / lock).read_text())["stages"][stage]
    assert [out["md5"] for out in recorded["outs"]] == [card["md5"]]
    if not (ROOT / ".git").exists() or _git("rev-parse", "--is-shallow-repository").strip() == "true":
        pytest.skip("the history that the card names is not here")
    then = yaml.safe_load(_git("show", f"{card['commit']}:{lock}"))["stages"][stage]
    assert then == recorded
    settings = yaml.safe_load(_git("show", f"{card['commit']}:{params}"))
    assert recorded["params"][params][stage] == settings[stage]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The settings that are read, as ``section.field``, from here on."""
    sections = {type(part): name for name, part in Settings() if isinstance(part, BaseModel)}
    found: set[str] = set()
    made = spec.make_spec

    def noted(self: BaseModel, name: str) -> Any:
        section = sections.get(type(self))
        if section is not None and name in type(self).model_fields:
            found.add(f"{section}.{name}")
        return object.__getattribute__(self, name)

    def unnoted(**fields: Any) -> spec.Spec:
        """A request's validators look at much that no step reads."""
        before = set(found)
        request = made(**fields)
        found.intersection_update(before)
        return request

    monkeypatch.setattr(config.StrictModel, "__getattribute__", noted, raising=False)
    monkeypatch.setattr(spec, "make_spec", unnoted)
    return found


DEEP = {
    "distill.depth": "deep",
    "distill.deep": {"steps": 4, "states": 2, "batch": 4},
    "distill.pool": 8,
    "attacks.seeds": [188],
    "attacks.pictures": 2,
    "attacks.relearning_steps": [1],
    "gate.attacks": {"paraphrase": 0.9, "noised": 0.9, "relearning": 0.9, "inversion": 0.9},
}
FOUND = {"settings": "auto", "tune.steps": [1], "tune.pictures": 2, "tune.solver_steps": 1, "tune.tries": 2}
ESD = {"method": "esd-x", "methods.esd-x": {"steps": 2, "batch": 2, "sampling_steps": 2}}


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("changes", "data_free"),
    [({}, False), (DEEP, True), (ESD, False), (FOUND, False)],
    ids=["plain", "all at once", "esd", "found"],
)
def test_every_setting_that_a_step_reads_is_among_its_parameters(
    workspace: Path, tmp_path: Path, reads: set[str], changes: dict[str, Any], data_free: bool
) -> None:
    settings = load_settings(Path("params.yaml"), changes=changes)
    spec = prepare_spec("cat", "horse", project=PROJECT, settings=settings, data_free=data_free)
    save_spec(spec, tmp_path)
    steps = steps_of(spec)
    assert ("generate" in [step.name for step in steps]) == data_free
    for step in steps:
        reads.clear()
        for _ in run(step, tmp_path):
            pass
        assert reads, f"{step.name} reads no setting at all"
        missing = {read for read in reads if not {read, read.partition(".")[0]} & set(step.parameters)}
        assert not missing, f"{step.name} reads {sorted(missing)}, which its row does not name"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_fresh_clone_gives_the_recorded_hashes_on_the_recorded_kind_of_processor(clone: Path) -> None:
    _git("add", "--all", cwd=clone)
    command = [sys.executable, "-m", "dvc", "repro"]
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1", "PYTHONPATH": str(clone), "OMP_NUM_THREADS": "2"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    environment.pop("FADE_ROOT", None)
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (clone / "data/erasures/example/evaluation/metrics.json").is_file()
    same = read_json(ROOT / "data/recorded-on.json")["processor"] == processor_kind()
    assert (recorded(clone).verdict == "ok") == same
    if same:
        assert _git("diff", "--name-only", cwd=clone).split() == []
