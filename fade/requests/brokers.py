"""Brokers through kombu: a connection whose every failure is one of our errors, and queues as others made them."""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from fade.errors import ConfigError, RegistryError

HEARTBEAT_SECONDS = 60
_REFUSALS = {
    "AccessRefused": "refuses the user or the password, or lets the user not do this",
    "NotAllowed": "refuses the virtual host: there is none of this name, or the user may not enter it",
    "PreconditionFailed": "has a queue of this name that was made with other properties",
    "ResourceLocked": "has a queue of this name that is another connection's alone",
    "AuthenticationError": "refuses the user or the password",
    "AuthenticationWrongNumberOfArgsError": "refuses the user or the password",
    "NoPermissionError": "lets the user not do this",
}
"""Errors of amqp and redis that no waiting mends, by name: redis need not be installed."""


@contextmanager
def connected(url: str) -> Iterator[Any]:
    """A connection to a broker; whatever ends it within the block is said in our words.

    Raises:
        ConfigError: the broker refuses user, password, virtual host or queue.
        RegistryError: it cannot be reached, or ended the connection. What was not acknowledged comes again.
    """
    from kombu import Connection
    from kombu.exceptions import KombuError

    scheme = urlsplit(url).scheme
    options: dict[str, Any] = {}
    if scheme.startswith("amqp"):
        options = {"confirm_publish": True}
    elif scheme.startswith("redis"):
        # What a dead consumer held comes again after this many seconds.
        options = {"visibility_timeout": 120}
    connection = Connection(url, transport_options=options, connect_timeout=10, heartbeat=HEARTBEAT_SECONDS)
    failures = (*connection.connection_errors, *connection.channel_errors, KombuError, OSError)
    try:
        with connection:
            # Who follows asks again by itself; who does not is told soon.
            connection.ensure_connection(max_retries=1, interval_start=0.2, timeout=5)
            yield connection
    except failures as error:
        raise explained(error, scheme) from error


def explained(error: BaseException, scheme: str) -> ConfigError | RegistryError:
    """What a broker's failure means, and what to do."""
    link: BaseException | None = error
    while link is not None:
        if said := _REFUSALS.get(type(link).__name__):
            return ConfigError(
                f"The queue's broker ({scheme}) {said}: {_words(link)}. Correct FADE_QUEUE_URL, or the broker's "
                "settings."
            )
        link = link.__cause__ or link.__context__
    return RegistryError(
        f"The queue ({scheme}) cannot be reached: {_words(error)}. Nothing was lost: what was not acknowledged "
        "comes again. Check FADE_QUEUE_URL and that the broker runs."
    )


def _words(error: BaseException) -> str:
    """An error's words, without the stop that ours go on after."""
    return str(error).rstrip(". ") or type(error).__name__


def is_declared(connection: Any, queue: Any) -> bool:
    """Whether AMQP's broker has the queue, whoever made it and how: quorum, time to live, dead letters.

    Asked on a channel of its own, which a "no" closes. Of other brokers False: declaring changes nothing there.
    """
    if not connection.transport_cls.startswith(("amqp", "pyamqp")):
        return False
    from amqp.exceptions import NotFound

    with connection.channel() as channel:
        try:
            queue(channel).queue_declare(passive=True)
        except NotFound:
            return False
    return True


def take_plain(channel: Any, queue: str) -> None:
    """Take also what others push into a Redis list without kombu's envelope: it would end the consumer, and be lost."""
    client = getattr(channel, "client", None)
    if client is None or not hasattr(client, "set_response_callback"):
        return

    def enveloped(response: Any, **_: Any) -> Any:
        return (response[0], _in_envelope(response[1], queue)) if response else None

    client.set_response_callback("BRPOP", enveloped)


def _in_envelope(item: bytes, queue: str) -> bytes:
    if _is_envelope(item):
        return item
    properties = {
        "body_encoding": "base64", "delivery_tag": str(uuid.uuid4()), "delivery_mode": 2, "priority": 0,
        "delivery_info": {"exchange": "", "routing_key": queue},
    }  # fmt: skip
    envelope = {
        "body": base64.b64encode(item).decode(), "content-encoding": "binary",
        "content-type": "application/octet-stream", "headers": {}, "properties": properties,
    }  # fmt: skip
    return json.dumps(envelope).encode()


def _is_envelope(item: bytes) -> bool:
    try:
        content = json.loads(item)
        properties = content["properties"]
        tagged = isinstance(properties["delivery_tag"], str) and isinstance(properties["delivery_info"], dict)
        if properties.get("body_encoding") == "base64":
            base64.b64decode(content["body"], validate=True)
        return tagged and isinstance(content["body"], str)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False


def look(url: str, name: str) -> str:
    """Log in to a broker and look whether the queue is there; nothing is made. Gives what there is.

    Raises:
        ConfigError: the broker refuses user, password or virtual host.
        RegistryError: it cannot be reached.
    """
    from kombu import Queue

    parts = urlsplit(url)
    place = f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}"
    with connected(url) as connection:
        connection.default_channel  # noqa: B018 - Redis checks user and password here
        if not parts.scheme.startswith("amqp"):
            return f"{place} answers, and takes the user"
        found = is_declared(connection, Queue(name))
    return f"{place} takes the user; the queue {name} is {'there' if found else 'made at first use'}"
