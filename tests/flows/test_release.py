"""Approved in MLflow, live in the runtime: what goes out, what stays out and says why."""

from __future__ import annotations

import json
import os
import signal
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from mlflow import MlflowClient
from typer.testing import CliRunner

from fade.adapters import seen
from fade.adapters.runtime import Runtime
from fade.asking.prepare import prepare_spec
from fade.config import Gate, load_settings
from fade.errors import ConfigError, RefusedError
from fade.evaluation.figures import Judges, rate
from fade.evaluation.measured import Combination
from fade.evaluation.records import as_json, dump, load, parse
from fade.files import read_json
from fade.models.family import load_base
from fade.requests.ledger import Ledger
from fade.requests.messages import make_message
from fade.requests.states import State
from fade.spec import load_spec
from fade.steps.alike import COMBINATIONS
from fade.steps.evaluate import judged
from flows.cli.app import app
from flows.erasing import together
from flows.erasing.erase import erase, prepare_folder
from flows.releasing import manifests, release, released, watch
from flows.releasing.approval import check_version
from flows.services import runtime_http
from flows.settings import ERASURES
from tasks.mlflow import tracking, version_page
from tasks.mlflow.tracking import AdapterVersion
from tests.figures import attacked
from tests.tiny import PROJECT

pytestmark = pytest.mark.timeout(600)
PROMPT = "a cat image in oil style."
FAST = {
    "distill.learning_rate": 0.02,
    "distill.precision": "fp32",
    "evaluate.precision": "fp32",
    "evaluate.steps": 1,
    "threads": 1,
}
TOKEN = "a-token-for-tests-alone"


def _erased(concept: str, surrogate: str, **changes: Any) -> AdapterVersion:
    settings = load_settings(Path("params.yaml"), changes={**FAST, **changes})
    spec = prepare_spec(concept, surrogate, project=PROJECT, settings=settings)
    prepare_folder(spec)
    return erase(spec.id)


@pytest.fixture(scope="module")
def client(workspace: Path) -> MlflowClient:
    tracking.versions()
    uri = f"sqlite:///{Path('.fade/mlflow.db').resolve()}"
    return MlflowClient(uri, uri)


@pytest.fixture(scope="module")
def pair(workspace: Path, client: MlflowClient) -> tuple[AdapterVersion, AdapterVersion]:
    return _erased("oil", "photo"), _erased("cat", "horse")


@pytest.fixture(scope="module")
def third(workspace: Path, client: MlflowClient) -> AdapterVersion:
    return _erased("mosaic", "photo")


@pytest.fixture(autouse=True)
def nothing_approved(client: MlflowClient) -> Iterator[None]:
    def clear() -> None:
        for model in tracking.approved_now():
            client.delete_registered_model_alias(model, "approved")
        release.reconcile(consolidate=False)

    clear()
    yield
    clear()


@pytest.fixture
def runtime(pair: tuple[AdapterVersion, AdapterVersion], tmp_path: Path) -> Runtime:
    base = load_spec(ERASURES / _id(pair[0])).base
    sd = load_base(base)
    folder = manifests.open_release(base, sd.sha256)
    return Runtime(sd, folder, public_key=released.KEYS / "public.pem", state=tmp_path / "state.json")


def _id(version: AdapterVersion) -> str:
    return version.model.removeprefix("erasure-")


def _set(client: MlflowClient, *versions: AdapterVersion) -> None:
    for version in versions:
        client.set_registered_model_alias(version.model, "approved", str(version.version))


def _picture(runtime: Runtime) -> bytes:
    pixels: bytes = runtime.generate([PROMPT], [1], steps=2, guidance=2.0)[0].tobytes()
    return pixels


def _tag(version: AdapterVersion) -> str:
    return tracking.find_version(version.model, version.version).release


def test_the_alias_makes_it_live_and_its_removal_brings_the_bases_bits_back(
    client: MlflowClient, pair: tuple[AdapterVersion, AdapterVersion], runtime: Runtime
) -> None:
    one, other = pair
    base = _picture(runtime)
    _set(client, one)
    (change,) = release.reconcile()
    assert change.live == change.added == (f"{one.model}/1",)
    assert _picture(runtime) != base
    assert _tag(one) == "live"
    _set(client, other)
    (change,) = release.reconcile()
    assert change.live == (f"{one.model}/1", f"{other.model}/1"), "tested together, both are live"
    tested = sorted(COMBINATIONS.glob("r*/metrics.json"))
    assert read_json(tested[-1])["adapters"] == {_id(v): v.adapter_sha256 for v in pair}
    assert release.reconcile()[0].counter == change.counter, "without a change nothing is published"
    client.delete_registered_model_alias(one.model, "approved")
    client.delete_registered_model_alias(other.model, "approved")
    (change,) = release.reconcile()
    assert change.live == ()
    assert set(change.removed) == {f"{one.model}/1", f"{other.model}/1"}
    assert _picture(runtime) == base
    assert _tag(one) == "rolled back"


def test_an_approval_that_falls_into_a_look_and_is_taken_back_at_once_goes_out_again(
    client: MlflowClient,
    pair: tuple[AdapterVersion, AdapterVersion],
    runtime: Runtime,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, _ = pair
    base = _picture(runtime)
    watcher = watch.Watch(valid_seconds=0, rehearse=False)
    asked = tracking.approved_now

    def clicked_after_it_was_asked() -> dict[str, int]:
        found = asked()
        _set(client, one)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(tracking, "approved_now", clicked_after_it_was_asked)
        watcher.look()
    assert _picture(runtime) != base
    client.delete_registered_model_alias(one.model, "approved")
    (change,) = watcher.look()
    assert change.live == ()
    assert _picture(runtime) == base
    watcher.close()


def _shown_again(judges: Judges, *, hits: int | None = None) -> Judges:
    """For the judge that reports, so many pictures of each concept, or half of them, show it no more; the others do."""
    content = as_json(judges)
    after = content["report"]["after"]
    counts = {name: found["ua"]["count"] for name, found in after["erased"].items()}
    gone = {name: count // 2 if hits is None else hits for name, count in counts.items()}
    for name, found in after["erased"].items():
        found["ua"] = as_json(rate(gone[name], counts[name]))
    after["ua"] = as_json(rate(sum(gone.values()), sum(counts.values())))
    return parse(Judges, json.dumps(content), "judges")


def test_what_failed_its_gate_is_refused_whatever_its_tag_says(
    client: MlflowClient,
    pair: tuple[AdapterVersion, AdapterVersion],
    runtime: Runtime,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = _picture(runtime)

    def still_shown(*given: Any, **named: Any) -> Judges:
        """A tiny base draws noise, which no judge takes for anything: the figure that fails is set here."""
        return _shown_again(judged(*given, **named), hits=1)

    with monkeypatch.context() as patched:
        patched.setattr("fade.steps.evaluate.judged", still_shown)
        failed = _erased("neon", "photo", **{"gate.ua": 1.0})
    assert failed.gate == "failed"
    for tag, said in (("failed", "The gate failed: "), ("passed", "its tag says that it passed")):
        client.set_model_version_tag(failed.model, str(failed.version), "gate", tag)
        _set(client, failed)
        (change,) = release.reconcile()
        assert change.live == ()
        assert said in change.refused[f"{failed.model}/1"]
        assert _tag(failed).startswith("refused: ")
        assert said in _tag(failed)
        assert _picture(runtime) == base
    client.set_model_version_tag(failed.model, str(failed.version), "gate", "failed")
    client.delete_registered_model_alias(failed.model, "approved")
    release.reconcile()
    assert _tag(failed) == "rolled back"


def test_changed_files_are_refused_and_do_not_hold_up_the_others(
    client: MlflowClient, pair: tuple[AdapterVersion, AdapterVersion]
) -> None:
    one, other = pair
    stored = next(Path(".fade/mlartifacts").rglob("pytorch_lora_weights.safetensors"))
    by_hash = {
        read_json(path.parent / "card.json")["adapter_sha256"]: path for path in stored.parents[3].rglob(stored.name)
    }
    weights = by_hash[one.adapter_sha256]
    metrics = next(Path(".fade/mlartifacts").rglob(f"{one.run_id}/artifacts/metrics.json"))
    better = json.loads(metrics.read_text())
    better["drift"] = 0.0
    for path, changed, said in (
        (weights, weights.read_bytes()[:-1] + b"\x01", "was changed"),
        (metrics, json.dumps(better).encode(), "metrics.json was changed since it was logged"),
        (metrics, b"{}", "metrics.json was changed since it was logged"),
    ):
        kept = path.read_bytes()
        assert changed != kept
        path.write_bytes(changed)
        _set(client, one, other)
        (change,) = release.reconcile()
        path.write_bytes(kept)
        assert change.live == (f"{other.model}/1",)
        assert said in change.refused[f"{one.model}/1"]
        assert said in _tag(one)
    assert release.reconcile()[0].refused == {}
    assert _tag(one) == "live"


def test_figures_changed_everywhere_but_in_the_log_are_refused(
    client: MlflowClient, pair: tuple[AdapterVersion, AdapterVersion]
) -> None:
    one, _ = pair
    stored = next(Path(".fade/mlartifacts").rglob(f"{one.run_id}/artifacts/metrics.json"))
    local = ERASURES / _id(one) / "evaluation/metrics.json"
    kept = stored.read_bytes()
    assert kept == local.read_bytes()
    better = json.dumps({**json.loads(kept), "drift": 0.0}).encode()
    for path in (stored, local):
        path.write_bytes(better)
    _set(client, one)
    (change,) = release.reconcile()
    for path in (stored, local):
        path.write_bytes(kept)
    assert change.live == ()
    assert "changed since it was logged" in change.refused[f"{one.model}/1"]
    assert release.reconcile()[0].live == (f"{one.model}/1",)


def test_what_the_ledger_stops_stays_out_until_somebody_wants_it(
    client: MlflowClient, pair: tuple[AdapterVersion, AdapterVersion]
) -> None:
    _, one = pair

    def ask(ledger: Ledger) -> str:
        message = make_message(id=str(uuid.uuid4()), kind="object", concept="cat", surrogate="horse")
        name = ledger.submit(message, PROJECT, actor="test")[0].id
        ledger.transition(name, State.RUNNING, actor="test", reason="test")
        ledger.transition(name, State.CANDIDATE, actor="test", reason="test", erasure_id=_id(one))
        return name

    _set(client, one)
    with Ledger() as ledger:
        first = ask(ledger)
        ledger.transition(first, State.SCHEDULED, actor="test", reason="again")
        ledger.hold(first, actor="court", reason="evidence")
        (change,) = release.reconcile()
        assert change.live == ()
        assert f"request {first} is on hold" in change.refused[f"{one.model}/1"]
        assert _tag(one).startswith("refused: The ledger stops it")
        assert ledger.history(erasure_id=_id(one))[-1].event == "release.refused"
        ledger.cancel(first, actor="test", reason="withdrawn")
        (change,) = release.reconcile()
        assert f"request {first} is cancelled" in change.refused[f"{one.model}/1"]
        second = ask(ledger)
        (change,) = release.reconcile()
        assert change.live == (f"{one.model}/1",), "another request wants it"
        assert ledger.get(second).state is State.LIVE
        assert ledger.get(first).state is State.CANCELLED


def test_the_page_says_what_a_reviewer_needs(
    client: MlflowClient, pair: tuple[AdapterVersion, AdapterVersion], tmp_path: Path
) -> None:
    one, other = pair
    said = client.get_model_version(one.model, "1").description
    assert "Gate: **passed**" in said
    assert "| UA | " in said
    assert "was not measured (`fade attack`)" in said
    assert f"![before and after](get-artifact?path=sheet.png&run_uuid={one.run_id})" in said
    assert f"runs/{one.run_id}/artifacts/data-docs/index.html" in said
    assert f"runs/{one.run_id}/artifacts/dvc.lock" in said
    assert "Prefect flow" in said
    assert "**With everything live**: " in said
    _set(client, other, one)
    release.reconcile()
    said = client.get_model_version(one.model, "1").description
    assert "passes the gate with 1 other (UA " in said
    sheet = tmp_path / "sheet.png"
    sheet.write_bytes(b"a picture")
    version_page.log_attack(one, attacked(inversion=(5, 20)), sheet)
    said = client.get_model_version(one.model, "1").description
    assert "still brings the concept back in **25%**" in said
    assert f"![the attack](get-artifact?path=attack.png&run_uuid={one.run_id})" in said
    assert "passes the gate with 1 other" in said, "what was said stays"
    assert "oil" not in said.replace(_id(one), "")


@pytest.mark.slow
def test_what_fails_together_is_distilled_into_one_which_goes_live_for_both(
    client: MlflowClient, pair: tuple[AdapterVersion, AdapterVersion], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = pair
    _set(client, one)
    release.reconcile()
    # A tiny base draws noise, which no judge takes for anything: the figure that fails is set here.
    found = together.combination_folder([check_version(version) for version in pair]) / "metrics.json"
    together.measure_together([check_version(version) for version in pair])
    kept = found.read_bytes()
    metrics = load(Combination, found)
    dump(metrics.model_copy(update={"judges": _shown_again(metrics.judges)}), found)
    monkeypatch.setattr(together, "strictest", lambda _: Gate(ua=0.9, ira_loss=1.0, cra_loss=1.0, recognised=0))
    _set(client, other)
    (change,) = release.reconcile()
    assert change.live == (f"{one.model}/1",)
    assert "is 0.5000" in change.waiting[f"{other.model}/1"]
    assert "one adapter for all of it is being distilled" in change.waiting[f"{other.model}/1"]
    assert _tag(other).startswith("waiting: together with what is live")
    together.wait_for_consolidations()
    (change,) = release.reconcile()
    whole = tracking.versions()[-1]
    assert whole.model not in (one.model, other.model), Path(".fade/consolidate.log").read_text()[-2000:]
    assert f"approve {whole.model}/1, which erases all of it at once" in change.waiting[f"{other.model}/1"]
    assert "candidate" in whole.aliases
    # The one adapter, approved, takes the place of both.
    _set(client, whole)
    (change,) = release.reconcile()
    assert change.live == (f"{whole.model}/1",)
    assert change.removed == (f"{one.model}/1",)
    assert "is erased by" in change.waiting[f"{other.model}/1"]
    monkeypatch.undo()
    found.write_bytes(kept)
    client.delete_registered_model_alias(whole.model, "approved")
    (change,) = release.reconcile()
    assert set(change.live) == {f"{one.model}/1", f"{other.model}/1"}, "taken back, each stands for itself again"


def test_a_manifest_holds_for_its_time_and_is_signed_anew_while_someone_watches(
    client: MlflowClient,
    pair: tuple[AdapterVersion, AdapterVersion],
    runtime: Runtime,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _set(client, pair[0])
    times = {"watch": 0.0, "runtime": 0.0}

    def clock(whose: str) -> datetime:
        return datetime.now(UTC) + timedelta(seconds=times[whose])

    monkeypatch.setattr(seen, "wall_time", lambda: clock("runtime"))
    watcher = watch.Watch(valid_seconds=600, rehearse=False, now=lambda: clock("watch"))
    (change,) = watcher.look()
    swapped = runtime.refresh()
    assert swapped.manifest.valid_seconds == 600
    assert watcher.look() == []
    assert runtime.refresh().manifest.counter == change.counter, "half of its time is not over"
    times["watch"] = 301.0
    assert watcher.look() == []
    signed_anew = runtime.refresh()
    assert signed_anew.manifest.counter > change.counter
    assert signed_anew.adapters is swapped.adapters, "the same release, signed anew, is not read anew"
    times["runtime"] = 590.0
    assert runtime.refresh().manifest.counter == signed_anew.manifest.counter
    times["runtime"] = 601.0
    with pytest.raises(RefusedError, match="was valid for 600 s"):
        runtime.refresh()
    manifests.reissue(valid_seconds=0, now=lambda _: True)
    assert runtime.refresh().manifest.adapters == swapped.manifest.adapters


def test_a_candidate_is_tested_before_it_is_approved(
    client: MlflowClient, pair: tuple[AdapterVersion, AdapterVersion]
) -> None:
    _set(client, pair[0])
    client.set_model_version_tag(pair[1].model, "1", "together", "")
    _forget(*pair)
    with _watching() as watcher:
        assert watcher.look()
        deadline = time.monotonic() + 300
        while "with 1 other" not in client.get_model_version(pair[1].model, "1").tags["together"]:
            assert time.monotonic() < deadline, "other candidates may come first, but not for ever"
            assert not any(change.added or change.removed for change in watcher.look())
            time.sleep(0.05)
    assert together.verdict_together([check_version(version) for version in pair])


def _forget(*versions: AdapterVersion) -> None:
    """As if nobody had measured these together yet."""
    folder = together.combination_folder([check_version(version) for version in versions])
    (folder / "metrics.json").unlink(missing_ok=True)


@contextmanager
def _watching() -> Iterator[watch.Watch]:
    watcher = watch.Watch(valid_seconds=0)
    yield watcher
    watcher.close()


def _look_until_tested(watcher: watch.Watch, *versions: AdapterVersion) -> int:
    """Look until these are being tested together, and halt that for good; the process's id."""
    names = {f"{one.model}/{one.version}" for one in versions}
    for _ in range(50):
        watcher.look()
        if watcher.measuring is not None:
            if {one.name for one in watcher.measuring.of.chosen} == names:
                os.kill(watcher.measuring.process.pid, signal.SIGSTOP)
                return watcher.measuring.process.pid
            watcher.measuring.process.wait()  # another candidate's turn
    raise AssertionError(f"{names} were never tested")


def test_no_click_waits_for_a_rehearsal(
    client: MlflowClient, pair: tuple[AdapterVersion, AdapterVersion], third: AdapterVersion
) -> None:
    one, other = pair
    together.measure_together([check_version(version) for version in (one, third)])
    _set(client, one)
    release.reconcile()
    _forget(*pair)
    with _watching() as watcher:
        # A rehearsal that never ends: whatever happens from here on happens before its end.
        _look_until_tested(watcher, *pair)
        _set(client, third)
        (change,) = watcher.look()
        assert change.live == (f"{one.model}/1", f"{third.model}/1")
        assert watcher.measuring is None, "what it would have told is of what was live before"
        _forget(one, other, third)
        _look_until_tested(watcher, one, other, third)
        client.delete_registered_model_alias(one.model, "approved")
        (change,) = watcher.look()
        assert change.live == (f"{third.model}/1",)


def test_no_click_waits_for_the_test_of_another_approval(
    client: MlflowClient, pair: tuple[AdapterVersion, AdapterVersion], third: AdapterVersion
) -> None:
    one, other = pair
    together.measure_together([check_version(version) for version in (one, third)])
    _set(client, one)
    release.reconcile()
    for tested in ((one, other), (one, other, third)):
        _forget(*tested)
    with _watching() as watcher:
        _set(client, other)
        halted = _look_until_tested(watcher, *pair)
        assert _tag(other) == f"waiting: {together.TESTED}"
        _set(client, third)
        (change,) = watcher.look()
        assert change.live == (f"{one.model}/1", f"{third.model}/1"), "what is known to hold is live"
        assert watcher.measuring is not None
        assert watcher.measuring.process.pid != halted, "the test goes on with what is live now"
        os.kill(watcher.measuring.process.pid, signal.SIGSTOP)
        client.delete_registered_model_alias(one.model, "approved")
        (change,) = watcher.look()
        assert change.live == (f"{third.model}/1",), "and what was taken back is out"
        assert (_tag(one), _tag(third)) == ("rolled back", "live")


def test_what_cannot_be_tested_stays_out_and_is_tried_again(
    client: MlflowClient, pair: tuple[AdapterVersion, AdapterVersion], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = pair
    _set(client, one)
    release.reconcile()
    _forget(*pair)
    with _watching() as watcher:
        _set(client, other)
        os.kill(_look_until_tested(watcher, *pair), signal.SIGKILL)
        watcher.measuring.process.wait()
        (change,) = watcher.look()
        assert change.live == (f"{one.model}/1",)
        assert "cannot be tested: its process was ended by signal 9" in change.waiting[f"{other.model}/1"]
        monkeypatch.setattr(watch, "LOOK_AGAIN_SECONDS", 0.0)
        deadline = time.monotonic() + 300
        while f"{other.model}/1" not in watcher.look()[0].live:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_why_a_test_failed_is_said(
    client: MlflowClient, pair: tuple[AdapterVersion, AdapterVersion], tmp_path: Path
) -> None:
    one, other = (check_version(version) for version in pair)
    measuring = together.Measurement(together.Wanted((one, replace(other, adapter=tmp_path))))
    measuring.process.wait()
    assert "card.json" in measuring.reason


def test_only_mlflows_own_signature_wakes_the_watch() -> None:
    watcher = watch.Watch(valid_seconds=0)
    secret, body, now = "a-secret-for-tests-alone", b'{"entity": "model_version_alias"}', str(int(time.time()))
    from mlflow.webhooks.delivery import _generate_hmac_signature

    good = {
        "X-MLflow-Delivery-Id": "d1",
        "X-MLflow-Timestamp": now,
        "X-MLflow-Signature": _generate_hmac_signature(secret, "d1", now, body.decode()),
    }
    http = TestClient(watch.webhook_app(watcher, secret))
    for changed in (
        {**good, "X-MLflow-Timestamp": str(int(now) - 1)},
        {**good, "X-MLflow-Delivery-Id": "d2"},
        {**good, "X-MLflow-Signature": good["X-MLflow-Signature"][:-2] + "=="},
        {},
    ):
        assert http.post("/mlflow", content=body, headers=changed).status_code == 401
    assert http.post("/mlflow", content=body + b" ", headers=good).status_code == 401
    old = {name.lower(): value for name, value in good.items()}
    assert watch.is_genuine(body, old, secret)
    assert not watch.is_genuine(body, old, secret, now=int(now) + 301)
    assert not watcher.woken.is_set()
    assert http.post("/mlflow", content=body, headers=good).status_code == 204
    assert watcher.woken.is_set()
    with pytest.raises(ConfigError, match="at least 16 characters"):
        watch.webhook_app(watcher, "short")


def test_the_service_draws_what_the_runtime_draws_and_nothing_without_a_token(
    client: MlflowClient, pair: tuple[AdapterVersion, AdapterVersion], runtime: Runtime
) -> None:
    import io

    from PIL import Image

    _set(client, pair[0])
    release.reconcile()
    http = TestClient(runtime_http.make_app(runtime, token=TOKEN), base_url="http://127.0.0.1")
    asked = {"prompt": PROMPT, "seed": 1, "steps": 2, "guidance": 2.0}
    for path in ("/live", "/metrics"):
        assert http.get(path).status_code == 401
    assert http.post("/generate", json=asked).status_code == 401
    assert http.get("/live", headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert http.get("/health").json() == {"status": "serving"}
    http.headers["Authorization"] = f"Bearer {TOKEN}"
    answer = http.post("/generate", json=asked)
    drawn = np.asarray(Image.open(io.BytesIO(answer.content)))
    assert drawn.tobytes() == _picture(runtime)
    assert answer.headers["x-fade-counter"] == str(http.get("/live").json()["counter"])
    assert http.post("/generate", json={**asked, "base": True}).status_code == 403
    open_ = TestClient(
        runtime_http.make_app(runtime, token=TOKEN, compare=True),
        base_url="http://127.0.0.1",
        headers=dict(http.headers),
    )
    base = np.asarray(Image.open(io.BytesIO(open_.post("/generate", json={**asked, "base": True}).content)))
    assert not np.array_equal(base, drawn)
    for wrong in ({"prompt": ""}, {"steps": 0}, {"seed": -1}, {"guidance": 99}, {"other": 1}):
        assert http.post("/generate", json={**asked, **wrong}).status_code == 422
    said = http.get("/metrics").text
    assert 'fade_pictures_total{with="live"} 1.0' in said
    assert "fade_live_adapters 1.0" in said
    manifest = runtime.release / "manifest.json"
    kept = manifest.read_bytes()
    manifest.write_bytes(kept[:-1])
    assert http.post("/generate", json=asked).status_code == 503
    assert http.get("/health").status_code == 503
    manifest.write_bytes(kept)
    assert http.post("/generate", json=asked).content == answer.content
    assert "COMPARE" not in http.get("/").text


def test_the_terminal_says_what_is_live(
    client: MlflowClient, pair: tuple[AdapterVersion, AdapterVersion], tmp_path: Path
) -> None:
    found = tmp_path / "live.json"
    result = CliRunner().invoke(app, ["approve", _id(pair[0])])
    assert result.exit_code == 0, result.output
    assert "is live" in result.output
    assert CliRunner().invoke(app, ["live", "--json", str(found)]).exit_code == 0
    (manifest,) = [one for one in read_json(found)["releases"] if one["adapters"]]
    assert manifest["adapters"][0]["adapter_sha256"] == pair[0].adapter_sha256
    assert CliRunner().invoke(app, ["rollback", _id(pair[0])]).exit_code == 0
    assert "the base alone" in CliRunner().invoke(app, ["release"]).output
    assert CliRunner().invoke(app, ["live", "--json", str(found)]).exit_code == 0
    assert not any(one["adapters"] for one in read_json(found)["releases"])
