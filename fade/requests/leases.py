"""Leases: a worker holds a request for a limited time, and cannot finish it once another worker has taken it over.

Every lease has a number, the fence, that grows with each one given. A worker that died stops renewing; its lease ends
and the request is given to the next. Times are the database's: a worker whose own clock is wrong takes nothing early.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from fade.errors import LeaseLostError
from fade.requests.ledger import Ledger
from fade.requests.records import Record, change, clock, get, to_record
from fade.requests.states import State
from fade.requests.tables import requests

NEAR = timedelta(days=3)
"""A deadline nearer than this goes before any priority."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A request that a worker holds until a time; ``fence`` grows with every lease of the request."""

    request: Record
    worker: str
    fence: int
    until: datetime


def take(
    ledger: Ledger,
    worker: str,
    *,
    seconds: float,
    projects: Collection[str] | None = None,
    running_limit: int = 1,
    attempts_limit: int = 5,
    now: datetime | None = None,
) -> Lease | None:
    """Lease the most urgent request that may run to a worker; None if there is none, or enough are running.

    Deadlines that are near or over come first, then priority, then deadline. Two requests for the same
    concept on the same base do not run at once: the second then finds its work done.

    Args:
        projects: names of those that the worker serves; requests for others are left alone. None: all.
        running_limit: requests that run at once, over all workers.
        attempts_limit: a request whose workers died that often is given up: state ``failed``.
    """
    with ledger.writing() as connection:
        now = now or clock(connection)
        _take_back(connection, attempts_limit=attempts_limit, now=now)
        count = sa.select(sa.func.count()).where(requests.c.state == State.RUNNING)
        if (connection.scalar(count) or 0) >= running_limit:
            return None
        row = connection.execute(_most_urgent(now, projects)).mappings().one_or_none()
        if row is None:
            return None
        record, until = to_record(dict(row)), now + timedelta(seconds=seconds)
        change(
            connection, record, State.RUNNING, actor=worker, reason=f"attempt {record.attempts + 1}", now=now,
            worker=worker, lease_until=until, fence=record.fence + 1, attempts=record.attempts + 1, not_before=None,
        )  # fmt: skip
        return Lease(get(connection, record.id), worker, record.fence + 1, until)


def _most_urgent(now: datetime, projects: Collection[str] | None) -> Any:
    near = sa.case((requests.c.due_at <= now + NEAR, 0), else_=1)
    other = requests.alias("other")
    busy = sa.exists().where(other.c.concept_key == requests.c.concept_key, other.c.state == State.RUNNING)
    return (
        sa.select(requests)
        .where(
            requests.c.state == State.SCHEDULED,
            sa.or_(requests.c.not_before.is_(None), requests.c.not_before <= now),
            ~busy,
            sa.true() if projects is None else requests.c.project.in_(projects),
        )
        .order_by(
            near,
            sa.case((near == 0, requests.c.due_at)),
            requests.c.priority.desc(),
            requests.c.due_at,
            requests.c.id,
        )
        .limit(1)
        .with_for_update(skip_locked=True, of=requests)
    )


def _take_back(connection: Connection, *, attempts_limit: int, now: datetime) -> None:
    """Reschedule requests whose lease has run out, or fail them after too many attempts."""
    ended = sa.select(requests).where(requests.c.state == State.RUNNING, requests.c.lease_until <= now)
    for row in connection.execute(ended.with_for_update(skip_locked=True)).mappings().all():
        record = to_record(dict(row))
        said = f"the lease of {record.worker} ended without a result"
        if record.attempts >= attempts_limit:
            said += f"; given up after {record.attempts} attempts"
        after = State.FAILED if record.attempts >= attempts_limit else State.SCHEDULED
        change(connection, record, after, actor="ledger", reason=said, now=now, fence=record.fence + 1)


def renew(
    ledger: Ledger,
    lease: Lease,
    *,
    seconds: float,
    step: str | None = None,
    erasure_id: str | None = None,
    now: datetime | None = None,
) -> None:
    """Heartbeat: extend the lease and record the current step.

    Args:
        erasure_id: what is made for the request, once that is known.

    Raises:
        LeaseLostError: the request is not this worker's any more: stop.
    """
    known = {"erasure_id": erasure_id} if erasure_id is not None else {}
    with ledger.signing() as connection:
        now = now or clock(connection)
        done = connection.execute(
            sa.update(requests)
            .where(*_mine(lease))
            .values(lease_until=now + timedelta(seconds=seconds), step=step, **known)
        )
        if done.rowcount != 1:
            raise _lost(lease.request.id, lease.fence)


def check(ledger: Ledger, request_id: str, fence: int) -> None:
    """Raise LeaseLostError unless the request still runs under the lease of this number."""
    asked = sa.select(sa.func.count()).where(*_running(request_id, fence))
    with ledger.reading() as connection:
        if connection.scalar(asked) != 1:
            raise _lost(request_id, fence)


def finish(
    ledger: Ledger,
    lease: Lease,
    after: State,
    *,
    reason: str,
    logged: str | None = None,
    erasure_id: str | None = None,
    retry_seconds: float | None = None,
    details: Mapping[str, Any] | None = None,
    now: datetime | None = None,
) -> Record:
    """Finish a run with its result and give the lease back.

    Args:
        logged: the reason as the log has it, which is never changed: without names; ``reason`` if None.
        retry_seconds: with ``scheduled``, not before so long from now.

    Raises:
        LeaseLostError: the request is not this worker's any more, and what it did here counts for nothing.
    """
    with ledger.writing() as connection:
        if connection.scalar(sa.select(sa.func.count()).where(*_mine(lease))) != 1:
            raise _lost(lease.request.id, lease.fence)
        now = now or clock(connection)
        retry_at = None if retry_seconds is None else now + timedelta(seconds=retry_seconds)
        columns: dict[str, Any] = {"not_before": retry_at}
        if erasure_id is not None:
            columns["erasure_id"] = erasure_id
        change(
            connection,
            get(connection, lease.request.id),
            after,
            actor=lease.worker,
            reason=reason,
            logged=logged,
            now=now,
            details=details,
            **columns,
        )
        return get(connection, lease.request.id)


def _running(request_id: str, fence: int) -> tuple[Any, ...]:
    return requests.c.id == request_id, requests.c.state == State.RUNNING, requests.c.fence == fence


def _mine(lease: Lease) -> tuple[Any, ...]:
    return (*_running(lease.request.id, lease.fence), requests.c.worker == lease.worker)


def _lost(request_id: str, fence: int) -> LeaseLostError:
    return LeaseLostError(
        f"Request {request_id} no longer runs under lease {fence}: that lease ended, or a person took the request "
        "back. What was done is kept on disk, and whoever has the request goes on from there."
    )
