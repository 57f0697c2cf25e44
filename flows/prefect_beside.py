"""The server for a command's flow where none runs: begun while the command loads its libraries.

Prefect would start the same by itself, but only once the flow runs, and this process would have to import the whole
server to do so. A server takes seconds to start, twice as many where it makes its tables first. So it is begun from
here, as Prefect begins it, before anything is imported, and Prefect is told where it answers.
"""

from __future__ import annotations

import atexit
import http.client
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

HOST = "127.0.0.1"
STARTS_WITHIN = "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"
ASKED_EVERY = 0.1
"""Seconds between two questions to a server that is starting."""
TO_END = 5.0
"""Seconds that a server has to end when told to; then it is ended."""


@dataclass(frozen=True, slots=True)
class _Beside:
    """A server that was begun."""

    process: subprocess.Popen[bytes]
    port: int
    answers: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}/api"

    def wait(self, seconds: float) -> None:
        """Ask it until it answers, has ended, or time is over."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.process.poll() is None:
            asked = http.client.HTTPConnection(HOST, self.port, timeout=TO_END)
            try:
                asked.request("GET", "/api/health")
                if asked.getresponse().status == http.client.OK:
                    self.answers.set()
                    return
            except (OSError, http.client.HTTPException):
                pass  # it does not listen yet
            finally:
                asked.close()
            time.sleep(ASKED_EVERY)

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        try:
            self.process.wait(TO_END)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


_BEGUN: list[tuple[_Beside, threading.Thread]] = []


def prefect_beside() -> None:
    """Start the server now, if Prefect would for this command's flow; ``beside_is_up`` waits for it.

    It takes seconds of one core, in which a command that erases loads its libraries on another.
    """
    found = find_spec("prefect")
    if _BEGUN or found is None or found.origin is None or not none_is_named():
        return
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "flows.services.until_closed", "--app-dir", str(Path(found.origin).parents[1])]
    command += ["--factory", "prefect.server.api.server:create_app", "--host", HOST, "--port", str(port)]
    told = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
    # In a process group of its own: Ctrl-C shall not end it before the flow has told it how it ended.
    process = subprocess.Popen(
        [*command, "--log-level", "error", "--lifespan", "on"],
        env={**os.environ, **told},
        stdin=subprocess.PIPE,
        process_group=0,
    )
    beside = _Beside(process, port)
    atexit.register(beside.stop)
    # It imports nothing: modules that import each other must not be loaded by two threads at once.
    seconds = float(os.environ.get(STARTS_WITHIN, "180"))
    thread = threading.Thread(target=beside.wait, args=(seconds,), name="prefect-beside", daemon=True)
    thread.start()
    _BEGUN.append((beside, thread))


def none_is_named() -> bool:
    """Whether no server is named to Prefect, so that it would start one.

    Where nobody configured it, it would, and is not imported to say so.
    """
    home = os.environ.get("PREFECT_HOME")
    told = {"PREFECT_PROFILE", "PREFECT_SERVER_EPHEMERAL_ENABLED"} & {*os.environ}
    files = (Path(home or "", "profiles.toml"), Path("prefect.toml"), Path(".env"))
    if home and not told and not any(map(Path.is_file, files)):
        return not os.environ.get("PREFECT_API_URL")
    from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_EPHEMERAL_ENABLED

    return not PREFECT_API_URL.value() and bool(PREFECT_SERVER_EPHEMERAL_ENABLED.value())


def beside_is_up() -> None:
    """Wait until the server answers, and tell Prefect of it; at once where none was begun.

    Where it has failed to, Prefect knows of none: it begins its own and says what is amiss.
    """
    from prefect.settings import PREFECT_API_URL

    for beside, thread in _BEGUN:
        thread.join()
        if beside.answers.is_set() and not PREFECT_API_URL.value():
            tell_prefect(beside.url)
            # For this process alone: pages that outlive the server, and programs begun from here, do not read of it.
            del os.environ["PREFECT_API_URL"]


def tell_prefect(api: str) -> None:
    """Name a server's API to Prefect, in this process and in programs that it starts."""
    os.environ["PREFECT_API_URL"] = api
    from prefect.context import refresh_global_settings_context

    refresh_global_settings_context()
