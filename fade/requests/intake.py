"""Intake: messages from a queue into the ledger; acknowledged only once the ledger has committed.

One address picks the transport: ``folder:///PATH`` (JSON files, the default), ``amqp://`` (RabbitMQ),
``redis://`` or ``sqs://`` (through kombu). What is no request goes to a dead-letter place with the reason.
A consumer that dies before it acknowledges gets the message again, and the ledger knows it by its id.
"""

from __future__ import annotations

import heapq
import json
import logging
import os
import queue
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from fade.environment import environment
from fade.errors import ConfigError, ConflictError, DataError, FadeError
from fade.files import writing
from fade.project import Project, Projects
from fade.requests import brokers
from fade.requests.ledger import Ledger
from fade.requests.messages import MAX_BYTES, Message, read_message

DEFAULT_QUEUE = "folder:.fade/queue"
QUEUE, DEAD = "fade.requests", "fade.requests.dead"
ACTOR, DEAD_LETTERS = "intake", "dead_letters"
POISON = (ValueError, TypeError, ArithmeticError, LookupError, RecursionError)
"""Errors that a malformed message may cause; they reject that message and stop no other."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message as the transport delivered it, with callbacks to acknowledge it or to reject it with a reason."""

    body: bytes
    acknowledge: Callable[[], None]
    reject: Callable[[str], None]
    fault: str = ""
    """Why it is no message, if that is known before it is read."""


@dataclass(frozen=True, slots=True)
class IntakeCounts:
    """Messages of one round: ``new``, ``known`` before, ``dead`` (rejected)."""

    new: int = 0
    known: int = 0
    dead: int = 0

    @property
    def total(self) -> int:
        """Messages that left the queue."""
        return self.new + self.known + self.dead


class Transport(Protocol):
    """Where messages come from."""

    def receive(self, limit: int, seconds: float) -> Sequence[Delivery]:
        """Up to ``limit`` messages, after at most ``seconds`` of waiting for the first."""

    def send(self, body: bytes) -> None:
        """Put a message there."""


@contextmanager
def transport(url: str | None = None) -> Iterator[Transport]:
    """The transport of an address; FADE_QUEUE_URL, or the folder ``.fade/queue``, if None.

    Raises:
        ConfigError: nothing is known for such an address, the folder that a queue's folder is in is not there, or the
            broker refuses what it names: user, password, virtual host, a queue that is another program's alone.
        RegistryError: the broker cannot be reached, or ended the connection.
    """
    url = url or environment().queue_url or DEFAULT_QUEUE
    scheme = urlsplit(url).scheme
    if scheme == "folder":
        folder = Path(unquote(urlsplit(url).path))
        if url != DEFAULT_QUEUE and not folder.parent.is_dir():  # a share that is not mounted is no empty queue
            raise ConfigError(
                f"The queue {url} is in no folder: {folder.parent} is not there. Mount it, or correct FADE_QUEUE_URL."
            )
        yield Folder(folder)
    elif scheme in ("amqp", "amqps", "redis", "rediss", "sqs"):
        with brokers.connected(url) as connection:
            yield Broker(connection)
    else:
        raise ConfigError(
            f"No queue is known for {scheme or 'this'}: addresses; expected folder:PATH, amqp://, redis:// or sqs://."
        )


def take_in(
    ledger: Ledger, source: Transport, projects: Projects, *, limit: int = 200, seconds: float = 1.0
) -> IntakeCounts:
    """One round: receive, commit to the ledger in one transaction, then acknowledge.

    Args:
        projects: those that messages may be for; one that names another is dead.

    Raises:
        RegistryError: ledger or broker is down; what was received is not acknowledged and comes again.
    """
    messages: list[tuple[Delivery, tuple[Message, Project]]] = []
    dead: list[tuple[Delivery, str]] = []
    for delivery in source.receive(limit, seconds):
        try:
            if delivery.fault:
                raise DataError(delivery.fault)
            message = read_message(delivery.body)
            messages.append((delivery, (message, projects.chosen(message.project))))
        except POISON as error:
            dead.append((delivery, _why(error)))
    new = known = 0
    results = _submit(ledger, [message for _, message in messages])
    for (delivery, _), result in zip(messages, results, strict=True):
        if isinstance(result, str):
            dead.append((delivery, result))
            continue
        new, known = new + result, known + (not result)
        delivery.acknowledge()
    if dead:
        ledger.append(DEAD_LETTERS, actor=ACTOR, details={"count": len(dead)})
    for delivery, reason in dead:
        delivery.reject(reason)
    return IntakeCounts(new, known, len(dead))


def _submit(ledger: Ledger, messages: Sequence[tuple[Message, Project]]) -> list[bool | str]:
    """For each message whether it is new, or the reason to reject it. One bad message does not hold up the others."""
    if not messages:
        return []
    try:
        results = ledger.submit_all(messages, actor=ACTOR)
    except ConfigError:
        raise  # the ledger's key is not here: no message's fault
    except POISON as error:
        if len(messages) == 1:
            return [_why(error)]
        return [result for message in messages for result in _submit(ledger, [message])]
    return [str(result) if isinstance(result, ConflictError) else result[1] for result in results]


def _why(error: Exception) -> str:
    """The reason for a dead letter. Messages of foreign errors are left out: they may quote personal values."""
    return str(error) if isinstance(error, FadeError) else f"It cannot be taken in ({type(error).__name__})."


class Folder:
    """A folder of JSON files: put one there under a temporary name, and rename it to ``*.json``.

    A file is removed when the ledger has it; ``dead/`` keeps what is no request, with ``NAME.reason.json``: also
    what has such a name and is no file that can be read, a folder or a pipe.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stuck: set[str] = set()
        (folder / "dead").mkdir(parents=True, exist_ok=True)

    def receive(self, limit: int, seconds: float) -> Sequence[Delivery]:
        """The oldest names first; an empty folder is looked at once more after ``seconds``."""
        found = self._names(limit)
        if not found and seconds:
            time.sleep(seconds)
            found = self._names(limit)
        deliveries = []
        for path in found:
            try:
                # A pipe would be waited for, and a link could show what lies elsewhere.
                fault = "" if S_ISREG(path.lstat().st_mode) else "It is no file: a folder, a link or a pipe."
                deliveries.append(self._delivery(path, b"" if fault else _read(path), fault))
            except FileNotFoundError:
                continue  # another consumer has taken it
            except OSError as error:
                deliveries.append(self._delivery(path, b"", f"It cannot be read ({type(error).__name__})."))
        return deliveries

    def send(self, body: bytes) -> None:
        """A new file, named by time, so that what was sent first is taken first."""
        with writing(self.folder / f"{time.time_ns():020d}-{uuid.uuid4()}.json") as temporary:
            temporary.write_bytes(body)

    def _names(self, limit: int) -> list[Path]:
        with os.scandir(self.folder) as entries:  # a queue may be long: the oldest names alone are sorted
            names = (one.name for one in entries if one.name.endswith(".json") and not one.name.startswith("."))
            return [self.folder / name for name in heapq.nsmallest(limit, (n for n in names if n not in self.stuck))]

    def _delivery(self, path: Path, body: bytes, fault: str) -> Delivery:
        def reject(reason: str) -> None:
            place = self.folder / "dead" / path.name
            if place.exists():
                place = place.with_name(f"{path.stem}.{uuid.uuid4().hex[:8]}.json")
            with writing(place.with_name(f"{place.name}.reason.json")) as temporary:
                temporary.write_text(json.dumps({"reason": reason}, indent=2))
            try:
                path.rename(place)
            except FileNotFoundError:
                return  # another consumer did it
            except OSError as error:
                self.stuck.add(path.name)  # once is enough: the others are not to wait for it
                logger.error("a dead letter cannot be moved out of %s (%s)", self.folder, type(error).__name__)

        return Delivery(body, lambda: path.unlink(missing_ok=True), reject, fault)


def _read(path: Path) -> bytes:
    """The beginning of a file, one byte more than a message may have, so that a longer one is noticed."""
    with path.open("rb") as stream:
        return stream.read(MAX_BYTES + 1)


class Broker:
    """A queue of a broker, through kombu; dead letters go to a second queue, the reason in a header."""

    def __init__(self, connection: Any) -> None:
        from kombu import Consumer, Queue

        self.connection = connection
        self.producer = connection.Producer(serializer="raw", auto_declare=False)
        self.queues = {name: Queue(name, routing_key=name, durable=True) for name in (QUEUE, DEAD)}
        channel = connection.default_channel
        for one in self.queues.values():
            if not brokers.is_declared(connection, one):
                one(channel).declare()
        brokers.take_plain(channel, QUEUE)
        self.waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.consumer = Consumer(
            channel, [self.queues[QUEUE]], on_message=self.waiting.put, accept=None, prefetch_count=500,
            auto_declare=False,
        )  # fmt: skip
        self.consumer.consume()

    def receive(self, limit: int, seconds: float) -> Sequence[Delivery]:
        """What the broker has pushed; waits for the first alone."""
        deliveries: list[Delivery] = []
        patience = seconds
        if self.connection.supports_heartbeats:
            self.connection.heartbeat_check()  # a broker that is gone without a word is noticed
        while len(deliveries) < limit:
            if self.waiting.empty():
                try:
                    self.connection.drain_events(timeout=max(patience, 0.01))
                except TimeoutError:
                    break
                continue
            deliveries.append(self._delivery(self.waiting.get()))
            patience = 0.01
        return deliveries

    def send(self, body: bytes) -> None:
        """Publish, kept on the broker's disk."""
        self._publish(QUEUE, body, {})

    def _publish(self, name: str, body: bytes, headers: dict[str, str]) -> None:
        self.producer.publish(
            body, exchange="", routing_key=name, headers=headers, delivery_mode=2,
            content_type="application/octet-stream", content_encoding="binary",
        )  # fmt: skip

    def _delivery(self, message: Any) -> Delivery:
        body = message.body.encode("utf-8", "surrogatepass") if isinstance(message.body, str) else bytes(message.body)

        def reject(reason: str) -> None:
            self._publish(DEAD, body, {"reason": reason})
            message.ack()

        return Delivery(body, message.ack, reject)
