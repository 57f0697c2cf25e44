"""The server for a command's flow where none runs: begun while the command loads its libraries.

Prefect would start the same by itself, but only once the flow runs, and this process would have to import the whole
server to do so: seconds of it. So it is begun from here, as Prefect begins it, and Prefect is told where it answers.
"""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

ASKED_EVERY = 0.1
"""Seconds between two questions to a server that is starting."""
TO_END = 5.0
"""Seconds that a server has to end when told to; then it is ended."""


@dataclass(frozen=True, slots=True)
class _Beside:
    """A server that was begun, and the thread that waits until it answers."""

    process: subprocess.Popen[bytes]
    url: str
    answers: threading.Event = field(default_factory=threading.Event)

    def wait(self, seconds: float) -> None:
        """Ask it until it answers, has ended, or time is over."""
        import httpx

        until = time.monotonic() + seconds
        with httpx.Client() as client:
            while time.monotonic() < until and self.process.poll() is None:
                try:
                    if client.get(f"{self.url}/health").status_code == httpx.codes.OK:
                        self.answers.set()
                        return
                except httpx.HTTPError:
                    pass  # it does not listen yet
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
    import prefect
    from prefect.settings import (
        PREFECT_API_URL,
        PREFECT_SERVER_EPHEMERAL_ENABLED,
        PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
        get_current_settings,
    )

    if _BEGUN or PREFECT_API_URL.value() or not PREFECT_SERVER_EPHEMERAL_ENABLED.value():
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(Path(prefect.__file__).parent)]
    command += ["--factory", "prefect.server.api.server:create_app", "--host", "127.0.0.1", "--port", str(port)]
    told = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
    settings = get_current_settings().to_environment_variables(exclude_unset=True)
    process = subprocess.Popen(
        [*command, "--log-level", "error", "--lifespan", "on"], env={**os.environ, **told, **settings}
    )
    beside = _Beside(process, f"http://127.0.0.1:{port}/api")
    atexit.register(beside.stop)
    seconds = PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value()
    thread = threading.Thread(target=beside.wait, args=(seconds,), name="prefect-beside", daemon=True)
    thread.start()
    _BEGUN.append((beside, thread))


def beside_is_up() -> None:
    """Wait until the server answers, and tell Prefect of it; at once where none was begun.

    Where it has failed to, Prefect knows of none: it begins its own and says what is amiss.
    """
    from prefect.context import refresh_global_settings_context
    from prefect.settings import PREFECT_API_URL

    for beside, thread in _BEGUN:
        thread.join()
        if beside.answers.is_set() and not PREFECT_API_URL.value():
            # For this process alone: pages that outlive the server, and programs begun from here, do not read of it.
            os.environ["PREFECT_API_URL"] = beside.url
            refresh_global_settings_context()
            del os.environ["PREFECT_API_URL"]
