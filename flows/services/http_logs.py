"""One log line for each HTTP request, with a request id that response, log and caller share."""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import Any

from fade import logs

logger = logging.getLogger(__name__)
_PLAIN = re.compile(r"[A-Za-z0-9._-]{1,64}")


class HttpLogs:
    """ASGI middleware: takes ``X-Request-Id`` if it is plain, else makes one; neither body nor query is logged.

    An id in the path (``/requests/ID``) is the request that the lines are about.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        call_id = given if _PLAIN.fullmatch(given) else uuid.uuid4().hex
        parts = scope["path"].split("/")
        subject = parts[2] if len(parts) == 3 and parts[1] == "requests" and _PLAIN.fullmatch(parts[2]) else None
        # Without an answer its sender had left.
        status, begun = 499, time.perf_counter()

        async def answer(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", call_id.encode())]
            await send(message)

        with logs.about(subject):
            try:
                await self.app(scope, receive, answer)
            except Exception:
                status = 500
                raise
            finally:
                logger.info(
                    "%s %s %d",
                    scope["method"],
                    getattr(scope.get("route"), "path", "unknown path"),
                    status,
                    extra={"call_id": call_id, "milliseconds": round(1000 * (time.perf_counter() - begun))},
                )
