"""Start MLflow and Prefect on loopback and keep them until Ctrl-C."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fade.errors import ResourceError
from fade.files import write_json
from flows.settings import SERVICES, STATE

HOST = "127.0.0.1"
START_SECONDS = 180


@dataclass(frozen=True, slots=True)
class Services:
    """Addresses of what runs."""

    mlflow: str
    prefect: str


def check_port(port: int, name: str, option: str) -> None:
    """Raise ResourceError if something listens on the port already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            raise ResourceError(
                f"Port {port} is taken, so {name} cannot start there. "
                f"Stop what uses it, or choose another: {option} PORT."
            ) from None


@contextmanager
def running(*, mlflow_port: int, prefect_port: int) -> Iterator[Services]:
    """Both servers, up and answering; stopped at the end.

    Raises:
        ResourceError: a port is taken, or a server ended or did not answer in time.
    """
    check_port(mlflow_port, "MLflow", "--mlflow-port")
    check_port(prefect_port, "Prefect", "--prefect-port")
    found = Services(f"http://{HOST}:{mlflow_port}", f"http://{HOST}:{prefect_port}")
    commands = {
        "mlflow": [
            *(sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(mlflow_port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{(STATE / 'mlflow.db').resolve()}"),
            # Files are read and written in place, so that an experiment made with the server up can be
            # used with it down, and the other way round.
            *("--no-serve-artifacts", "--default-artifact-root", (STATE / "mlartifacts").resolve().as_uri()),
        ],
        "prefect": [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(prefect_port)],
    }
    STATE.mkdir(exist_ok=True)
    started: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, command in commands.items():
            with (STATE / f"{name}.log").open("wb") as log:
                started[name] = subprocess.Popen(
                    command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=_environment(found)
                )
        wait_for(f"{found.mlflow}/health", "mlflow", started["mlflow"])
        wait_for(f"{found.prefect}/api/health", "prefect", started["prefect"])
        write_json(SERVICES, {"pid": os.getpid(), "mlflow": found.mlflow, "prefect": found.prefect})
        yield found
    finally:
        SERVICES.unlink(missing_ok=True)
        for process in started.values():
            stop(process)


def _environment(found: Services) -> dict[str, str]:
    return {
        **os.environ,
        "PREFECT_UI_API_URL": f"{found.prefect}/api",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        # Eight programs more, for evaluations of language models: they take memory, and a quarter of a core idle.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }


def wait_for(url: str, name: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until a program answers.

    Raises:
        ResourceError: it ended, or did not answer in time; names its log.
    """
    deadline = time.monotonic() + START_SECONDS
    log = Path(STATE / f"{name}.log")
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ResourceError(f"{name} ended at once with status {process.returncode}; see {log}.")
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise ResourceError(f"{name} did not answer on {url} within {START_SECONDS} s; see {log}.")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and the workers it started: they share a process group of their own."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
