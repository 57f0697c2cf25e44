"""A base of another kind beside the first: its own defaults, both in one queue, and erasures made again on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.tiny_families import save_tiny
from fade.config import BY_KIND, Settings, load_settings
from fade.lineage import ROOT
from fade.models.registry import FAMILIES, family
from fade.spec import Spec, load_spec, save_spec
from fade.steps.prepare import prepare_spec
from flows.erasing.rebase import on_base
from tests.tiny import PROJECT

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
    assert _found(_asked(flow_base, **{"distill.start": "zero"})) == {**OF_FLOWS, "distill.start": "zero"}
    given = _asked(flow_base, **OF_UNETS)
    assert _found(given) == OF_UNETS, "what is given stays, though it is what another kind has"
    assert given.by_kind == ()


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
