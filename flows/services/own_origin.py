"""Protection against cross-site requests and DNS rebinding: browsers may call a server from its own pages only.

A page of any origin may send requests to loopback, and a name that its owner turns to 127.0.0.1 afterwards (DNS
rebinding) makes them look like the server's own. So three headers that a browser sets and a page cannot forge decide:

* ``Host`` must be an IP address, ``localhost`` or a name of FADE_ALLOWED_HOSTS. Rebinding always shows its own name.
* ``Origin``, where there is one, must be this server's, or one of FADE_ALLOWED_HOSTS (behind a proxy).
* ``Sec-Fetch-Site`` must not say that another site or port asks, but for a link that a person follows.

Programs send none of the last two. It stands in front of every server that FADE starts: Prefect, MLflow, the intake,
the runtime.
"""

from __future__ import annotations

import ipaddress
import json
import logging
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from fade.environment import environment

logger = logging.getLogger(__name__)
HEALTH = {"/health", "/api/health", "/api/ready", "/version"}
"""Asked by probes, under whatever name they know; they tell nothing and change nothing."""


class OwnOrigin:
    """ASGI middleware, for HTTP and websockets.

    Args:
        hosts: names with or without a port, beside IP addresses and localhost; FADE_ALLOWED_HOSTS if left out.
    """

    def __init__(self, app: Any, *, hosts: Iterable[str] | None = None) -> None:
        self.app = app
        self.hosts = {one.lower() for one in (environment().allowed_host_names if hosts is None else hosts)}
        self.names = {_hostname(one) for one in self.hosts}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request, or one websocket."""
        if scope["type"] not in ("http", "websocket") or (reason := self.refuses(scope)) is None:
            await self.app(scope, receive, send)
            return
        logger.warning("refused: %s", reason)
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        body = json.dumps({"detail": reason}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 403, "headers": [*headers, (b"connection", b"close")]})
        await send({"type": "http.response.body", "body": body})

    def refuses(self, scope: Any) -> str | None:
        """Why this request is refused; None if it is not."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        method, host = scope.get("method", "GET"), headers.get("host", "").lower()
        if method in ("GET", "HEAD") and scope["path"] in HEALTH:
            return None
        if not self._is_own_name(_hostname(host)):
            return "this Host is not one of this server's names; they are listed in FADE_ALLOWED_HOSTS"
        origin = headers.get("origin")
        if origin is not None and _netloc(origin) not in (host, *self.hosts):
            return "a page of another origin may not ask this server"
        followed = (
            scope["type"] == "http"
            and method in ("GET", "HEAD")
            and headers.get("sec-fetch-mode") == "navigate"
            and headers.get("sec-fetch-dest") == "document"
        )
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and origin is None and not followed:
            return "a page of another site may not ask this server"
        return None

    def _is_own_name(self, name: str) -> bool:
        if name in self.names or name == "localhost":
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def _hostname(host: str) -> str:
    """``NAME:PORT`` without its port, an IPv6 address without brackets; empty if it is neither."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _netloc(origin: str) -> str | None:
    """``NAME:PORT`` of an origin, in lower case; None of ``null`` and of what is no address."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return None
    return parts.netloc.lower() if parts.scheme in ("http", "https") and parts.netloc else None
