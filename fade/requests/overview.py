"""Counts of requests by state and the most urgent ones, by few queries that an index answers."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

import sqlalchemy as sa

from fade.requests.ledger import Ledger
from fade.requests.records import Record, clock, to_record
from fade.requests.states import OPEN, State
from fade.requests.tables import outbox, requests


@dataclass(frozen=True, slots=True)
class Overview:
    """Requests by state, how many open ones are over their deadline, and the most urgent of them.

    Attributes:
        oldest_seconds: age of the open request that was received first; 0 if none is open.
        webhooks: letters that wait in the outbox.
    """

    counts: dict[str, int]
    overdue: int
    oldest_seconds: float
    webhooks: int
    urgent: tuple[Record, ...]
    at: datetime


def overview(ledger: Ledger, *, limit: int = 20, now: datetime | None = None) -> Overview:
    """Counts over all requests, and the open ones by deadline, those that run first."""
    with ledger.reading() as connection:
        now = now or clock(connection)
        counted = connection.execute(sa.select(requests.c.state, sa.func.count()).group_by(requests.c.state))
        counts = {str(state): int(count) for state, count in counted}
        late = sa.select(sa.func.count()).where(requests.c.state.in_(OPEN), requests.c.due_at < now)
        overdue = int(connection.scalar(late) or 0)
        oldest = connection.scalar(sa.select(sa.func.min(requests.c.received_at)).where(requests.c.state.in_(OPEN)))
        letters = int(connection.scalar(sa.select(sa.func.count()).where(outbox.c.sent_at.is_(None))) or 0)
        urgent: list[Record] = []
        # A state at a time, so that the index on state and deadline gives each one's first rows at once.
        for state in OPEN:
            asked = sa.select(requests).where(requests.c.state == state).order_by(requests.c.due_at).limit(limit)
            urgent += [to_record(dict(row)) for row in connection.execute(asked).mappings()]
    urgent.sort(key=lambda record: (record.state is not State.RUNNING, record.due_at, record.id))
    age = (now - oldest).total_seconds() if oldest else 0.0
    return Overview(counts, overdue, age, letters, tuple(urgent[:limit]), now)


def near_deadlines(ledger: Ledger, *, days: float, now: datetime | None = None) -> list[Record]:
    """Open requests whose deadline is nearer than ``days``, or over."""
    with ledger.reading() as connection:
        end = (now or clock(connection)) + timedelta(days=days)
        asked = sa.select(requests).where(requests.c.state.in_(OPEN), requests.c.due_at <= end)
        return [to_record(dict(row)) for row in connection.execute(asked.order_by(requests.c.due_at)).mappings()]
