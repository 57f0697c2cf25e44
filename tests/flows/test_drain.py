"""The drain on a tiny base: outcomes, refusals, retries; what is told over HTTP and by webhooks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient
from filelock import FileLock, Timeout

from fade.asking.further import FURTHER, forget_too, further_hashes
from fade.asking.prepare import prepare_spec
from fade.config import load_settings
from fade.data.catalog import load_catalog, load_concepts
from fade.errors import (
    BaseModelError,
    ConfigError,
    DataError,
    LeaseLostError,
    RegistryError,
    ResourceError,
    SignatureError,
)
from fade.lineage import ROOT
from fade.project import PARAMS, Project, Projects, load_project
from fade.requests import leases, webhooks
from fade.requests.ledger import Ledger
from fade.requests.messages import make_message
from fade.requests.overview import near_deadlines, overview
from fade.requests.records import utc_now
from fade.requests.states import State
from fade.spec import Spec
from flows.erasing import erase as erasing
from flows.proving import traces
from flows.queue import drain as drained
from flows.queue.drain import DrainSettings, alive, drain
from flows.queue.schedules import MISSED, cancel_missed
from flows.queue.together import drain_together
from flows.services.intake_http import make_app, token
from tasks import erasure
from tasks.dvc.objects import stores
from tasks.mlflow import client as mlflow_reached
from tasks.mlflow import runs as mlflow_runs
from tasks.mlflow import tracking
from tasks.mlflow.client import mlflow_client
from tests.tiny import PROJECT, PROJECTS, write_project
from tests.unit.test_by_name import save_clip

TOKEN = "a token of the test"
KEY = b"a key of the test"


@pytest.fixture
def ledger(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    monkeypatch.setenv("FADE_LEDGER_URL", f"sqlite:///{tmp_path / 'ledger.db'}")
    with Ledger() as found:
        yield found


def ask(ledger: Ledger, concept: str = "cat", *, project: Project = PROJECT, **changes: Any) -> str:
    asked = {"id": str(uuid.uuid4()), "kind": "object", "concept": concept, "surrogate": "horse", **changes}
    return ledger.submit(make_message(**asked), project, actor="test")[0].id


def test_what_is_due_is_run_and_what_is_wrong_is_asked_about(
    ledger: Ledger, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_runs, "LIVE_SECONDS", 0)
    good, wrong = ask(ledger), ask(ledger, "astronot")
    other = Path("projects/nowhere/params.yaml")
    write_project(other, PROJECT.model_copy(update={"name": "nowhere", "base": "data/base/nowhere"}))
    nowhere = ask(ledger, project=load_project(other))
    held = ask(ledger, "coffee")
    ledger.hold(held, actor="test", reason="court")
    assert drain(limit=1, projects=[other]) == {"failed": 1}
    assert drain() == {"candidate": 1, "needs_input": 1}
    record = ledger.get(good)
    assert record.state is State.CANDIDATE
    assert (workspace / "data/erasures" / str(record.erasure_id) / "adapter/card.json").is_file()
    (version,) = [one for one in tracking.versions() if one.erasure == record.erasure_id]
    with mlflow_client() as client:
        curve = client.get_metric_history(version.run_id, "forget_loss")
        runs = client.search_runs(
            [client.get_run(version.run_id).info.experiment_id], f"tags.erasure = '{version.erasure}'"
        )
    assert [point.step for point in curve] == [1, 2, 3, 4]
    assert all(point.timestamp for point in curve)  # sent while it was trained, not when it was registered
    assert [run.info.status for run in runs] == ["FINISHED"]
    assert ledger.get(wrong).state is State.NEEDS_INPUT
    assert "Did you mean 'astronaut'" in str(ledger.get(wrong).reason)
    logged = [entry.reason for entry in ledger.history(request_id=wrong)]
    assert any(reason.startswith("ConfigError") for reason in logged)
    assert not any("astronaut" in reason for reason in logged), "the log, which never changes, suggests nobody"
    assert "No base model" in str(ledger.get(nowhere).reason)
    assert ledger.get(held).state is State.ON_HOLD
    assert drain() == {}
    again = ask(ledger)
    assert drain() == {"candidate": 1}  # the same erasure: all of it is current, nothing is made twice
    assert ledger.get(again).erasure_id == record.erasure_id
    ledger.verify()


def test_a_project_of_a_base_and_a_clip_erases_what_a_message_names(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine" / PARAMS.name
    write_project(file, PROJECT.model_copy(update={"name": "mine", "catalog": "nowhere", "render": None}))
    content = yaml.safe_load(file.read_text())
    content["project"]["clip"] = str(save_clip(tmp_path / "clip"))
    file.write_text(yaml.safe_dump(content))
    project = load_project(file)
    assert project.by_name

    def asked(name: str) -> Spec:
        record = ledger.get(name)
        return drained._asked(ledger, record, project, str(record.concept))

    first = ask(ledger, "cat", project=project, kind="object", surrogate="auto", aliases=["moggy"])
    spec = asked(first)
    assert (spec.by_name, spec.concept, spec.aliases, spec.base) == (True, "cat", ("moggy",), project.base)
    assert spec.clip_sha256 is not None
    # What another request has erased is nobody's surrogate.
    monkeypatch.setattr(drained, "erased_among", lambda *_, **__: {spec.surrogate})
    assert asked(first).surrogate != spec.surrogate
    # A night's adapter for all is made of a catalog: these are left to run one by one.
    assert drain_together(ledger, "w", Projects((project,)), DrainSettings()) == {}
    assert ledger.get(first).state is not State.RUNNING
    with pytest.raises(DataError, match="erases by name alone"):
        asked(ask(ledger, "cat", project=project, pictures=["1"]))
    with pytest.raises(ConfigError, match="contains the concept"):
        asked(ask(ledger, "cat", project=project, surrogate="a fat cat"))


def test_what_may_pass_is_repeated_with_growing_waits_and_given_up(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = ask(ledger)

    def refuse(*_: object) -> None:
        raise RegistryError("MLflow is down, cat")

    monkeypatch.setattr(drained, "_erase", refuse)
    now, waits = utc_now(), []
    for _ in range(3):
        lease = leases.take(ledger, "w", seconds=60, now=now)
        assert lease
        drained.run_one(ledger, lease, PROJECTS, DrainSettings(attempts=3, retry_seconds=100))
        record = ledger.get(name)
        if record.not_before:
            waits.append(round((record.not_before - record.state_at).total_seconds(), -1))
            now = record.not_before
    assert waits == [100, 200]
    assert record.state is State.FAILED
    assert "given up after 3 attempts: MLflow is down" in str(record.reason)
    assert all("cat" not in entry.reason for entry in ledger.history(request_id=name))


@pytest.mark.parametrize(
    ("error", "state"),
    [(ConfigError("x"), "needs_input"), (BaseModelError("x"), "failed"), (OSError("disk"), "scheduled")],
)
def test_a_refusal_is_not_repeated_and_a_fault_is(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, error: Exception, state: str
) -> None:
    name = ask(ledger)

    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(drained, "_erase", refuse)
    lease = leases.take(ledger, "w", seconds=60)
    assert lease
    assert drained.run_one(ledger, lease, PROJECTS, DrainSettings()) == state
    assert ledger.get(name).state == state


def test_a_lease_is_renewed_while_work_goes_on(ledger: Ledger) -> None:
    name = ask(ledger)
    lease = leases.take(ledger, "w", seconds=1)
    assert lease
    with alive(lambda: leases.renew(ledger, lease, seconds=1, step="mask"), 1):
        deadline = time.monotonic() + 20
        while ledger.get(name).step != "mask" and time.monotonic() < deadline:
            time.sleep(0.05)
        record = ledger.get(name)
    assert record.step == "mask"
    assert record.lease_until is not None
    assert record.lease_until > lease.until


def test_a_worker_that_lost_its_lease_changes_nothing(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    name = ask(ledger)
    lease = leases.take(ledger, "w", seconds=60)
    assert lease
    ledger.cancel(name, actor="test", reason="withdrawn")
    monkeypatch.setattr(drained, "_erase", lambda *_: {"after": State.CANDIDATE, "reason": "done"})
    assert drained.run_one(ledger, lease, PROJECTS, DrainSettings()) == "lost"
    assert ledger.get(name).state is State.CANCELLED
    with pytest.raises(LeaseLostError):
        leases.renew(ledger, lease, seconds=1)


def aliases() -> set[str]:
    return {alias for version in tracking.versions() for alias in version.aliases}


@pytest.mark.parametrize("when", ["between two steps", "while it registers", "after it has ended"])
def test_what_was_withdrawn_is_not_on_offer_and_asked_again_it_is(
    ledger: Ledger, workspace: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    concept = {"between two steps": "temple"}.get(when, "cat")
    before = {version.model for version in tracking.versions()}
    name = ask(ledger, concept)

    def cancelling(function: Any) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            ledger.cancel(name, actor="test", reason="withdrawn")
            return function(*arguments, **options)

        return wrapped

    with monkeypatch.context() as patched:
        if when == "between two steps":
            patched.setattr(erasure, "run_step", cancelling(erasure.run_step))
        elif when == "while it registers":
            patched.setattr(erasure, "register", cancelling(erasure.register))
        ended = drain()
    if when == "after it has ended":
        assert ended == {"candidate": 1}
        assert "candidate" in aliases()
        ledger.cancel(name, actor="test", reason="withdrawn")
        assert drain() == {}
    else:
        assert ended == {"lost": 1}
    record = ledger.get(name)
    assert record.state is State.CANCELLED
    made = [version for version in tracking.versions() if version.erasure == record.erasure_id]
    if when == "between two steps":
        assert {version.model for version in tracking.versions()} == before  # it stopped before it was trained
        return
    assert [version.offered for version in made] == [False]
    assert "every request for it was cancelled" in made[0].release
    ask(ledger, concept)
    assert drain() == {"candidate": 1}
    assert [version.offered for version in tracking.versions() if version.erasure == record.erasure_id] == [True]
    ledger.verify()


def test_one_process_at_a_time_works_on_an_erasure(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(erasing, "WAIT_SECONDS", 0.2)
    refused = pytest.raises(ResourceError, match="Another process is at work")
    with FileLock(".fade/erase-e1.lock"), refused, erasing._alone("e1"):
        pass
    with erasing._alone("e1"):
        pass


def test_the_overview_counts_and_shows_the_most_urgent_first(ledger: Ledger) -> None:
    late = ask(ledger, "cat", received_at=(utc_now() - timedelta(days=60)).isoformat())
    new = ask(ledger, "horse", surrogate="cat")
    found = overview(ledger)
    assert (found.counts, found.overdue) == ({"scheduled": 2}, 1)
    assert [record.id for record in found.urgent] == [late, new]
    assert [record.id for record in near_deadlines(ledger, days=5)] == [late]


@pytest.fixture
def client(ledger: Ledger) -> TestClient:
    return TestClient(
        make_app(ledger, PROJECTS, expected=TOKEN),
        base_url="http://127.0.0.1",
        headers={"authorization": f"Bearer {TOKEN}"},
    )


def test_requests_are_taken_followed_and_withdrawn_over_http(client: TestClient, ledger: Ledger) -> None:
    asked = {"id": str(uuid.uuid4()), "kind": "person", "concept": "astronaut", "subject": "s-1"}
    first = client.post("/requests", json=asked)
    assert (first.status_code, first.json()["status"]) == (201, "scheduled")
    assert "astronaut" not in first.text
    assert client.post("/requests", json=asked).status_code == 200
    conflict = client.post("/requests", json={**asked, "concept": "cat"})
    assert conflict.status_code == 409
    assert "with other content" in conflict.json()["detail"]
    bad = client.post("/requests", json={**asked, "kind": "dog"})
    assert (bad.status_code, "kind" in bad.json()["detail"]) == (422, True)
    assert client.post("/requests", content=b"x" * (2 << 20)).status_code == 413
    where = f"/requests/{asked['id']}"
    assert client.get(where).json()["due_at"] == ledger.get(asked["id"]).due_at.isoformat()
    assert client.delete(where).json()["status"] == "cancelled"
    assert client.delete(where).status_code == 409
    assert client.get(f"/requests/{uuid.uuid4()}").status_code == 404
    figures = client.get("/metrics").text
    assert 'fade_requests{state="cancelled"} 1.0' in figures
    assert 'fade_requests{state="live"} 0.0' in figures
    assert "fade_dead_letters_total 0.0" in figures
    assert "# TYPE fade_erasure_seconds histogram" in figures


@pytest.mark.parametrize("header", [None, "Bearer wrong", f"Basic {TOKEN}", "Bearer \xe9"])
def test_nothing_is_told_without_the_token(ledger: Ledger, header: str | None) -> None:
    client = TestClient(make_app(ledger, PROJECTS, expected=TOKEN), base_url="http://127.0.0.1")
    headers = {"authorization": header.encode("latin-1")} if header else {}
    for method, path in (("POST", "/requests"), ("GET", "/requests/x"), ("DELETE", "/requests/x"), ("GET", "/metrics")):
        assert client.request(method, path, headers=headers).status_code == 401
    assert client.get("/health").status_code == 200


def test_secrets_must_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, read in (("FADE_INTAKE_TOKEN", token), ("FADE_WEBHOOK_SECRET", webhooks.secret)):
        monkeypatch.setenv(name, "short")
        with pytest.raises(ConfigError, match=f"{name} must hold at least 16"):
            read()


def test_each_state_reaches_its_callback_signed_and_none_is_lost(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FADE_WEBHOOK_NETWORKS", "127.0.0.1/32")  # a receiver on loopback needs its network named
    got: list[tuple[bytes, int, str]] = []
    answers = [500, 200]

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            status = answers.pop(0) if answers else 200
            if status == 200:
                got.append((body, int(self.headers["x-fade-timestamp"]), self.headers["x-fade-signature"]))
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        name = ask(ledger, callback_url=f"http://127.0.0.1:{server.server_port}/hook")
        ask(ledger, "horse", surrogate="cat")  # asked for none
        assert overview(ledger).webhooks == 2
        assert webhooks.deliver(ledger, key=KEY) == (1, 1)
        assert webhooks.deliver(ledger, key=KEY) == (0, 0)  # its turn is not yet
        ledger.cancel(name, actor="test", reason="withdrawn")
        assert webhooks.deliver(ledger, key=KEY, now=utc_now() + timedelta(minutes=1)) == (2, 0)
    finally:
        server.shutdown()
        server.server_close()
    bodies = [json.loads(body) for body, _, _ in got]
    assert {body["state"] for body in bodies} == {"received", "scheduled", "cancelled"}
    assert overview(ledger).webhooks == 0
    ledger.verify()  # that they were sent is sealed
    body, timestamp, signature = got[0]
    webhooks.check(body, timestamp=timestamp, signature=signature, key=KEY)
    with pytest.raises(SignatureError, match="does not fit"):
        webhooks.check(body + b" ", timestamp=timestamp, signature=signature, key=KEY)
    later = utc_now() + timedelta(minutes=6)
    with pytest.raises(SignatureError, match="older than five"):
        webhooks.check(body, timestamp=timestamp, signature=signature, key=KEY, now=later)


def test_a_receiver_that_is_down_is_tried_again(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FADE_WEBHOOK_NETWORKS", "127.0.0.1/32")
    ask(ledger, callback_url="http://127.0.0.1:9/hook")
    assert webhooks.waiting(ledger)[0] == {"not tried yet": 2}
    assert webhooks.deliver(ledger, key=KEY) == (0, 2)
    assert overview(ledger).webhooks == 2
    reasons, next_at = webhooks.waiting(ledger)
    assert reasons == {"ConnectError": 2}
    assert next_at is not None
    assert next_at > utc_now()
    monkeypatch.delenv("FADE_WEBHOOK_NETWORKS")
    webhooks.deliver(ledger, key=KEY, now=utc_now() + timedelta(minutes=1))
    assert [*webhooks.waiting(ledger)[0]] == [
        "The callback's address is not public: name its network in FADE_WEBHOOK_NETWORKS."
    ]


def test_auto_takes_for_a_surrogate_nothing_that_another_request_has_erased(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two adapters trained to give each other's concept would each undo the other once both are live."""
    chosen: list[tuple[str, str]] = []

    def stop(concept: str, surrogate: str, **given: Any) -> None:
        spec = prepare_spec(concept, surrogate, **given)
        chosen.append((spec.concept, spec.surrogate))
        raise ConfigError("far enough")

    monkeypatch.setattr(drained, "prepare_spec", stop)
    first = ask(ledger, "cat", surrogate="auto")
    lease = leases.take(ledger, "w", seconds=60)
    assert lease
    drained.run_one(ledger, lease, PROJECTS, DrainSettings())
    nearest = chosen[0][1]

    other = ask(ledger, nearest, surrogate="horse" if nearest != "horse" else "coins")
    for state in (State.RUNNING, State.CANDIDATE):
        ledger.transition(other, state, actor="test", reason="")
    concepts = load_concepts(Path(PROJECT.catalog))
    assert drained.forgotten(ledger, ledger.get(first), concepts) == [nearest]
    assert drained.forgotten(ledger, ledger.get(other), concepts) == []
    ledger.transition(first, State.SCHEDULED, actor="test", reason="")
    lease = leases.take(ledger, "w", seconds=60)
    assert lease
    drained.run_one(ledger, lease, PROJECTS, DrainSettings())
    assert chosen[1][0] == "cat"
    assert chosen[1][1] not in (nearest, "cat")


def _forgets(folder: Path) -> set[str]:
    """SHA-256 of the pictures that a purge of an erasure takes."""
    with stores() as opened:
        return traces._picture_hashes(folder, [], [], opened)


def test_own_pictures_of_what_is_erased_join_that_erasure_and_its_purge(ledger: Ledger, workspace: Path) -> None:
    """Another person's request is no duplicate: it has a deadline, an outcome, and its pictures leave with a purge."""
    spec = prepare_spec("coins", "horse", project=PROJECT, settings=load_settings(Path("params.yaml")))
    folder = erasing.prepare_folder(spec)
    first = ask(ledger, "coins")
    for state in (State.RUNNING, State.CANDIDATE, State.LIVE):
        ledger.transition(first, state, actor="test", reason="", erasure_id=spec.id)
    table = load_catalog(Path(PROJECT.catalog))
    mine = table[table["object"] == "coins"].iloc[0]
    other = table[table["object"] == "cat"].iloc[0]
    name = ask(ledger, "Coins", subject=None, pictures=[mine["image_id"]])
    assert ledger.get(name).state is State.SCHEDULED
    assert near_deadlines(ledger, days=40)[-1].id == name
    assert further_hashes(folder) == set()
    before = _forgets(folder)
    assert mine["sha256"] not in before

    def run() -> str:
        lease = leases.take(ledger, "w", seconds=60)
        assert lease
        return drained.run_one(ledger, lease, PROJECTS, DrainSettings())

    try:
        assert run() == "live"
        record = ledger.get(name)
        assert (record.state, record.erasure_id) == (State.LIVE, spec.id)
        assert "1 of its own pictures" in str(record.reason)
        assert further_hashes(folder) == {mine["sha256"]}
        nothing: Any = None  # no lock files, so no store is asked
        assert mine["sha256"] in traces._picture_hashes(folder, [], [], nothing)  # and so a purge takes it
        assert _forgets(folder) - before == {mine["sha256"]}
        assert forget_too(folder, image_ids=[mine["image_id"]], subjects=[]) == 1
        assert further_hashes(folder) == {mine["sha256"]}
        for wrong, said in ((other["image_id"], "do not show what is erased"), ("nowhere/1", "holds no picture")):
            asked = ask(ledger, "coins", pictures=[wrong])
            assert run() == "needs_input"
            assert said in str(ledger.get(asked).reason)
        assert further_hashes(folder) == {mine["sha256"]}
        ledger.verify()
    finally:
        (folder / FURTHER).unlink()


def test_a_schedule_has_its_time_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Any] = []
    monkeypatch.setattr(drained, "serve", lambda *deployments, **_: served.extend(deployments))
    drained.serve_schedule("0 3 * * *", "Europe/Berlin", projects=[Path("mine/params.yaml")])
    drained.serve_schedule("*/5 * * * *", projects=[PARAMS])
    found = [(one.name, one.schedules[0].schedule.cron, one.schedules[0].schedule.timezone) for one in served]
    assert found[0] == ("drain", "0 3 * * *", "Europe/Berlin")
    assert found[2] == ("drain", "*/5 * * * *", "UTC")
    assert served[0].parameters == {"projects": ["mine/params.yaml"], "together": False}
    with pytest.raises(ConfigError, match="Did you mean 'Europe/Berlin'"):
        drained.serve_schedule("0 3 * * *", "Europe/Berln", projects=[PARAMS])


def test_runs_that_were_missed_are_done_by_one(workspace: Path) -> None:
    from prefect.client.orchestration import get_client
    from prefect.states import Scheduled

    deployment = drain.to_deployment(name=f"missed-{uuid.uuid4().hex[:8]}").apply()
    now = utc_now()
    with get_client(sync_client=True) as client:

        def make(minutes: int, **parameters: Any) -> str:
            state = Scheduled(scheduled_time=now + timedelta(minutes=minutes))
            return str(client.create_flow_run_from_deployment(deployment, state=state, parameters=parameters).id)

        mine, *missed = [make(-minutes) for minutes in range(4)]
        kept = [make(5), make(-5, limit=1)]
        assert cancel_missed(str(deployment), besides=mine) == 3
        assert cancel_missed(str(deployment), besides=mine) == 0
        states = {name: client.read_flow_run(uuid.UUID(name)).state for name in (mine, *missed, *kept)}
        client.delete_deployment(deployment)
    assert {states[name].type.value for name in (mine, *kept)} == {"SCHEDULED"}
    assert {(states[name].type.value, states[name].message) for name in missed} == {("CANCELLED", MISSED)}


def test_the_embedded_store_is_made_by_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr(mlflow_reached, "WAIT_SECONDS", 0.1)
    with FileLock(".fade/mlflow.lock"), pytest.raises(Timeout), mlflow_client():
        pass
    assert not (tmp_path / "mlflow.db").exists()
    with mlflow_client() as client:
        assert len(client.search_experiments()) == 1
    with FileLock(".fade/mlflow.lock"), mlflow_client():
        pass  # known to be made: nobody waits a second time


FIRST_USE = """
import pathlib, sys, time
from tasks.mlflow.client import experiment, mlflow_client
pathlib.Path(sys.argv[1]).touch()
while len(list(pathlib.Path().glob("ready-*"))) < 2:
    time.sleep(0.005)
with mlflow_client() as client:
    client.search_registered_models()
    print(experiment(client, "erasures"))
"""


@pytest.mark.slow
def test_two_at_first_use_make_one_store(tmp_path: Path) -> None:
    """MLflow's tables and the experiment are made by whoever is first; the other waits for it and fails at nothing."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    variables.pop("MLFLOW_TRACKING_URI", None)
    both = [
        subprocess.Popen(
            [sys.executable, "-c", FIRST_USE, f"ready-{number}"],
            cwd=tmp_path, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    ended = [(*one.communicate(timeout=300), one.returncode) for one in both]
    assert [status for *_, status in ended] == [0, 0], ended
    assert ended[0][0].strip() == ended[1][0].strip() != ""
