"""The server that Prefect starts for a command where none runs: begun while the command loads its libraries."""

from __future__ import annotations

import atexit
import threading
from contextlib import suppress

_BEGUN: list[threading.Thread] = []
A_MOMENT = 0.5
"""Seconds within which a thread that was begun knows the process it started."""


def prefect_beside() -> None:
    """Have Prefect start its own server now, if it would for this command's flow; ``beside_is_up`` waits for it.

    It takes seconds of one core, in which a command that erases loads its libraries on another.
    """
    # Imported by this thread, for modules that import each other must not be loaded by two at once.
    from httpx import HTTPError
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_EPHEMERAL_ENABLED

    if _BEGUN or PREFECT_API_URL.value() or not PREFECT_SERVER_EPHEMERAL_ENABLED.value():
        return

    def begin() -> None:
        # What fails is told by Prefect when the flow asks for its server, which then begins anew; and a command that
        # ends before takes the process away under it (AttributeError).
        with suppress(RuntimeError, OSError, HTTPError, AttributeError):
            SubprocessASGIServer().start()

    thread = threading.Thread(target=begin, name="prefect-beside", daemon=True)
    thread.start()
    _BEGUN.append(thread)
    atexit.register(_stopped, thread)


def beside_is_up() -> None:
    """Wait until the server answers, or has failed to; at once where none was begun."""
    for thread in _BEGUN:
        thread.join()


def _stopped(thread: threading.Thread) -> None:
    """A command that ends before its flow leaves no server behind."""
    from prefect.server.api.server import SubprocessASGIServer

    thread.join(A_MOMENT)
    server = SubprocessASGIServer()
    if server.server_process is not None:
        server.stop()
