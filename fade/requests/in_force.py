"""What requests have erased: which concepts, by which request, and which erasures are still wanted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import sqlalchemy as sa

from fade.requests.chain import Event
from fade.requests.ledger import Ledger
from fade.requests.messages import concept_digest
from fade.requests.records import Record, clock, get, log_events, select_records, update
from fade.requests.sealing import keyed
from fade.requests.states import State
from fade.requests.tables import requests


def erased_among(ledger: Ledger, names: Iterable[str], base: str, *, besides: str) -> set[str]:
    """Which of these concepts a request other than ``besides`` has erased on a base, or has a candidate for.

    Asked by ``concept_key``, so that a request whose names were forgotten still counts.
    """
    keys: dict[str, set[str]] = {}
    for name in names:
        keys.setdefault(keyed(ledger.key, concept_digest(name, base)), set()).add(name)
    asked = sa.select(requests.c.concept_key).where(
        requests.c.concept_key.in_(list(keys)),
        requests.c.state.in_((State.CANDIDATE, State.LIVE)),
        requests.c.id != besides,
    )
    with ledger.reading() as connection:
        return set().union(*(keys[key] for key in connection.scalars(asked)))


def settled_by(ledger: Ledger, record: Record) -> Record | None:
    """Another live request for the same concept on the same base; None if there is none."""
    if record.concept is None:
        return None
    key = keyed(ledger.key, concept_digest(record.concept, record.base))
    wanted = (requests.c.concept_key == key, requests.c.state == State.LIVE, requests.c.erasure_id.is_not(None))
    with ledger.reading() as connection:
        found = select_records(connection, *wanted, requests.c.id != record.id, limit=1)
    return found[0] if found else None


def take_to_base(ledger: Ledger, record: Record, base: str, *, actor: str) -> Record:
    """A request whose project has another base than when it came: it is of that base now, which its log says."""
    key = None if record.concept is None else keyed(ledger.key, concept_digest(record.concept, base))
    with ledger.writing() as connection:
        row = update(connection, record.id, base=base, concept_key=key)
        said = "the project has another base than when the request came"
        event = Event("base", actor, clock(connection), reason=said, request_id=record.id)
        log_events(connection, [event], {record.id: row})
        return get(connection, record.id)


def wanted_by_erasure(ledger: Ledger, erasures: Sequence[str]) -> dict[str, bool]:
    """For each erasure with requests: whether at least one of them was not cancelled."""
    kept = sa.func.sum(sa.case((requests.c.state == State.CANCELLED, 0), else_=1))
    asked = sa.select(requests.c.erasure_id, kept).where(requests.c.erasure_id.in_(erasures))
    with ledger.reading() as connection:
        found = connection.execute(asked.group_by(requests.c.erasure_id))
        return {str(erasure): count > 0 for erasure, count in found}


def move_to(ledger: Ledger, erasure: str, other: str, *, names: Iterable[str], base: str, actor: str) -> list[str]:
    """Requests of an erasure whose concepts another one keeps erased are that one's now; gives their ids.

    Args:
        names: all names of those concepts. Asked by ``concept_key``: a request whose names were forgotten counts too.
    """
    keys = [keyed(ledger.key, concept_digest(name, base)) for name in names]
    wanted = (requests.c.erasure_id == erasure, requests.c.concept_key.in_(keys))
    with ledger.writing() as connection:
        found = select_records(connection, *wanted)
        said = f"another adapter erases it from here on: {other}"
        rows = {one.id: update(connection, one.id, erasure_id=other) for one in found}
        now = clock(connection)
        events = [Event("moved", actor, now, reason=said, request_id=one.id, erasure_id=other) for one in found]
        if events:
            log_events(connection, events, rows)
    return list(rows)
