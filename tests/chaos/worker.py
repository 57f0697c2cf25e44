"""Drain workers for the chaos programs: real processes, forked from one that has loaded the libraries already.

Loading them takes longer than a tiny erasure, and a worker that is killed while it loads holds nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import yaml

from fade.pipeline import steps_of
from tests.tiny import make_workspace, plain_spec

STEPS = tuple(step.name for step in steps_of(plain_spec()))
BOUNDARIES = tuple(
    f"{side} {what}" for what in (*STEPS, "version", "register", "finish") for side in ("before", "after")
)
"""Around the record of each step, the new version in MLflow, its whole registration, and the outcome's row."""


def make_project(folder: Path) -> Path:
    """A project with a tiny base whose erasure takes seconds; entered, with its variables set."""
    make_workspace(folder)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["erasure"]["threads"] = 1
    params["erasure"]["distill"]["precision"] = params["erasure"]["evaluate"]["precision"] = "fp32"
    params["erasure"]["evaluate"]["steps"] = 1
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    os.environ["FADE_ROOT"] = str(folder)
    from flows.settings import configure

    configure()
    return folder


@contextmanager
def prefect_server(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A Prefect server that answers, ended with the block; workers that come and go share it."""
    url = f"http://127.0.0.1:{port}/api"
    with (folder / ".fade/prefect.log").open("ab") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        wait_for(f"{url}/health", server)
        yield server
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def wait_for(url: str, process: subprocess.Popen[bytes], seconds: float = 600.0) -> None:
    """Until a server answers with success."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    sys.exit(f"{url} does not answer")


class Nursery:
    """Forks workers; what they print goes to ``worker.log`` of the project."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["flows.queue.drain"])

    def worker(self, fatal: frozenset[str] = frozenset()) -> BaseProcess:
        """A worker that drains until nothing is due; it kills itself at the first of these boundaries."""
        process = self.context.Process(target=_work, args=(self.folder, fatal))
        process.start()
        return process


def kill(process: BaseProcess) -> None:
    """SIGKILL to a worker and all it started; it leads a process group of its own."""
    assert process.pid is not None
    os.killpg(process.pid, signal.SIGKILL)
    process.join()


def _work(folder: Path, fatal: frozenset[str]) -> None:
    os.setsid()
    log = os.open(folder / "worker.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from fade.requests import leases
    from flows.queue import drain
    from tasks.dvc import versioning
    from tasks.mlflow import runs

    _around(fatal, versioning, "record", lambda _folder, step: step)
    _around(fatal, runs, "_new_version", lambda *_, **__: "version")
    _around(fatal, runs, "register", lambda *_, **__: "register")
    _around(fatal, leases, "finish", lambda *_, **__: "finish")
    drain.drain()


def _around(fatal: frozenset[str], module: Any, name: str, called: Callable[..., str]) -> None:
    """Kill oneself just before or after a call, if that boundary is among the fatal ones."""
    function = getattr(module, name)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        what = called(*arguments, **options)
        _die_if(f"before {what}", fatal)
        result = function(*arguments, **options)
        _die_if(f"after {what}", fatal)
        return result

    setattr(module, name, wrapped)


def _die_if(boundary: str, fatal: frozenset[str]) -> None:
    if boundary in fatal:
        Path(f"died-{boundary}").touch()
        os.killpg(0, signal.SIGKILL)
