"""Middleware of the HTTP services: bearer token, size limit, bounded queue; requests of clients that left are dropped.

A request is answered as early as it can be: 401 before its body is read, 413 as soon as it is too long, 408 when its
body does not come, 429 when the queue is full. What waits when its sender leaves is never worked on. Open paths
(the health above all) take no place in a queue and no thread of the pool that the others use.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse

BODY_SECONDS = 15.0
RETRY_SECONDS = 5


@dataclass
class ConcurrencyLimit:
    """How many requests are handled at once (``parallel``) and how many more may wait (``waiting``)."""

    parallel: int
    waiting: int
    inside: int = 0
    places: asyncio.Semaphore = field(init=False)

    def __post_init__(self) -> None:
        self.places = asyncio.Semaphore(self.parallel)


class Refusal(Exception):
    """An error response in place of the application's answer."""

    def __init__(self, status: int, detail: str, **headers: str) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers


class ClientDisconnected(Exception):
    """The client disconnected before its request was handled."""


class Front:
    """ASGI middleware over an application of plain HTTP.

    Args:
        token: the bearer token that every path but the open ones asks for.
        max_bytes: longest body.
        limit: of all paths together that have no limit of their own.
        limits: path to its own limit.
        open_paths: answered to GET without a token and without waiting; they must not block.
    """

    def __init__(
        self,
        app: Any,
        *,
        token: str,
        max_bytes: int,
        limit: ConcurrencyLimit,
        limits: Mapping[str, ConcurrencyLimit] | None = None,
        open_paths: frozenset[str] = frozenset({"/health"}),
    ) -> None:
        self.app, self.open_paths = app, open_paths
        self.expected, self.max_bytes = f"Bearer {token}".encode(), max_bytes
        self.limit, self.limits = limit, dict(limits or {})

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        if scope["type"] != "http" or (scope["path"] in self.open_paths and scope["method"] in ("GET", "HEAD")):
            await self.app(scope, receive, send)
            return
        limit = self.limits.get(scope["path"], self.limit)
        try:
            headers = dict(scope["headers"])
            self._check(headers, limit)
            limit.inside += 1
            try:
                await self._work(scope, await self._body(receive), receive, send, limit)
            finally:
                limit.inside -= 1
        except Refusal as refusal:
            # What was not read of the body is not waited for.
            more = {**refusal.headers, "Connection": "close"}
            await JSONResponse({"detail": refusal.detail}, refusal.status, more)(scope, receive, send)
        except ClientDisconnected:
            return  # nobody reads an answer

    def _check(self, headers: dict[bytes, bytes], limit: ConcurrencyLimit) -> None:
        given = headers.get(b"authorization", b"")
        # As in RFC 9110 the scheme's case does not matter.
        if not hmac.compare_digest(given[:6].capitalize() + given[6:], self.expected):
            raise Refusal(401, "A valid bearer token is needed.", **{"WWW-Authenticate": "Bearer"})
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.max_bytes:
            raise self._too_long()
        if limit.inside >= limit.parallel + limit.waiting:
            raise Refusal(
                429, "Too many requests wait already. Come back later.", **{"Retry-After": str(RETRY_SECONDS)}
            )

    async def _body(self, receive: Any) -> bytes:
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnected
                    body += message.get("body", b"")
                    if len(body) > self.max_bytes:
                        raise self._too_long()
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise Refusal(408, f"The request's body did not arrive within {BODY_SECONDS:.0f} s.") from None

    async def _work(self, scope: Any, body: bytes, receive: Any, send: Any, limit: ConcurrencyLimit) -> None:
        """Wait for a free place while the client stays connected, then call the application."""
        gone = asyncio.ensure_future(receive())
        place = asyncio.ensure_future(limit.places.acquire())
        try:
            await asyncio.wait({gone, place}, return_when=asyncio.FIRST_COMPLETED)
            if not place.done():
                raise ClientDisconnected
            sent = False

            async def given() -> Any:
                nonlocal sent
                if not sent:
                    sent = True
                    return {"type": "http.request", "body": body, "more_body": False}
                return await asyncio.shield(gone)

            await self.app(scope, given, send)
        finally:
            gone.cancel()
            if place.cancel() is False and not place.cancelled():
                limit.places.release()

    def _too_long(self) -> Refusal:
        return Refusal(413, f"A request has at most {self.max_bytes} bytes.")
