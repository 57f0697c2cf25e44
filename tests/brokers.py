"""Queues of real brokers, for one test alone."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from kombu import Connection

from fade.requests import intake
from tests.databases import missing

BROKERS = {"rabbitmq": "amqp://guest:guest@127.0.0.1:5672//", "redis": "redis://127.0.0.1:6379/7"}


@contextmanager
def own_queue(broker: str) -> Iterator[str]:
    """A broker's address; until the end the intake's queues there have names of their own, and are then deleted."""
    address = BROKERS[broker]
    with pytest.MonkeyPatch.context() as patched:
        for name in ("QUEUE", "DEAD"):
            patched.setattr(intake, name, f"{getattr(intake, name)}.{uuid.uuid4().hex[:8]}")
        try:
            with Connection(address, connect_timeout=3) as connection:
                connection.ensure_connection(max_retries=1, timeout=3)
        except OSError:
            missing(f"{broker} at {address}")
        yield address
        with Connection(address) as connection:
            for name in (intake.QUEUE, intake.DEAD):
                connection.default_channel.queue_delete(name)
