"""A base of another kind beside the first: its own defaults, both in one queue, and erasures made again on it."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from benchmarks.tiny.families import save_tiny
from fade.asking.by_kind import of_its_kind
from fade.asking.prepare import prepare_spec
from fade.config import BY_KIND, Settings, load_settings
from fade.lineage import ROOT
from fade.models.family import family_of
from fade.models.registry import FAMILIES, family
from fade.models.source import base_sha256
from fade.project import load_projects
from fade.requests.ledger import Ledger
from fade.requests.messages import make_message
from fade.requests.states import State
from fade.spec import Spec, load_spec, save_spec
from flows.cli.app import app
from flows.erasing.rebase import on_base
from flows.queue.drain import drain
from flows.releasing.pictures import draw, live_adapters, load_with
from flows.settings import ERASURES
from tasks.mlflow import tracking
from tests.tiny import PROJECT, write_project

pytestmark = pytest.mark.timeout(600)
FLOW = "data/base/canvas-flow"
OF_FLOWS = {"distill.start": "closed_form", "distill.learning_rate": 5e-4}
OF_UNETS = {"distill.start": "zero", "distill.learning_rate": 2e-3}


@pytest.fixture(scope="module")
def flow_base(workspace: Path) -> str:
    save_tiny(workspace / FLOW, "sd3")
    return FLOW


def _asked(base: str | None = None, *, params: Path = PROJECT.params, **changes: Any) -> Spec:
    settings = load_settings(params, changes=changes)
    return prepare_spec("astronaut", "cameraman", project=PROJECT.at(base=base), settings=settings)


def _found(spec: Spec) -> dict[str, Any]:
    return {name: getattr(spec.distill, name.partition(".")[2]) for name in BY_KIND}


def test_settings_that_nobody_gives_are_those_of_the_bases_kind(flow_base: str) -> None:
    assert _found(_asked()) == OF_UNETS
    assert _found(_asked(flow_base)) == OF_FLOWS
    assert _asked(flow_base).by_kind == BY_KIND
    said = [of_its_kind(_asked(base), family_of(base)) for base in (PROJECT.base, flow_base)]
    assert said == [{}, OF_FLOWS]
    assert _found(_asked(flow_base, **{"distill.start": "zero"})) == {**OF_FLOWS, "distill.start": "zero"}
    given = _asked(flow_base, **OF_UNETS)
    assert _found(given) == OF_UNETS, "what is given stays, though it is what another kind has"
    assert given.by_kind == ()
    assert _found(_asked(flow_base, **{"distill.depth": "deep"})) == OF_UNETS


def test_auto_in_a_file_or_a_command_is_as_if_left_out(flow_base: str, tmp_path: Path) -> None:
    shipped = yaml.safe_load((ROOT / "params.yaml").read_text())["erasure"]
    assert [shipped["distill"][name.partition(".")[2]] for name in BY_KIND] == ["auto", "auto"]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"erasure": shipped}))
    assert _found(_asked(flow_base, params=tmp_path / "params.yaml")) == OF_FLOWS
    assert _found(_asked(flow_base, **dict.fromkeys(BY_KIND, "auto"))) == OF_FLOWS
    assert _found(_asked(**dict.fromkeys(BY_KIND, "auto"))) == OF_UNETS


def test_what_a_kind_of_base_has_of_its_own_are_settings_that_may_be_left_open() -> None:
    known = Settings()
    kinds = [family(pipeline) for pipeline in FAMILIES]
    assert {bool(kind.defaults) for kind in kinds} == {True, False}
    for kind in kinds:
        assert set(kind.defaults) <= set(BY_KIND)
        for name, value in kind.defaults.items():
            section, _, part = name.partition(".")
            checked = type(getattr(known, section))(**{part: value})
            assert getattr(checked, part) == value


def test_a_rebase_takes_the_new_kinds_defaults_and_what_was_given(flow_base: str, tmp_path: Path) -> None:
    left = _asked(**{"distill.steps": 7})
    save_spec(left, tmp_path)
    moved = on_base(load_spec(tmp_path), PROJECT.at(base=flow_base))
    assert _found(moved) == OF_FLOWS
    assert moved.distill.steps == 7
    assert moved == _asked(flow_base, **{"distill.steps": 7}), "the same as if it had been asked for there"
    assert on_base(moved, PROJECT) == left
    given = _asked(**OF_UNETS)
    assert _found(on_base(given, PROJECT.at(base=flow_base))) == OF_UNETS


@pytest.mark.slow
def test_one_queue_serves_both_bases_and_an_erasure_is_made_again_on_the_other(
    flow_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FADE_LEDGER_URL", f"sqlite:///{tmp_path / 'ledger.db'}")
    flow = PROJECT.model_copy(update={"name": "canvas-flow", "base": flow_base})
    files = [PROJECT.params, write_project(Path("projects/flow/params.yaml"), flow)]
    asked = {}
    with Ledger() as ledger:
        for project, concept in ((PROJECT, "cat"), (flow, "coffee")):
            fields = {"id": str(uuid.uuid4()), "kind": "object", "concept": concept, "surrogate": "horse"}
            message = make_message(**fields, project=project.name)
            asked[project.base] = ledger.submit(message, load_projects(files).chosen(message.project), actor="t")[0].id
        assert drain(projects=files) == {"candidate": 2}
        erasures = {base: str(ledger.get(name).erasure_id) for base, name in asked.items()}
        for name in erasures.values():
            done = CliRunner().invoke(app, ["approve", name])
            assert done.exit_code == 0, done.output
        assert {ledger.get(name).state for name in asked.values()} == {State.LIVE}
    specs = {base: load_spec(ERASURES / name) for base, name in erasures.items()}
    assert [_found(spec) for spec in specs.values()] == [OF_UNETS, OF_FLOWS]
    for base, name in erasures.items():
        (live,) = live_adapters(base_sha256(Path(base)))
        assert live.erasure == name
        prompt = [f"a {specs[base].concept} image"]
        with_it, without = (draw(load_with(base, stack), prompt, seed=1, steps=2) for stack in ([live], []))
        assert (with_it != without).any()
    done = CliRunner().invoke(app, ["rebase", flow_base])
    assert done.exit_code == 0, done.output
    (again,) = [
        one
        for one in tracking.versions()
        if one.erasure not in erasures.values() and one.base_sha256 == base_sha256(Path(flow_base))
    ]
    made = load_spec(ERASURES / again.erasure)
    assert (made.concept, made.base, _found(made)) == ("cat", flow_base, OF_FLOWS)
    assert not again.live, "nothing is approved by a rebase"
