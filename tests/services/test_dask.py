"""A sweep on a real Dask cluster of two nodes gives the figures it gives in one process; a wrong cluster is said."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fade.errors import ConfigError, ResourceError
from flows.cli.app import app
from flows.services.local import stop
from flows.studies.runners import side_by_side
from tests.servers import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TIMED = ("method_seconds", "distill_seconds", "peak_mib")


def start(*arguments: str, folder: Path) -> subprocess.Popen[bytes]:
    with (folder / ".fade" / f"dask-{arguments[0]}.log").open("ab") as log:
        command = [sys.executable, "-m", "dask", *arguments, "--no-dashboard"]
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)


@contextmanager
def cluster(*folders: Path, logs: Path) -> Iterator[str]:
    """A scheduler, and a worker of one thread in each of the folders."""
    from distributed import Client

    address = f"tcp://127.0.0.1:{free_port()}"
    started = [start("scheduler", "--host", "127.0.0.1", "--port", address.rpartition(":")[2], folder=logs)]
    try:
        for folder in folders:
            (folder / ".fade").mkdir(exist_ok=True)
            started.append(start("worker", address, "--host", "127.0.0.1", "--nthreads", "1", folder=folder))
        with Client(address, timeout=180, set_as_default=False) as client:
            if folders:
                client.wait_for_workers(len(folders), timeout=180)
        yield address
    finally:
        for process in reversed(started):
            stop(process)


@pytest.fixture(scope="module")
def two_nodes(workspace: Path) -> Iterator[str]:
    with cluster(workspace, workspace, logs=workspace) as address:
        yield address


def sweep(file: Path, *options: str) -> list[dict[str, Any]]:
    """The rows of a small sweep that finds nothing on disk, without what depends on the machine's load."""
    shutil.rmtree("data/trials", ignore_errors=True)
    asked = ["--concepts", "astronaut:cameraman", "--vary", "mask.density=0.2,0.8", "--set", "threads=1"]
    result = CliRunner().invoke(app, ["sweep", *asked, "--json", str(file), *options])
    assert result.exit_code == 0, result.output
    return [{k: v for k, v in row.items() if k not in TIMED} for row in json.loads(file.read_text())["rows"]]


def test_a_sweep_on_two_nodes_has_the_rows_of_one_here(workspace: Path, two_nodes: str, tmp_path: Path) -> None:
    from distributed import Client, get_task_stream

    here = sweep(tmp_path / "here.json", "--one-base")
    assert len({row["adapter_sha256"] for row in here}) == 2
    with Client(two_nodes, set_as_default=False) as client, get_task_stream(client=client) as ran:
        there = sweep(tmp_path / "there.json", "--dask", two_nodes)
    assert len({task["worker"] for task in ran.data}) == 2
    assert there == here


def test_a_failure_on_a_node_is_said_and_loses_no_other(workspace: Path, two_nodes: str, tmp_path: Path) -> None:
    file = tmp_path / "sweep.json"
    asked = ["--concepts", "astronaut:cameraman", "--vary", "distill.learning_rate=0.001,1.0e+30"]
    result = CliRunner().invoke(app, ["sweep", *asked, "--json", str(file), "--dask", two_nodes])
    assert result.exit_code == 1
    found = json.loads(file.read_text())
    assert [row["distill.learning_rate"] for row in found["rows"]] == [0.001]
    (reason,) = found["failures"].values()
    assert "must be finite" in reason


def test_a_cluster_that_cannot_be_used_is_said_before_anything_runs(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cluster(logs=workspace) as address, pytest.raises(ResourceError, match="has no worker"):
        side_by_side(1, address)
    with cluster(tmp_path, logs=workspace) as address, pytest.raises(ConfigError, match=f"runs in {tmp_path}"):
        side_by_side(1, address)
    monkeypatch.setattr("flows.studies.runners.CONNECT_SECONDS", 1)
    with pytest.raises(ResourceError, match="No Dask cluster can be reached"):
        side_by_side(1, f"tcp://127.0.0.1:{free_port()}")
    with pytest.raises(ResourceError, match="No Dask cluster can be reached"):
        side_by_side(1, "nonsense://x")
    assert os.getcwd() == str(workspace)
