"""Start MLflow and Prefect on loopback and keep them until they are told to end.

Prefect's API runs code where its flows run, so it asks for a string that is made at first start and kept in
``.fade/prefect-auth``, for this user alone; both servers refuse what a browser sends for a page that is not theirs.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import FrameType

from fade.environment import environment
from fade.errors import ConfigError, ResourceError
from fade.files import write_json
from flows.settings import STATE, prefect_auth
from tasks.mlflow.embedded import DATABASE, SERVICES, SQLITE

HOST = "127.0.0.1"
PREFECT_PORT = 4200
START_SECONDS, STOP_SECONDS = 180, 20
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Services:
    """Addresses of the two servers."""

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
def told_to_end() -> Iterator[threading.Event]:
    """An event that Ctrl-C, SIGTERM or a closed terminal sets; a second signal does not cut the shutdown short.

    A shell's background jobs ignore SIGINT, and so would all that this program starts: it is told anew.
    """
    ended = threading.Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        ended.set()

    before = {one: signal.signal(one, end) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield ended
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


@contextmanager
def running(*, mlflow_port: int, prefect_port: int, ended: threading.Event | None = None) -> Iterator[Services]:
    """Run both servers until the block ends; entered once both answer.

    Args:
        ended: set while they start, it stops them again.

    Raises:
        ConfigError: the package was installed before it brought MLflow's application.
        ResourceError: a port is taken, or a server ended or did not answer in time.
        KeyboardInterrupt: ``ended`` was set before both answered.
    """
    check_port(mlflow_port, "MLflow", "--mlflow-port")
    check_port(prefect_port, "Prefect", "--prefect-port")
    if "fade" not in entry_points(group="mlflow.app").names:
        raise ConfigError("The package is installed as it was before an update. Install it again: pip install -e .")
    found = Services(f"http://{HOST}:{mlflow_port}", f"http://{HOST}:{prefect_port}")
    names = [f"{own}:{mlflow_port}" for own in (HOST, "localhost")]
    commands = {
        "mlflow": [
            *(sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(mlflow_port), "--workers", "1"),
            *("--app-name", "fade", "--allowed-hosts", ",".join([*names, *environment().allowed_host_names])),
            *("--backend-store-uri", f"{SQLITE}{DATABASE.resolve()}"),
            # Files are read and written in place, so that an experiment made with the server up can be
            # used with it down, and the other way round.
            *("--no-serve-artifacts", "--default-artifact-root", (STATE / "mlartifacts").resolve().as_uri()),
        ],
        "prefect": _prefect(prefect_port),
    }
    started: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, command in commands.items():
            started[name] = _start(name, command, found.prefect)
        wait_for(f"{found.mlflow}/health", "mlflow", started["mlflow"], ended)
        wait_for(f"{found.prefect}/api/health", "prefect", started["prefect"], ended)
        write_json(SERVICES, {"pid": os.getpid(), "mlflow": found.mlflow, "prefect": found.prefect})
        yield found
    finally:
        SERVICES.unlink(missing_ok=True)
        stop_all(started.values())


@contextmanager
def prefect_running() -> Iterator[str]:
    """Run Prefect's server alone until the block ends, on its usual port if that is free; gives its address.

    The server that Prefect starts by itself for a command makes no runs of a schedule: this one does.

    Raises:
        ResourceError: it ended, or did not answer in time.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, PREFECT_PORT))
        except OSError:
            probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    address = f"http://{HOST}:{port}"
    process = _start("prefect", _prefect(port), address)
    try:
        wait_for(f"{address}/api/health", "prefect", process)
        yield address
    finally:
        stop(process)


def _prefect(port: int) -> list[str]:
    """The command of Prefect's server."""
    app = ("--factory", "flows.services.servers:prefect", "--log-level", "warning")
    return [sys.executable, "-m", "uvicorn", *app, "--host", HOST, "--port", str(port)]


def _start(name: str, command: list[str], prefect: str) -> subprocess.Popen[bytes]:
    """Start a server in a process group of its own: Ctrl-C shall not end it before what asks it."""
    STATE.mkdir(exist_ok=True)
    with (STATE / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=_environment(prefect)
        )


def _environment(prefect: str) -> dict[str, str]:
    auth = prefect_auth()
    return {
        **os.environ,
        "PREFECT_UI_API_URL": "/api",
        "PREFECT_SERVER_API_AUTH_STRING": auth,
        "PREFECT_API_AUTH_STRING": auth,
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": prefect,
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        # Eight programs more, for evaluations of language models: they take memory, and a quarter of a core idle.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }


def wait_for(url: str, name: str, process: subprocess.Popen[bytes], ended: threading.Event | None = None) -> None:
    """Wait until a program answers.

    Raises:
        ResourceError: it ended, or did not answer in time; names its log.
        KeyboardInterrupt: ``ended`` was set.
    """
    deadline = time.monotonic() + START_SECONDS
    log = Path(STATE / f"{name}.log")
    while time.monotonic() < deadline:
        if ended is not None and ended.is_set():
            raise KeyboardInterrupt
        if process.poll() is not None:
            raise ResourceError(f"{name} ended at once with status {process.returncode}; see {log}.")
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise ResourceError(f"{name} did not answer on {url} within {START_SECONDS} s; see {log}.")


def stop_all(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """Stop programs and their workers: SIGTERM to all at once, SIGKILL to those that take too long."""
    processes = list(processes)
    for process in processes:
        _signal(process, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    for process in processes:
        try:
            process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            logger.warning("process %d did not end within %d s and is killed", process.pid, STOP_SECONDS)
        # Also of one that ended: a worker may have outlived what started it.
        _signal(process, signal.SIGKILL)
        process.wait()


def stop(process: subprocess.Popen[bytes]) -> None:
    """Stop one program, as ``stop_all`` does."""
    stop_all([process])


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)  # each has a process group of its own
