"""A request as the ledger holds it, and what is done to it within one transaction: read, change, log, tell.

A change of state is the row, a link of the chain and a webhook in the outbox, together or not at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from dateutil.relativedelta import relativedelta
from sqlalchemy.engine import Connection

from fade.errors import DataError, nearest
from fade.requests import chain, tables
from fade.requests.chain import Event
from fade.requests.states import State, check_transition
from fade.requests.tables import requests

MONTHS, EXTENSION_MONTHS = 1, 2
"""GDPR Art. 12(3): one month, and two further months where necessary."""


@dataclass(frozen=True, slots=True)
class Record:
    """A request as the ledger holds it. ``fence`` counts its leases: only the newest may end a run."""

    id: str
    external_id: str | None
    regulation: str
    legal_basis: str | None
    kind: str
    concept: str | None
    aliases: tuple[str, ...]
    surrogate: str | None
    pictures: tuple[str, ...]
    subject: str | None
    base: str
    priority: int
    callback_url: str | None
    received_at: datetime
    due_at: datetime
    extended: bool
    state: State
    state_at: datetime
    reason: str | None
    step: str | None
    erasure_id: str | None
    duplicate_of: str | None
    attempts: int
    not_before: datetime | None
    worker: str | None
    lease_until: datetime | None
    fence: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of the log."""

    seq: int
    request_id: str | None
    erasure_id: str | None
    event: str
    before: str | None
    after: str | None
    actor: str
    reason: str
    details: dict[str, Any]
    at: datetime
    hash: str


COLUMNS = [requests.c[field.name] for field in fields(Record)]


def to_record(row: Mapping[str, Any]) -> Record:
    """A row of the table as a record."""
    changed = {"state": State(row["state"]), "aliases": tuple(row["aliases"]), "pictures": tuple(row["pictures"])}
    return Record(**{field.name: row[field.name] for field in fields(Record)} | changed)


def utc_now() -> datetime:
    """The clock where none is given."""
    return datetime.now(UTC)


def deadline(received_at: datetime, *, extended: bool = False) -> datetime:
    """One calendar month after receipt, three if extended; the 31st becomes a shorter month's last day."""
    return received_at + relativedelta(months=MONTHS + (EXTENSION_MONTHS if extended else 0))


def minimal(reason: str, record: Record) -> str:
    """A reason for the log: without the names that the request holds."""
    for name in sorted({record.concept, record.subject, *record.aliases} - {None}, key=lambda n: -len(str(n))):
        reason = re.sub(re.escape(str(name)), "[name]", reason, flags=re.IGNORECASE)
    return reason


def get(connection: Connection, request_id: str) -> Record:
    """One request, within a transaction."""
    found = select_records(connection, requests.c.id == request_id)
    if not found:
        known = connection.scalars(sa.select(requests.c.id).where(requests.c.id.startswith(request_id[:4])).limit(50))
        options = list(known)
        raise DataError(
            f"There is no request {request_id!r} in the ledger. "
            + (nearest(request_id, options) if options else "`fade request list` shows those there are.")
        )
    return found[0]


def change(
    connection: Connection,
    record: Record,
    after: State,
    *,
    actor: str,
    reason: str,
    now: datetime,
    details: Mapping[str, Any] | None = None,
    **columns: Any,
) -> None:
    """Bring a request to a state within a transaction that holds the head: row, log and webhook together."""
    check_transition(record.id, record.state, after)
    lease = {} if after is State.RUNNING else {"worker": None, "lease_until": None, "step": None}
    update(connection, record.id, **lease, state=after, state_at=now, reason=reason, **columns)
    event = Event(
        "state",
        actor,
        now,
        reason=minimal(reason, record),
        request_id=record.id,
        erasure_id=columns.get("erasure_id", record.erasure_id),
        before=record.state,
        after=after,
        details=json.dumps(dict(details or {}), sort_keys=True),
    )
    log_events(connection, [event], {record.id: record.callback_url})


def log_events(connection: Connection, events: Sequence[Event], callbacks: Mapping[str, str | None]) -> None:
    """Append events to the chain, and put a webhook for each state into the outbox of who asked for it."""
    numbers = chain.append(connection, events)
    letters = [
        {
            "request_id": event.request_id,
            "seq": seq,
            "url": callbacks[event.request_id],
            "body": json.dumps(
                {"id": event.request_id, "sequence": seq, "before": event.before, "state": event.after,
                 "at": event.at.astimezone(UTC).isoformat()}, sort_keys=True
            ),
            "attempts": 0,
            "next_at": event.at,
        }
        for seq, event in zip(numbers, events, strict=True)
        if event.after is not None and event.request_id is not None and callbacks.get(event.request_id)
    ]  # fmt: skip
    if letters:
        connection.execute(sa.insert(tables.outbox), letters)


def update(connection: Connection, request_id: str, **columns: Any) -> None:
    """Set columns of a request that are no state."""
    connection.execute(sa.update(requests).where(requests.c.id == request_id).values(**columns))


def select_records(connection: Connection, *wanted: Any, limit: int | None = None) -> list[Record]:
    """The requests that conditions choose, by deadline."""
    asked = sa.select(*COLUMNS).where(*wanted).order_by(requests.c.due_at, requests.c.id).limit(limit)
    return [to_record(dict(row)) for row in connection.execute(asked).mappings()]
