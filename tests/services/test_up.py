"""`fade up` for real, ledger and Prefect on PostgreSQL: it answers, its schedule makes runs, Ctrl-C ends all of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from fade.requests.ledger import Ledger
from fade.requests.records import utc_now
from tests.databases import database
from tests.flows.test_cli import run
from tests.servers import AUTH, free_port, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(700)]


@dataclass(frozen=True)
class Up:
    process: subprocess.Popen[str]
    said: list[str]
    ports: dict[str, int]
    environment: dict[str, str]

    def api(self, path: str, **body: Any) -> Any:
        spec = urllib.request.Request(
            f"http://127.0.0.1:{self.ports['prefect']}/api/{path}",
            data=json.dumps(body).encode(),
            headers={"content-type": "application/json", **AUTH},
        )
        with urllib.request.urlopen(spec, timeout=20) as answer:
            return json.load(answer)


@pytest.fixture(scope="module")
def up(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    ports = {name: free_port() for name in ("mlflow", "prefect", "intake")}
    folder = tmp_path_factory.mktemp("up")
    with database("postgresql", folder) as ledger, database("postgresql", folder) as prefect:
        environment = {
            "FADE_LEDGER_URL": ledger,
            "PREFECT_API_DATABASE_CONNECTION_URL": prefect.replace("+psycopg", "+asyncpg"),
        }
        options = [part for name, port in ports.items() for part in (f"--{name}-port", str(port))]
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.cli.app", "up", *options, "--cron", "0 3 * * *"],
            cwd=workspace,
            env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        said: list[str] = []
        try:
            for line in process.stdout:
                said.append(line)
                if line.startswith("Ctrl-C"):
                    break
            else:
                pytest.fail("".join(said))
            yield Up(process, said, ports, environment)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            process.wait(timeout=240)


def ask(concept: str) -> dict[str, Any]:
    received = (utc_now() - timedelta(days=25)).isoformat()
    return {"id": str(uuid.uuid4()), "kind": "object", "concept": concept, "received_at": received}


def test_it_prints_where_everything_is(up: Up) -> None:
    text = "".join(up.said)
    for port in up.ports.values():
        assert f"http://127.0.0.1:{port}" in text
    assert "intake-token" in text
    assert "set FADE_WEBHOOK_SECRET" in text


def test_requests_come_in_over_http_and_by_the_queue(up: Up, workspace: Path) -> None:
    by_http, by_queue = ask("cat"), ask("horse")
    token = (workspace / ".fade/intake-token").read_text()
    assert (workspace / ".fade/intake-token").stat().st_mode & 0o777 == 0o600
    address = f"http://127.0.0.1:{up.ports['intake']}/requests"
    spec = urllib.request.Request(address, data=json.dumps(by_http).encode())
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(spec, timeout=20)
    spec.add_header("authorization", f"Bearer {token}")
    with urllib.request.urlopen(spec, timeout=20) as answer:
        assert answer.status == 201
    (workspace / ".fade/queue").mkdir(exist_ok=True)
    partial = workspace / ".fade/queue/one.partial"
    partial.write_text(json.dumps(by_queue))
    partial.rename(partial.with_suffix(".json"))
    with Ledger(up.environment["FADE_LEDGER_URL"]) as ledger:
        assert wait_until(lambda: {one.id for one in ledger.find()} == {by_http["id"], by_queue["id"]})


def test_the_cron_schedule_makes_runs_of_the_drain(up: Up) -> None:
    def planned() -> set[str]:
        deployments = {one["id"]: one["name"] for one in up.api("deployments/filter")}
        runs = up.api("flow_runs/filter", flow_runs={"state": {"type": {"any_": ["SCHEDULED"]}}}, limit=200)
        return {deployments[one["deployment_id"]] for one in runs if one["auto_scheduled"]}

    assert wait_until(lambda: {"drain", "deadlines"} <= planned()), planned()


def test_a_deadline_that_is_near_is_told_with_an_event(up: Up, workspace: Path) -> None:
    environment = {**up.environment, "PREFECT_API_URL": f"http://127.0.0.1:{up.ports['prefect']}/api"}
    out = workspace / "told.json"
    result = run("deadlines", "--days", "10", "--json", str(out), folder=workspace, **environment)
    assert result.returncode == 0, result.stderr
    told = {one["id"] for one in json.loads(out.read_text())["told"]}
    assert len(told) == 2

    def events() -> set[str]:
        found = up.api("events/filter", filter={"event": {"name": ["fade.deadline.near"]}})["events"]
        return {one["resource"]["prefect.resource.id"].removeprefix("fade.request.") for one in found}

    assert wait_until(lambda: events() == told), events()


def test_a_port_that_is_taken_is_said_with_what_to_do(up: Up, workspace: Path) -> None:
    result = run("up", "--intake-port", str(up.ports["intake"]), folder=workspace, **up.environment)
    assert result.returncode == 1
    assert f"Port {up.ports['intake']} is taken" in result.stderr
    assert "--intake-port" in result.stderr


def test_a_program_that_dies_is_started_again_and_ctrl_c_ends_all(up: Up) -> None:
    children = psutil.Process(up.process.pid).children(recursive=True)
    assert len(children) >= 6
    intake = next(child for child in children if {"intake", "--follow"} <= {*child.cmdline()})
    intake.kill()
    assert up.process.stdout is not None
    assert "intake ended with status -9" in up.process.stdout.readline()

    def again() -> list[psutil.Process]:
        found = psutil.Process(up.process.pid).children()
        return [child for child in found if {"intake", "--follow"} <= {*child.cmdline()} and child != intake]

    assert wait_until(again, 30)
    children += again()
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(timeout=240) == 0
    assert "Stopped." in up.process.stdout.read()
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
