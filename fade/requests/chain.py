"""The ledger's log as a chain: each row holds the hash of the row before, so that no row changes unseen.

hash_n = SHA-256(JSON(row_n without its hash, with previous = hash_{n-1}))

What lies beside the log, requests' own rows and the letters of the outbox, is held against the seals in it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from fade.errors import LineageError
from fade.requests import tables
from fade.requests.sealing import LETTERS, SEAL, key_of, seal_letter, seal_request, seal_sent
from fade.requests.tables import GENESIS

WRITTEN = "fade_rows"
"""Where a connection keeps the rows of its transaction, for the program's own log."""


@dataclass(frozen=True, slots=True)
class Event:
    """What a row of the log says, before it has its place in the chain."""

    event: str
    actor: str
    at: datetime
    reason: str = ""
    request_id: str | None = None
    erasure_id: str | None = None
    before: str | None = None
    after: str | None = None
    details: str = "{}"


_COLUMNS = [one.name for one in fields(Event)]


@dataclass(frozen=True, slots=True)
class ChainReport:
    """A verified chain: number of rows, and the hash of the last, to compare with a copy kept elsewhere."""

    rows: int
    head: str


def row_hash(row: Mapping[str, Any]) -> str:
    """Hash of a row's content and of its predecessor's hash."""
    content = {key: value for key, value in row.items() if key != "hash"}
    content["at"] = content["at"].astimezone(UTC).isoformat(timespec="microseconds")
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def plain(text: str) -> str:
    """Text that every database and every hash takes: lone surrogates (of file names) and NUL as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("\0", "\\x00")


def lock_head(connection: Connection) -> tuple[int, str]:
    """The chain's end, locked until the transaction ends; whoever writes takes it before anything else."""
    row = connection.execute(
        sa.select(tables.head.c.seq, tables.head.c.hash).where(tables.head.c.id == 1).with_for_update()
    ).one()
    return int(row.seq), str(row.hash)


def append(connection: Connection, events: Iterable[Event]) -> list[int]:
    """Add rows to the chain; gives their numbers."""
    seq, previous = lock_head(connection)
    rows = []
    for event in events:
        seq += 1
        row = {"seq": seq, **{name: getattr(event, name) for name in _COLUMNS}, "previous": previous}
        row |= {name: plain(row[name]) for name in ("actor", "reason")}
        previous = row["hash"] = row_hash(row)
        rows.append(row)
    if rows:
        connection.info.setdefault(WRITTEN, []).extend(rows)
        connection.execute(sa.insert(tables.log), rows)
        connection.execute(sa.update(tables.head).where(tables.head.c.id == 1).values(seq=seq, hash=previous))
    return [row["seq"] for row in rows]


@dataclass(slots=True)
class _LoggedState:
    """Requests and letters according to the log: last state and last seal of each request, letters by row number."""

    states: dict[str, str] = field(default_factory=dict)
    seals: dict[str, str] = field(default_factory=dict)
    letters: dict[int, tuple[str, str]] = field(default_factory=dict)

    def add(self, row: Mapping[str, Any]) -> None:
        if row["request_id"] is None:
            return
        if row["after"] is not None:
            self.states[row["request_id"]] = row["after"]
        details = json.loads(row["details"])
        if SEAL in details:
            self.seals[row["request_id"]] = details[SEAL]
        for number, seal in details.get(LETTERS, {}).items():
            self.letters[int(number)] = (row["request_id"], seal)


def verify(connection: Connection) -> ChainReport:
    """Walk the whole chain, and hold every request and every letter against what the log says of it.

    Raises:
        LineageError: names the first row that was changed, is missing or was added past the end, or the
            request or letter that is not as it was logged.
    """
    expected, number, logged = GENESIS, 0, _LoggedState()
    rows = connection.execution_options(yield_per=1000).execute(sa.select(tables.log).order_by(tables.log.c.seq))
    for row in rows.mappings():
        number += 1
        if row["seq"] != number:
            raise LineageError(f"The log is broken at row {number}: the next row there is {row['seq']}.")
        if row["previous"] != expected or row_hash(dict(row)) != row["hash"]:
            raise LineageError(f"The log is broken at row {number}: it, or the row before, was changed.")
        expected = row["hash"]
        logged.add(dict(row))
    end = connection.execute(sa.select(tables.head.c.seq, tables.head.c.hash)).one_or_none()
    if end is None or (end.seq, end.hash) != (number, expected):
        raise LineageError(f"The log ends at row {number}, which is not the recorded end: rows were cut off or added.")
    _check_requests(connection, logged)
    _check_letters(connection, logged)
    return ChainReport(number, expected)


def _check_requests(connection: Connection, logged: _LoggedState) -> None:
    key = key_of(connection)
    for row in connection.execute(sa.select(tables.requests)).mappings():
        name, state = row["id"], row["state"]
        if logged.states.pop(name, None) != state:
            raise LineageError(f"Request {name} is {state}, which its log does not say: it was changed by hand.")
        if not hmac.compare_digest(logged.seals.get(name, ""), seal_request(key, dict(row))):
            raise LineageError(
                f"Request {name} is not as the log sealed it: what it asks for, its base, dates or addresses were "
                "changed by hand. Compare it with a backup."
            )
    if logged.states:
        raise LineageError(f"The log tells of a request that is gone: {next(iter(logged.states))}.")


def _check_letters(connection: Connection, logged: _LoggedState) -> None:
    key, outbox = key_of(connection), tables.outbox.c
    columns = (outbox.id, outbox.seq, outbox.request_id, outbox.url, outbox.body, outbox.sent_at, outbox.sent_seal)
    letters = sa.select(*columns).order_by(outbox.id)
    for row in connection.execute(letters):
        _, seal = logged.letters.pop(row.seq, ("", ""))
        if not hmac.compare_digest(seal, seal_letter(key, request_id=row.request_id, url=row.url, body=row.body)):
            raise LineageError(
                f"The outbox holds a letter of request {row.request_id} (row {row.seq} of the log) that the log did "
                "not seal: it was changed or added by hand."
            )
        if row.sent_at is not None and not hmac.compare_digest(
            row.sent_seal or "", seal_sent(key, number=row.id, sent_at=row.sent_at)
        ):
            raise LineageError(
                f"A letter of request {row.request_id} (row {row.seq} of the log) was marked as sent by hand: it was "
                "not sent."
            )
    for number, (name, _) in logged.letters.items():
        raise LineageError(f"A letter of request {name} is gone from the outbox: that of row {number} of the log.")
