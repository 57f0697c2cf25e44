"""``drain --together``: one adapter for a night's requests, each with its outcome, and one of them rolled back."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fade.adapters.card import load_card
from fade.data.intake import build
from fade.data.sets import Item, PictureSet
from fade.errors import ConfigError, LeaseLostError, RefusedError
from fade.evaluation.measured import Evaluation
from fade.evaluation.records import load
from fade.project import Project, load_project
from fade.requests import leases
from fade.requests.in_force import move_to
from fade.requests.ledger import Ledger
from fade.requests.messages import make_message
from fade.requests.states import State
from fade.spec import load_spec
from flows.erasing.erase import prepare_folder
from flows.proving.evidence import gather
from flows.queue import together
from flows.queue.drain import DrainSettings, drain
from flows.queue.together import drain_together
from flows.releasing import approval, release
from flows.releasing.part import roll_back_one, spec_without
from flows.settings import ERASURES
from tests.tiny import FEW_STEPS, PROJECT, PROJECTS, save_judges, save_tiny_base, write_project

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def ledger(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    monkeypatch.setenv("FADE_LEDGER_URL", f"sqlite:///{tmp_path / 'ledger.db'}")
    write_project(Path("params.yaml"), PROJECT, methods=FEW_STEPS)
    with Ledger() as found:
        yield found


def ask(ledger: Ledger, concept: str, *, project: Project = PROJECT, **changes: Any) -> str:
    asked = {"id": str(uuid.uuid4()), "kind": "object", "concept": concept, "surrogate": "auto", **changes}
    return ledger.submit(make_message(**asked), project, actor="test")[0].id


def test_a_nights_requests_become_one_adapter_and_each_has_its_own_outcome(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, set[str]]] = []
    erase = together.erase

    def withdrawn_meanwhile(erasure: str, *, requests: dict[str, int]) -> Any:
        made.append((erasure, set(requests)))
        if len(made) == 1:
            ledger.cancel(taken_back, actor="test", reason="came to an agreement")
            for request, fence in requests.items():
                leases.check(ledger, request, fence)
        return erase(erasure, requests=requests)

    monkeypatch.setattr(together, "erase", withdrawn_meanwhile)
    cat, coffee, taken_back = ask(ledger, "cat", surrogate="horse"), ask(ledger, "coffee"), ask(ledger, "flower")
    wrong, clash = ask(ledger, "astronot"), ask(ledger, "rocket", surrogate="cat")
    held = ask(ledger, "horse")
    ledger.hold(held, actor="test", reason="court")
    assert drain(together=True) == {"candidate": 2, "needs_input": 2, "lost": 1}
    assert [requests for _, requests in made] == [{cat, coffee, taken_back}, {cat, coffee}]
    records = [ledger.get(one) for one in (cat, coffee)]
    assert [one.state for one in records] == [State.CANDIDATE] * 2
    (erasure,) = {str(one.erasure_id) for one in records}
    assert erasure == made[1][0] != made[0][0]
    spec = load_spec(ERASURES / erasure)
    assert {pair.concept for pair in spec.pairs} == {"cat", "coffee"}
    metrics = load(Evaluation, ERASURES / erasure / "evaluation" / "metrics.json")
    for one in records:
        own = metrics.report.after.erased[str(one.concept)].ua
        assert f"of its own {own.count} pictures {own.hits} no longer show it (2 concepts together)" in str(one.reason)
        said = ledger.history(request_id=one.id)[-1]
        assert said.details["together"] == 2
        assert said.details["ua"] == own.value
    assert "Did you mean 'astronaut'" in str(ledger.get(wrong).reason)
    assert "erased by another request of this night" in str(ledger.get(clash).reason)
    assert ledger.get(taken_back).state is State.CANCELLED
    assert ledger.get(held).state is State.ON_HOLD
    assert drain(together=True) == {}
    ledger.verify()


def test_what_fails_together_is_nobodys_rejection_but_run_one_by_one(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    erase = together.erase

    def failed_together(erasure: str, *, requests: dict[str, int]) -> Any:
        version = erase(erasure, requests=requests)
        return replace(version, gate="failed")

    monkeypatch.setattr(together, "erase", failed_together)
    monkeypatch.setattr(together, "amiss", lambda *_: [])
    asked = [ask(ledger, name) for name in ("cat", "coffee")]
    assert drain(together=True) == {"candidate": 2}
    pairs = [load_spec(ERASURES / str(ledger.get(one).erasure_id)).pairs for one in asked]
    assert [[pair.concept for pair in some] for some in pairs] == [["cat"], ["coffee"]]
    said = [str([row.reason for row in ledger.history(request_id=one)]) for one in asked]
    assert all("not together with others" in one for one in said)


def test_one_that_fails_by_itself_is_made_by_itself_and_does_not_keep_back_the_others(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[set[str]] = []
    erase = together.erase

    def failed_at_first(erasure: str, *, requests: dict[str, int]) -> Any:
        made.append(set(requests))
        version = erase(erasure, requests=requests)
        return replace(version, gate="failed") if len(made) == 1 else version

    monkeypatch.setattr(together, "erase", failed_at_first)
    monkeypatch.setattr(together, "amiss", lambda *_: ["coffee"])
    cat, coffee, flower = (ask(ledger, name) for name in ("cat", "coffee", "flower"))
    assert drain(together=True) == {"candidate": 3}
    assert made == [{cat, coffee, flower}, {cat, flower}]
    pairs = {name: load_spec(ERASURES / str(ledger.get(name).erasure_id)).pairs for name in (cat, coffee, flower)}
    assert [pair.concept for pair in pairs[coffee]] == ["coffee"]
    assert pairs[cat] == pairs[flower]
    assert {pair.concept for pair in pairs[cat]} == {"cat", "flower"}
    assert "coffee" not in {pair.surrogate for pair in pairs[cat]}, "it is erased too, by another adapter"
    assert any("not together with others" in str(row.reason) for row in ledger.history(request_id=coffee))
    ledger.verify()


def test_where_together_is_impossible_each_goes_back_to_be_run_alone(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise ConfigError("no base for that")

    monkeypatch.setattr(together, "erase", refused)
    one, other = ask(ledger, "cat"), ask(ledger, "coffee")
    settings = DrainSettings(retry_seconds=0)
    assert drain_together(ledger, "me", PROJECTS, settings) == {}
    assert [ledger.get(name).state for name in (one, other)] == [State.SCHEDULED] * 2
    assert "not together: no base for that" in str(ledger.get(one).reason)
    with pytest.raises(LeaseLostError):
        leases.check(ledger, one, ledger.get(one).fence)
    assert drain_together(ledger, "me", PROJECTS, settings, limit=1) == {}
    assert ledger.get(other).attempts + ledger.get(one).attempts == 3, "a limit is kept"


def test_what_is_not_live_or_stands_alone_is_not_rolled_back_in_part(ledger: Ledger, tmp_path: Path) -> None:
    from fade.asking.prepare import prepare_spec
    from fade.config import load_settings

    settings = load_settings(Path("params.yaml"))
    spec = prepare_spec("cat", "horse", project=PROJECT, settings=settings, also=[("coffee", "rocket")])
    assert {pair.concept for pair in spec_without(spec, ["cat"]).pairs} == {"coffee"}
    with pytest.raises(ConfigError, match="has no concept rocket"):
        spec_without(spec, ["rocket"])
    folder = prepare_folder(spec)
    (folder / "evaluation").mkdir(exist_ok=True)
    (folder / "evaluation" / "metrics.json").write_text("{}")
    with pytest.raises(RefusedError, match="is not approved"):
        roll_back_one(spec.id, "cat")
    assert move_to(ledger, "e0", "e1", names=["cat"], base=PROJECT.base, actor="test") == []


def _noise(folder: Path, count: int) -> Project:
    """A project of so many objects in two styles, of noise: what is counted here is requests."""
    things, styles = [f"thing{number}" for number in range(count)], ("photo", "neon")
    generator = np.random.default_rng(0)
    items = [
        Item(f"{thing}-{style}-{split}{number}", f"{thing}-{style}-{split}{number}",
             generator.integers(0, 255, (64, 64, 3), dtype=np.uint8), thing, style, split=split)
        for thing in things for style in styles for split, number in (("train", 1), ("train", 2), ("holdout", 1))
    ]  # fmt: skip
    concepts = [{"name": name, "kind": "object", "aliases": [], "person": False} for name in things]
    concepts += [{"name": name, "kind": "style", "aliases": [], "person": False} for name in styles]
    templates = ("a {object} image in {style} style.",)
    whole = PictureSet(items, "noise", templates=templates, concepts=tuple(concepts))
    for _ in build(folder / "catalog", whole, workers=1):
        pass
    save_tiny_base(folder / "base", names=(things, styles))
    judges = save_judges(folder / "judges", folder / "catalog")
    project = Project(
        name=folder.name, catalog=str(folder / "catalog"), base=str(folder / "base"), judges=judges, render=None
    )
    return load_project(
        write_project(folder / "params.yaml", project, evaluate={"seeds": [188], "steps": 1}, methods=FEW_STEPS)
    )


@pytest.mark.parametrize("count", [9, pytest.param(100, marks=pytest.mark.slow)])
def test_of_the_requests_of_one_night_one_is_rolled_back_and_the_others_stay_in_force(
    ledger: Ledger, count: int
) -> None:
    folder = Path("data") / f"noise{count}"
    project = _noise(folder, count + 3)
    asked = {f"thing{number}": ask(ledger, f"thing{number}", project=project) for number in range(count)}
    assert drain(projects=[folder / "params.yaml"], together=True) == {"candidate": count}
    (erasure,) = {str(ledger.get(request).erasure_id) for request in asked.values()}
    spec = load_spec(ERASURES / erasure)
    assert len(spec.pairs) == count
    assert not {pair.concept for pair in spec.pairs} & {pair.surrogate for pair in spec.pairs}
    for request in list(asked.values())[:3]:
        name, evidence = gather(request, ledger)
        assert name == erasure
        assert evidence
    approval.approve(erasure, actor="test")
    release.reconcile(consolidate=False)
    assert {ledger.get(request).state for request in asked.values()} == {State.LIVE}
    left = roll_back_one(erasure, "thing7", actor="test")
    (change,) = (one for one in release.reconcile(consolidate=False) if one.base_sha256 == spec.base_sha256)
    assert change.live == (f"{left.model}/{left.version}",)
    states = {name: ledger.get(request).state for name, request in asked.items()}
    assert states.pop("thing7") is State.ROLLED_BACK
    assert set(states.values()) == {State.LIVE}
    assert {ledger.get(asked[name]).erasure_id for name in states} == {left.erasure}
    # The bits are those of an adapter that never had it: made anew, elsewhere.
    anew = spec_without(spec, ["thing7"])
    assert anew.id == left.erasure
    from fade.steps.adapter import make_adapter
    from fade.steps.split import split

    folder = ERASURES / f"anew{count}"
    folder.mkdir()
    (folder / "spec.yaml").write_text(yaml.safe_dump(json.loads(anew.model_dump_json()), sort_keys=False))
    split(folder)
    list(make_adapter(folder))
    assert load_card(folder / "adapter")["adapter_sha256"] == left.adapter_sha256
    assert load_card(ERASURES / erasure / "adapter")["adapter_sha256"] != left.adapter_sha256
    ledger.verify()
