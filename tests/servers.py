"""Servers of a test's own: a free port, a wait with an end, the password of the tests' Prefect."""

from __future__ import annotations

import base64
import socket
import time
from collections.abc import Callable
from typing import Any

PREFECT_AUTH = "fade:for-tests-alone"
AUTH = {"Authorization": f"Basic {base64.b64encode(PREFECT_AUTH.encode()).decode()}"}


def free_port() -> int:
    """A port of loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(what: Callable[[], Any], seconds: float = 90.0, pause: float = 0.25) -> Any:
    """What a call says as soon as that is true; what it says at the end, if it never was."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(pause)
    return what()
