"""Services under bodies without end, queues without end, and receivers of webhooks that mean no good."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.responses import PlainTextResponse

from fade.requests import webhooks
from fade.requests.ledger import Ledger
from fade.requests.messages import Message
from flows.releasing.watch import serving
from flows.services import front, runtime_http
from flows.services.front import ConcurrencyLimit, Front
from tests.servers import free_port
from tests.tiny import PROJECT

TOKEN = "a-token-for-tests-alone"
KEY = b"a-key-for-tests-alone"
BEARER = {"authorization": f"Bearer {TOKEN}"}


class Counted:
    """An application that works until it is told to end, and counts what reached it."""

    def __init__(self) -> None:
        self.begun, self.let_go = 0, asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] != "/health":
            self.begun += 1
            await receive()
            await self.let_go.wait()
        await PlainTextResponse("done")(scope, receive, send)


class Sender:
    """One request, sent by hand; ``body`` is read only as far as somebody asks for it."""

    def __init__(self, path: str = "/work", headers: dict[str, str] | None = None, body: Iterator[bytes] | None = None):
        given = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        self.scope = {"type": "http", "method": "POST", "path": path, "headers": given}
        self.body, self.read, self.left = iter([b""]) if body is None else body, 0, asyncio.Event()
        self.status: int | None = None

    async def receive(self) -> dict[str, Any]:
        part = next(self.body, None)
        if part is None:
            await self.left.wait()
            return {"type": "http.disconnect"}
        self.read += len(part)
        return {"type": "http.request", "body": part, "more_body": part != b""}

    async def send(self, message: dict[str, Any]) -> None:
        self.status = message.get("status", self.status)

    def through(self, app: Front) -> asyncio.Task[None]:
        return asyncio.ensure_future(app(self.scope, self.receive, self.send))


def _front(app: Any, *, parallel: int = 1, waiting: int = 2) -> Front:
    return Front(app, token=TOKEN, max_bytes=1000, limit=ConcurrencyLimit(parallel, waiting))


def _endless() -> Iterator[bytes]:
    while True:
        yield b"x" * 300


def test_no_body_is_read_without_the_token_and_none_beyond_its_size() -> None:
    async def tried() -> None:
        app = Counted()
        stranger = Sender(body=_endless())
        await stranger.through(_front(app))
        assert (stranger.status, stranger.read) == (401, 0)
        told = Sender(headers={**BEARER, "content-length": str(1 << 30)}, body=_endless())
        await told.through(_front(app))
        assert (told.status, told.read) == (413, 0)
        untold = Sender(headers=BEARER, body=_endless())
        await untold.through(_front(app))
        assert (untold.status, untold.read) == (413, 1200)
        assert app.begun == 0

    asyncio.run(tried())


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "BODY_SECONDS", 0.05)

    async def tried() -> None:
        slow = Sender(headers=BEARER, body=iter([]))
        await slow.through(_front(Counted()))
        assert slow.status == 408

    asyncio.run(tried())


def test_the_queue_is_bounded_the_gone_are_dropped_and_health_answers() -> None:
    async def tried() -> None:
        app = Counted()
        stack = _front(app)
        senders = [Sender(headers=BEARER) for _ in range(1000)]
        tasks = [sender.through(stack) for sender in senders]
        await _until(lambda: app.begun == 1 and sum(one.status == 429 for one in senders) == 997)
        health = Sender("/health")
        health.scope["method"] = "GET"
        await health.through(stack)
        assert health.status == 200
        gone, stays = (sender for sender in senders[1:3])
        gone.left.set()
        await tasks[1]
        assert gone.status is None
        app.let_go.set()
        await asyncio.gather(*tasks)
        assert (senders[0].status, stays.status, app.begun) == (200, 200, 2)
        assert stack.limit.inside == 0
        last = Sender(headers=BEARER)  # every place was given back
        await last.through(stack)
        assert last.status == 200

    asyncio.run(tried())


async def _until(what: Any) -> None:
    async with asyncio.timeout(20):
        while not what():
            await asyncio.sleep(0)


class Blocked:
    """A runtime whose pictures take until the test is over."""

    manifest = None

    def __init__(self) -> None:
        self.let_go, self.drawn = threading.Event(), 0

    def refresh(self) -> None:
        pass

    def generate(self, *_: Any, **__: Any) -> None:
        self.drawn += 1
        self.let_go.wait(30)
        raise runtime_http.RefusedError("the test is over")


def test_over_real_connections_health_lives_while_all_places_are_taken_and_after_the_callers_left() -> None:
    runtime, port = Blocked(), free_port()
    app = runtime_http.make_app(runtime, token=TOKEN, parallel=2, waiting=100)  # type: ignore[arg-type]
    with serving(app, host="127.0.0.1", port=port):
        body = json.dumps({"prompt": "x"}).encode()
        head = f"POST /generate HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        callers = [socket.create_connection(("127.0.0.1", port)) for _ in range(80)]
        for caller in callers:
            caller.sendall(head.encode() + body)
        deadline = time.monotonic() + 20
        while runtime.drawn < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 503
        for caller in callers:
            caller.close()
        assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 503
        runtime.let_go.set()
        asked = httpx.post(f"http://127.0.0.1:{port}/generate", content=body, headers=BEARER, timeout=20)
        assert asked.status_code in (503, 422)
        assert runtime.drawn <= 4, "nobody draws for those who left"


@contextmanager
def receiver(answer: bytes, *, then: bytes = b"", pause: float = 0.0) -> Iterator[tuple[int, list[int]]]:
    """A server that says ``answer`` and goes on saying ``then``; its port, and how many bytes of it were taken."""
    listening, taken, over = socket.create_server(("127.0.0.1", 0)), [0], threading.Event()

    def talk(connection: socket.socket) -> None:
        with connection:
            try:
                connection.recv(65536)
                connection.sendall(answer)
                while then and not over.wait(pause):
                    connection.sendall(then)
                    taken[0] += len(then)
            except OSError:
                return

    def listen() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=talk, args=(connection,), daemon=True).start()

    threading.Thread(target=listen, daemon=True).start()
    try:
        yield listening.getsockname()[1], taken
    finally:
        over.set()
        listening.close()


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(f"sqlite:///{tmp_path / 'ledger.db'}") as opened:
        yield opened


def _ask(ledger: Ledger, url: str) -> None:
    asked = {"id": str(uuid.uuid4()), "kind": "object", "concept": f"c{uuid.uuid4().hex}"}
    # Whatever the intake let through, now or before.
    message = Message.model_validate(asked).model_copy(update={"callback_url": url})
    ledger.submit(message, PROJECT, actor="test")


def _errors(ledger: Ledger) -> dict[str, set[str | None]]:
    with ledger.signing() as connection:
        found: dict[str, set[str | None]] = {}
        for row in connection.execute(webhooks.sa.select(webhooks.outbox)).mappings():
            found.setdefault(row["url"], set()).add(None if row["sent_at"] else row["error"])
        return found


def test_one_bad_receiver_holds_up_no_other_letter(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FADE_WEBHOOK_NETWORKS", "127.0.0.1/32")
    monkeypatch.setattr(webhooks, "LETTER_SECONDS", 1.5)
    ok, chunked = b"HTTP/1.1 200 OK\r\n", b"Transfer-Encoding: chunked\r\n"
    with (
        receiver(ok + b"Content-Length: 0\r\n\r\n") as (good, _),
        receiver(ok + chunked + b"\r\n", then=b"10000\r\n" + b"x" * 65536 + b"\r\n") as (endless, taken),
        receiver(ok + chunked + b"Content-Encoding: gzip\r\n\r\n", then=b"5\r\nxxxxx\r\n") as (bomb, _),
        receiver(b"HTTP/1.1 200 OK\r\nX: ", then=b"x", pause=0.05) as (drops, _),
        receiver(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 0\r\n\r\n") as (moved, _),
    ):
        urls = [f"http://127.0.0.1:{port}/" for port in (drops, endless, bomb, moved, good)]
        urls[:0] = ["https://xn--/", "http://[::1/", "ftp://127.0.0.1/", "http://" + "a" * 64 + ".example/"]
        for url in urls:
            _ask(ledger, url)
        begun = time.monotonic()
        webhooks.deliver(ledger, key=KEY)
        assert time.monotonic() - begun < 15
    found = _errors(ledger)
    assert found[urls[-1]] == {None}
    assert found[f"http://127.0.0.1:{drops}/"] == {"no answer within 2 s"}
    assert found[f"http://127.0.0.1:{moved}/"] == {"status 302"}
    assert all(None not in found[url] for url in urls[:4])
    # Of an answer its status counts: what follows is never read, and the connection is closed.
    assert found[f"http://127.0.0.1:{endless}/"] == found[f"http://127.0.0.1:{bomb}/"] == {None}
    assert taken[0] < 50 << 20


@pytest.mark.parametrize(
    "address",
    [
        *(
            "127.0.0.1",
            "10.0.0.1",
            "192.168.1.1",
            "172.16.0.1",
            "169.254.169.254",
            "100.64.0.1",
            "0.1.2.3",
            "224.0.0.1",
        ),
        *("::1", "fe80::1", "fc00::1", "::ffff:10.0.0.1", "2002:a00:1::", "64:ff9b::a00:1", "ff02::1", "::"),
    ],
)
def test_letters_go_to_no_address_inside(address: str) -> None:
    assert webhooks.permitted([ip_address("93.184.216.34")], []), "a public one is fine"
    with pytest.raises(webhooks.ForbiddenAddressError, match="FADE_WEBHOOK_NETWORKS"):
        webhooks.permitted([ip_address(address)], [])
    assert webhooks.permitted([ip_address(address)], [ip_network(address)])


def test_the_address_that_was_checked_is_the_one_that_is_connected_to(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name turns to loopback after the check: nothing looks it up a second time."""
    asked: list[str] = []
    real = socket.getaddrinfo

    def turning(host: Any, *given: Any, **options: Any) -> Any:
        if host != "turning.example":
            return real(host, *given, **options)
        asked.append(host)
        return real("127.0.0.1", *given, **options)

    monkeypatch.setattr(socket, "getaddrinfo", turning)
    with receiver(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n") as (port, _):
        url = f"http://turning.example:{port}/"
        _ask(ledger, url)
        assert webhooks.deliver(ledger, key=KEY)[0] == 0
        assert "not public" in str(_errors(ledger)[url])
        asked.clear()
        monkeypatch.setenv("FADE_WEBHOOK_NETWORKS", "127.0.0.0/8")
        _ask(ledger, url)
        sent, _ = webhooks.deliver(ledger, key=KEY)
        assert sent == len(asked) > 0
