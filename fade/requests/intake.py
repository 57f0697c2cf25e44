"""Intake: messages from a queue into the ledger; acknowledged only once the ledger has committed.

One address picks the transport: ``folder:///PATH`` (JSON files, the default), ``amqp://`` (RabbitMQ),
``redis://`` or ``sqs://`` (through kombu). What is no request goes to a dead-letter place with the reason.
A consumer that dies before it acknowledges gets the message again, and the ledger knows it by its id.
"""

from __future__ import annotations

import heapq
import json
import os
import queue
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from fade.environment import environment
from fade.errors import ConfigError, ConflictError, DataError, RegistryError
from fade.files import writing
from fade.requests.ledger import Ledger
from fade.requests.messages import Message, read_message

DEFAULT_QUEUE = "folder:.fade/queue"
QUEUE, DEAD = "fade.requests", "fade.requests.dead"
ACTOR = "intake"


@dataclass(frozen=True, slots=True)
class Letter:
    """A message as it came, and how to say that it was taken, or that it is dead and why."""

    body: bytes
    taken: Callable[[], None]
    dead: Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Taken:
    """What a round of intake did."""

    new: int = 0
    known: int = 0
    dead: int = 0

    @property
    def total(self) -> int:
        """Messages that left the queue."""
        return self.new + self.known + self.dead


class Transport(Protocol):
    """Where messages come from."""

    def receive(self, limit: int, seconds: float) -> Sequence[Letter]:
        """Up to ``limit`` messages, after at most ``seconds`` of waiting for the first."""

    def send(self, body: bytes) -> None:
        """Put a message there."""


@contextmanager
def transport(url: str | None = None) -> Iterator[Transport]:
    """The transport of an address; FADE_QUEUE_URL, or the folder ``.fade/queue``, if None.

    Raises:
        ConfigError: nothing is known for such an address.
        RegistryError: the broker refuses or cannot be reached.
    """
    url = url or environment().queue_url or DEFAULT_QUEUE
    scheme = urlsplit(url).scheme
    if scheme == "folder":
        yield Folder(Path(unquote(urlsplit(url).path)))
    elif scheme in ("amqp", "amqps", "redis", "rediss", "sqs"):
        from kombu.exceptions import OperationalError

        try:
            with _broker(url) as found:
                yield found
        except (OperationalError, OSError) as error:
            raise RegistryError(
                f"The queue ({scheme}) cannot be reached: {error}. Nothing was lost: what was not acknowledged "
                "comes again. Check FADE_QUEUE_URL and that the broker runs."
            ) from error
    else:
        raise ConfigError(
            f"No queue is known for {scheme or 'this'}: addresses; expected folder:PATH, amqp://, redis:// or sqs://."
        )


def take_in(ledger: Ledger, source: Transport, *, limit: int = 200, seconds: float = 1.0) -> Taken:
    """One round: receive, commit to the ledger in one transaction, then acknowledge.

    Raises:
        RegistryError: ledger or broker is down; what was received is not acknowledged and comes again.
    """
    letters = source.receive(limit, seconds)
    messages: list[tuple[Letter, Message]] = []
    dead: list[tuple[Letter, str]] = []
    for letter in letters:
        try:
            messages.append((letter, read_message(letter.body)))
        except DataError as error:
            dead.append((letter, str(error)))
    new = known = 0
    results = ledger.submit_all([message for _, message in messages], actor=ACTOR) if messages else []
    for (letter, _), result in zip(messages, results, strict=True):
        if isinstance(result, ConflictError):
            dead.append((letter, str(result)))
            continue
        new, known = new + result[1], known + (not result[1])
        letter.taken()
    for letter, reason in dead:
        letter.dead(reason)
    return Taken(new, known, len(dead))


class Folder:
    """A folder of JSON files: put one there under a temporary name, and rename it to ``*.json``.

    A file is removed when the ledger has it; ``dead/`` keeps what is no request, with ``NAME.reason.json``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "dead").mkdir(parents=True, exist_ok=True)

    def receive(self, limit: int, seconds: float) -> Sequence[Letter]:
        """The oldest names first; an empty folder is looked at once more after ``seconds``."""
        found = self._names(limit)
        if not found and seconds:
            time.sleep(seconds)
            found = self._names(limit)
        letters = []
        for path in found:
            try:
                letters.append(self._letter(path, path.read_bytes()))
            except FileNotFoundError:
                continue  # another consumer has taken it
        return letters

    def send(self, body: bytes) -> None:
        """A new file, named by time, so that what was sent first is taken first."""
        with writing(self.folder / f"{time.time_ns():020d}-{uuid.uuid4()}.json") as temporary:
            temporary.write_bytes(body)

    def _names(self, limit: int) -> list[Path]:
        with os.scandir(self.folder) as entries:  # a queue may be long: the oldest names alone are sorted
            names = (one.name for one in entries if one.name.endswith(".json") and not one.name.startswith("."))
            return [self.folder / name for name in heapq.nsmallest(limit, names)]

    def _letter(self, path: Path, body: bytes) -> Letter:
        def dead(reason: str) -> None:
            with writing(self.folder / "dead" / f"{path.name}.reason.json") as temporary:
                temporary.write_text(json.dumps({"reason": reason}, indent=2))
            try:
                path.replace(self.folder / "dead" / path.name)
            except FileNotFoundError:
                return  # another consumer did it

        return Letter(body, lambda: path.unlink(missing_ok=True), dead)


class Broker:
    """A queue of a broker, through kombu; dead letters go to a second queue, the reason in a header."""

    def __init__(self, connection: Any) -> None:
        from kombu import Consumer, Queue

        self.connection = connection
        self.producer = connection.Producer(serializer="raw", auto_declare=False)
        self.queues = {name: Queue(name, routing_key=name, durable=True) for name in (QUEUE, DEAD)}
        channel = connection.default_channel
        for one in self.queues.values():
            one(channel).declare()
        self.waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.consumer = Consumer(
            channel, [self.queues[QUEUE]], on_message=self.waiting.put, accept=None, prefetch_count=500
        )
        self.consumer.consume()

    def receive(self, limit: int, seconds: float) -> Sequence[Letter]:
        """What the broker has pushed; waits for the first alone."""
        letters: list[Letter] = []
        patience = seconds
        while len(letters) < limit:
            if self.waiting.empty():
                try:
                    self.connection.drain_events(timeout=max(patience, 0.01))
                except TimeoutError:
                    break
                continue
            letters.append(self._letter(self.waiting.get()))
            patience = 0.01
        return letters

    def send(self, body: bytes) -> None:
        """Publish, kept on the broker's disk."""
        self._publish(QUEUE, body, {})

    def _publish(self, name: str, body: bytes, headers: dict[str, str]) -> None:
        self.producer.publish(
            body, exchange="", routing_key=name, headers=headers, delivery_mode=2,
            content_type="application/octet-stream", content_encoding="binary",
        )  # fmt: skip

    def _letter(self, message: Any) -> Letter:
        body = message.body.encode() if isinstance(message.body, str) else bytes(message.body)

        def dead(reason: str) -> None:
            self._publish(DEAD, body, {"reason": reason})
            message.ack()

        return Letter(body, message.ack, dead)


@contextmanager
def _broker(url: str) -> Iterator[Broker]:
    from kombu import Connection

    options: dict[str, Any] = {}
    if url.startswith("amqp"):
        options = {"confirm_publish": True}
    elif url.startswith("redis"):
        # What a dead consumer held comes again after this many seconds.
        options = {"visibility_timeout": 120}
    with Connection(url, transport_options=options, connect_timeout=10) as connection:
        yield Broker(connection)
