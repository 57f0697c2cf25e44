"""Against real servers: MLflow over HTTP, Prefect with a cron deployment that fires."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from fade.lineage import ROOT
from flows.services.local import Services, running
from tests.flows.test_cli import run, run_here
from tests.servers import AUTH, free_port

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def services(workspace: Path) -> Iterator[Services]:
    with running(mlflow_port=free_port(), prefect_port=free_port()) as found:
        yield found


def _environment(services: Services) -> dict[str, str]:
    return {"MLFLOW_TRACKING_URI": services.mlflow, "PREFECT_API_URL": f"{services.prefect}/api"}


@pytest.fixture(scope="module")
def erased(services: Services, workspace: Path) -> dict[str, Any]:
    figures = workspace / "figures.json"
    result = run(
        *("erase", "--concept", "oil", "--surrogate", "photo", "--json", str(figures)),
        folder=workspace,
        **_environment(services),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    content: dict[str, Any] = json.loads(figures.read_text())
    return content


def _listed(workspace: Path, services: Services, model: str) -> dict[str, Any]:
    out = workspace / "list.json"
    assert run_here("list", "--json", str(out), folder=workspace, **_environment(services)).returncode == 0
    return next(one for one in json.loads(out.read_text())["adapters"] if one["model"] == model)


def test_approve_and_roll_back_through_a_real_mlflow_server(
    services: Services, workspace: Path, erased: dict[str, Any], tmp_path: Path
) -> None:
    model = erased["model_version"].split("/")[0]
    environment = _environment(services)
    assert _listed(workspace, services, model)["aliases"] == ["candidate"]
    pictures = {}
    for state, command in (("base", None), ("live", "approve"), ("again", "rollback")):
        if command is not None:
            result = run_here(command, model, folder=workspace, **environment)
            assert result.returncode == 0, result.stderr
        out = tmp_path / f"{state}.png"
        prompt = "a cat image in oil style."
        result = run_here("generate", "--prompt", prompt, "-o", str(out), "--live", folder=workspace, **environment)
        assert result.returncode == 0, result.stderr
        pictures[state] = out.read_bytes()
        assert ("approved" in _listed(workspace, services, model)["aliases"]) is (state == "live")
    assert pictures["base"] != pictures["live"]
    assert pictures["base"] == pictures["again"]


def test_an_alias_set_in_mlflow_itself_counts_as_approval(
    services: Services, workspace: Path, erased: dict[str, Any]
) -> None:
    from mlflow import MlflowClient

    model, version = erased["model_version"].split("/")
    client = MlflowClient(services.mlflow, services.mlflow)
    client.set_registered_model_alias(model, "approved", version)
    assert "approved" in _listed(workspace, services, model)["aliases"]
    client.delete_registered_model_alias(model, "approved")
    assert "approved" not in _listed(workspace, services, model)["aliases"]


def test_a_server_that_is_down_is_said_and_nothing_is_lost(workspace: Path, erased: dict[str, Any]) -> None:
    result = run_here("list", folder=workspace, MLFLOW_TRACKING_URI=f"http://127.0.0.1:{free_port()}")
    assert result.returncode == 1
    assert "cannot be reached" in result.stderr
    assert (workspace / erased["folder"] / "adapter/card.json").is_file()


def _flow_runs(services: Services) -> list[dict[str, Any]]:
    spec = urllib.request.Request(
        f"{services.prefect}/api/flow_runs/filter",
        data=json.dumps({"sort": "START_TIME_DESC"}).encode(),
        headers={"content-type": "application/json", **AUTH},
    )
    with urllib.request.urlopen(spec, timeout=10) as answer:
        found: list[dict[str, Any]] = json.load(answer)
    return found


def _prefect(services: Services, *arguments: str) -> subprocess.CompletedProcess[str]:
    own = {"FADE_ROOT": str(ROOT), "FADE_LEDGER_URL": "sqlite:///ledger.db", **_environment(services)}
    command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **own}, capture_output=True, text=True, check=False)


def _deployments(services: Services) -> dict[str, Any]:
    spec = urllib.request.Request(
        f"{services.prefect}/api/deployments/filter", data=b"{}", headers={"content-type": "application/json", **AUTH}
    )
    with urllib.request.urlopen(spec, timeout=60) as answer:
        return {one["name"]: one for one in json.load(answer)}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_deployments_of_prefect_yaml_are_made_once_their_pool_is_there(services: Services) -> None:
    refused = _prefect(services, "deploy", "--all")
    assert refused.returncode == 1
    assert "'fade' which does not exist" in " ".join((refused.stdout + refused.stderr).split())
    made = _prefect(services, "work-pool", "create", "fade", "--type", "process")
    assert made.returncode == 0, made.stdout + made.stderr
    done = _prefect(services, "deploy", "--all")
    assert done.returncode == 0, done.stdout + done.stderr
    asked = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    found = _deployments(services)
    assert len(asked) == 2
    for one in asked:
        deployment = found[one["name"]]
        assert deployment["entrypoint"] == one["entrypoint"]
        assert [each["schedule"]["cron"] for each in deployment["schedules"]] == [one["schedules"][0]["cron"]]
        assert deployment["work_pool_name"] == "fade"
        assert deployment["job_variables"]["env"]["MLFLOW_TRACKING_URI"] == services.mlflow
        # A deployment names a flow that a worker can load.
        module, _, name = one["entrypoint"].rpartition(".")
        assert getattr(importlib.import_module(module), name).name == one["name"]
    for deployment in found.values():  # with their scheduled runs, which nobody works off here
        url = f"{services.prefect}/api/deployments/{deployment['id']}"
        urllib.request.urlopen(urllib.request.Request(url, method="DELETE", headers=AUTH), timeout=60).close()


@pytest.mark.slow
def test_a_cron_deployment_fires_and_completes(
    services: Services, workspace: Path, erased: dict[str, Any], tmp_path: Path
) -> None:
    with (tmp_path / "serve.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, str(ROOT / "infra/nightly.py"), Path(erased["folder"]).name, "* * * * *"],
            cwd=workspace,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **_environment(services)},
        )
    try:
        deadline = time.monotonic() + 240
        scheduled: list[dict[str, Any]] = []
        while time.monotonic() < deadline:
            scheduled = [one for one in _flow_runs(services) if one["deployment_id"] and one["auto_scheduled"]]
            if any(one["state_type"] == "COMPLETED" for one in scheduled):
                break
            assert not any(one["state_type"] in ("FAILED", "CRASHED") for one in scheduled), (
                tmp_path / "serve.log"
            ).read_text()
            time.sleep(2)
        assert any(one["state_type"] == "COMPLETED" for one in scheduled), (tmp_path / "serve.log").read_text()
    finally:
        server.terminate()
        server.wait(timeout=60)


@pytest.mark.parametrize("when", ["while they start", pytest.param("once they are up", marks=pytest.mark.slow)])
def test_fade_ui_in_the_background_ends_with_both_servers_however_often_it_is_told(tmp_path: Path, when: str) -> None:
    for name in ("params.yaml", "dvc.yaml"):
        (tmp_path / name).write_text("{}\n")
    ports = [part for name in ("mlflow", "prefect") for part in (f"--{name}-port", str(free_port()))]
    process = subprocess.Popen(
        # As a shell starts its background jobs: they ignore SIGINT.
        ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-m", "flows.cli.app", "ui", *ports],
        cwd=tmp_path,
        env={**os.environ, "FADE_ROOT": str(tmp_path), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        found = psutil.Process(process.pid)
        deadline = time.monotonic() + 120
        while len(found.children()) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        if when == "once they are up":
            assert any(line.startswith("Ctrl-C") for line in process.stdout)
        children = found.children(recursive=True)
        assert len(children) >= 2
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)  # told twice, it still ends both
        assert process.stdout.read().endswith("Stopped.\n")
        assert process.wait(timeout=60) == 0
        assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
        assert not (tmp_path / ".fade/services.json").exists()
    finally:
        process.kill()
        process.wait()
