"""A request as the ledger holds it, and the operations within one transaction: read, change, log, notify.

A change of state is the row, a link of the chain and a webhook in the outbox, together or not at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import sqlalchemy as sa
from dateutil.relativedelta import relativedelta
from sqlalchemy.engine import Connection

from fade.errors import DataError, nearest
from fade.requests import chain, tables
from fade.requests.chain import Event, plain
from fade.requests.sealing import LETTERS, SEAL, key_of, seal_letter, seal_request
from fade.requests.states import State, check_transition
from fade.requests.tables import requests

TERMS = {"ccpa": (relativedelta(days=45), relativedelta(days=90))}
"""By regulation, how long after receipt a request is due, and how long at most if it is extended.

11 CCR 7021 (CCPA): 45 calendar days, and at most 90 in all."""
TERM = relativedelta(months=1), relativedelta(months=3)
"""GDPR Art. 12(3), and the default: one month, and two further months where necessary."""


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
    project: str
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


_PLAIN_ID = re.compile(r"[0-9A-Za-z-]{1,64}")
COLUMNS = [requests.c[field.name] for field in fields(Record)]


def to_record(row: Mapping[str, Any]) -> Record:
    """A row of the table as a record."""
    changed = {"state": State(row["state"]), "aliases": tuple(row["aliases"]), "pictures": tuple(row["pictures"])}
    return Record(**{field.name: row[field.name] for field in fields(Record)} | changed)


def utc_now() -> datetime:
    """The clock where none is given."""
    return datetime.now(UTC)


def clock(connection: Connection) -> datetime:
    """The database's clock, which all workers share whatever theirs say; SQLite's is this machine's."""
    if connection.dialect.name != "postgresql":
        return utc_now()
    now: datetime = connection.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
    return now.astimezone(UTC)


def deadline(received_at: datetime, regulation: str, *, extended: bool = False) -> datetime:
    """When a request is due by its regulation, by the calendar of ``received_at``'s zone.

    The 31st becomes a shorter month's last day.
    """
    first, most = TERMS.get(regulation, TERM)
    return received_at + (most if extended else first)


def extension(received_at: datetime, regulation: str, due_at: datetime) -> datetime:
    """When it is due at most, if it is extended: by the calendar of the zone that led to ``due_at``.

    The zone itself is not kept, so of all that fit the one that gives the earliest time counts: never past the law's.
    """
    zones = [timezone(timedelta(minutes=minutes)) for minutes in range(-12 * 60, 14 * 60 + 1, 15)]
    local = [at for at in map(received_at.astimezone, zones) if deadline(at, regulation) == due_at]
    return min(deadline(at, regulation, extended=True) for at in local or [received_at]).astimezone(UTC)


def minimal(reason: str, record: Record) -> str:
    """A reason for the log: without the names and the pictures' ids that the request holds."""
    for name in sorted({record.concept, record.subject, *record.aliases} - {None}, key=lambda n: -len(str(n))):
        reason = re.sub(re.escape(str(name)), "[name]", reason, flags=re.IGNORECASE)
    for picture in (one for one in record.pictures if one in reason):
        reason = reason.replace(picture, "[picture]")
    return reason


def get(connection: Connection, request_id: str) -> Record:
    """One request, within a transaction."""
    plain_id = _PLAIN_ID.fullmatch(request_id)  # what is none is asked of no database: it may not even be text to it
    found = select_records(connection, requests.c.id == request_id.lower()) if plain_id else []
    if not found:
        if not plain_id:
            raise DataError(f"There is no request {request_id[:60]!a} in the ledger: an id is a UUID.")
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
    logged: str | None = None,
    details: Mapping[str, Any] | None = None,
    **columns: Any,
) -> None:
    """Change a request's state within a transaction that holds the log's head: row, log and webhook together.

    Args:
        reason: in full words, for the row, which can be minimised.
        logged: the reason for the log, where the words may name others than the request does: the log cannot be
            changed any more. ``reason`` without the request's own names if None.
    """
    check_transition(record.id, record.state, after)
    lease = {} if after is State.RUNNING else {"worker": None, "lease_until": None, "step": None}
    row = update(connection, record.id, **lease, state=after, state_at=now, reason=plain(reason), **columns)
    event = Event(
        "state",
        actor,
        now,
        reason=minimal(reason if logged is None else logged, record),
        request_id=record.id,
        erasure_id=row["erasure_id"],
        before=record.state,
        after=after,
        details=json.dumps(dict(details or {}), sort_keys=True),
    )
    log_events(connection, [event], {record.id: row})
    if record.state is State.LIVE and after is not State.LIVE:
        _open_duplicates(connection, record.id, now=now)
    if record.state is not State.LIVE and after is State.LIVE:
        _take_up_others(connection, row, now=now)


def _open_duplicates(connection: Connection, request_id: str, *, now: datetime) -> None:
    """Reschedule the duplicates of a request that is no longer live: their own erasure is due now."""
    mine = (requests.c.duplicate_of == request_id, requests.c.state == State.DUPLICATE)
    for record in select_records(connection, *mine):
        change(
            connection, record, State.SCHEDULED, actor="ledger", now=now, erasure_id=None, duplicate_of=None,
            reason=f"the erasure of request {request_id} is no longer in force",
        )  # fmt: skip


def _take_up_others(connection: Connection, row: Mapping[str, Any], *, now: datetime) -> None:
    """Reschedule other requests for a concept that is live now, so that the drain closes them."""
    theirs = (
        requests.c.concept_key == row["concept_key"],
        requests.c.state.in_((State.CANDIDATE, State.REJECTED)),
        requests.c.erasure_id != row["erasure_id"],
    )
    for record in select_records(connection, *theirs):
        said = f"the same concept is erased on this base by request {row['id']}, whose erasure is in force"
        change(connection, record, State.SCHEDULED, actor="ledger", now=now, reason=said)


def log_events(connection: Connection, events: Sequence[Event], rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Append events to the chain; with each request's last one its seal, with each state a letter to who asked for it.

    Args:
        rows: requests as they are after the events, by id.
    """
    key, first = key_of(connection), chain.lock_head(connection)[0] + 1
    last = {event.request_id: number for number, event in enumerate(events)}
    letters, sealed = [], []
    for number, event in enumerate(events):
        name = str(event.request_id)
        added: dict[str, Any] = {}
        if last[name] == number:
            added[SEAL] = seal_request(key, rows[name])
        if event.after is not None and (url := rows[name]["callback_url"]):
            body = {
                "id": name, "sequence": first + number, "before": event.before, "state": event.after,
                "at": event.at.astimezone(UTC).isoformat(),
            }  # fmt: skip
            letters.append(letter(name, first + number, url, body, event.at))
            added[LETTERS] = letter_seals(key, letters[-1:])
        details = json.dumps({**json.loads(event.details), **added}, sort_keys=True)
        sealed.append(replace(event, details=details))
    chain.append(connection, sealed)
    if letters:
        connection.execute(sa.insert(tables.outbox), letters)


def letter(request_id: str, seq: int, url: str, body: Mapping[str, Any], at: datetime) -> dict[str, Any]:
    """A row of the outbox, to be sent at once."""
    text = json.dumps(body, sort_keys=True)
    return {"request_id": request_id, "seq": seq, "url": url, "body": text, "attempts": 0, "next_at": at}


def letter_seals(key: bytes, letters: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """For the details of a row of the log: each letter's seal by its number."""
    return {
        str(one["seq"]): seal_letter(key, request_id=one["request_id"], url=one["url"], body=one["body"])
        for one in letters
    }


def update(connection: Connection, request_id: str, **columns: Any) -> Mapping[str, Any]:
    """Set columns of a request, which `log_events` then seals; gives the whole row as it is now."""
    changed = sa.update(requests).where(requests.c.id == request_id).values(**columns).returning(*requests.c)
    return dict(connection.execute(changed).mappings().one())


def select_records(connection: Connection, *wanted: Any, limit: int | None = None) -> list[Record]:
    """The requests that conditions choose, by deadline."""
    asked = sa.select(*COLUMNS).where(*wanted).order_by(requests.c.due_at, requests.c.id).limit(limit)
    return [to_record(dict(row)) for row in connection.execute(asked).mappings()]
