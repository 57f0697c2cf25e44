"""The ledger's log as a chain: each row holds the hash of the row before, so that no row changes unseen.

hash_n = SHA-256(JSON(row_n without its hash, with previous = hash_{n-1}))
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from fade.errors import LineageError
from fade.requests import tables
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


_COLUMNS = [field.name for field in fields(Event)]


@dataclass(frozen=True, slots=True)
class ChainReport:
    """A chain that holds: how many rows, and the hash of the last (what a copy kept elsewhere compares)."""

    rows: int
    head: str


def row_hash(row: Mapping[str, Any]) -> str:
    """Hash of a row's content and of its predecessor's hash."""
    content = {key: value for key, value in row.items() if key != "hash"}
    content["at"] = content["at"].astimezone(UTC).isoformat(timespec="microseconds")
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


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
        previous = row["hash"] = row_hash(row)
        rows.append(row)
    if rows:
        connection.info.setdefault(WRITTEN, []).extend(rows)
        connection.execute(sa.insert(tables.log), rows)
        connection.execute(sa.update(tables.head).where(tables.head.c.id == 1).values(seq=seq, hash=previous))
    return [row["seq"] for row in rows]


def verify(connection: Connection) -> ChainReport:
    """Walk the whole chain, and hold every request's state against its last transition.

    Raises:
        LineageError: names the first row that was changed, is missing or was added past the end, or the
            request whose state is not the logged one.
    """
    expected, number, last = GENESIS, 0, {}
    rows = connection.execution_options(yield_per=1000).execute(sa.select(tables.log).order_by(tables.log.c.seq))
    for row in rows.mappings():
        number += 1
        if row["seq"] != number:
            raise LineageError(f"The log is broken at row {number}: the next row there is {row['seq']}.")
        if row["previous"] != expected or row_hash(dict(row)) != row["hash"]:
            raise LineageError(f"The log is broken at row {number}: it, or the row before, was changed.")
        expected = row["hash"]
        if row["after"] is not None:
            last[row["request_id"]] = row["after"]
    end = connection.execute(sa.select(tables.head.c.seq, tables.head.c.hash)).one_or_none()
    if end is None or (end.seq, end.hash) != (number, expected):
        raise LineageError(f"The log ends at row {number}, which is not the recorded end: rows were cut off or added.")
    for request_id, state in connection.execute(sa.select(tables.requests.c.id, tables.requests.c.state)):
        if last.pop(request_id, None) != state:
            raise LineageError(f"Request {request_id} is {state}, which its log does not say: it was changed by hand.")
    if last:
        raise LineageError(f"The log tells of a request that is gone: {next(iter(last))}.")
    return ChainReport(number, expected)
