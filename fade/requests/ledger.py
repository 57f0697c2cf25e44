"""The ledger: every deletion request, its deadline and its state, and the chained log of what happened.

Writers queue at the chain's head, so each transaction sees the states it acts on. Times are arguments
(``now``), so that a deadline can be tested without waiting for it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from datetime import datetime
from functools import cached_property
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from fade.environment import environment
from fade.errors import ConfigError, ConflictError, TransitionError
from fade.project import Project
from fade.requests import chain, tables
from fade.requests.chain import ChainReport, Event
from fade.requests.entering import concept_key, conflict, enter, in_force, known_bodies
from fade.requests.messages import Message, concept_digest, make_message
from fade.requests.records import (
    Entry,
    Record,
    change,
    clock,
    extension,
    get,
    log_events,
    minimal,
    select_records,
    update,
)
from fade.requests.sealing import OPTION, SEALED_EVENT, fitting_key, keyed
from fade.requests.states import OPEN, State, check_transition
from fade.requests.tables import requests

logger = logging.getLogger(__name__)


class Ledger:
    """Opens the ledger and brings its tables to the newest version.

    Args:
        url: ``sqlite:///FILE`` or ``postgresql+psycopg://HOST/NAME``; FADE_LEDGER_URL, or
            ``.fade/ledger.db``, if None.

    Raises:
        RegistryError: the database cannot be reached.
    """

    def __init__(self, url: str | None = None) -> None:
        self.engine = tables.open_engine(tables.ledger_url(url or environment().ledger_url))
        tables.upgrade(self.engine)

    @cached_property
    def key(self) -> bytes:
        """The key that the ledger was made with; whoever writes needs it, and whoever verifies.

        Raises:
            ConfigError: it is not here, or another one is.
        """
        with self.reading() as connection:
            return fitting_key(connection)

    def close(self) -> None:
        """Give the connections back."""
        self.engine.dispose()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that holds the chain's head from its beginning."""
        with tables.reached(), self.engine.execution_options(**{OPTION: self.key}).begin() as connection:
            connection.info.pop(chain.WRITTEN, None)
            chain.lock_head(connection)
            yield connection
            rows = connection.info.pop(chain.WRITTEN, [])
        for row in rows if logger.isEnabledFor(logging.INFO) else ():
            # The reason is left out: a person wrote it, and may have named somebody.
            said = {"event": row["event"], "before": row["before"], "after": row["after"], "row": row["seq"]}
            logger.info("request is %s", row["after"] or row["event"], extra={"request_id": row["request_id"], **said})

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that only reads, and blocks nobody."""
        with tables.reached(), self.engine.connect().execution_options(fade_reading=True) as connection:
            yield connection

    @contextmanager
    def signing(self) -> Iterator[Connection]:
        """A transaction that writes and logs nothing, so that it need not wait for the chain's head."""
        with tables.reached(), self.engine.begin() as connection:
            yield connection

    # Coming in

    def submit(
        self, message: Message, project: Project, *, actor: str, now: datetime | None = None
    ) -> tuple[Record, bool]:
        """Take a request in for a project; gives it, and whether it is new.

        Raises:
            ConflictError: its id is taken by a request of other content.
        """
        (result,) = self.submit_all([(message, project)], actor=actor, now=now)
        if isinstance(result, ConflictError):
            raise result
        return result

    def submit_all(
        self, messages: Sequence[tuple[Message, Project]], *, actor: str, now: datetime | None = None
    ) -> list[tuple[Record, bool] | ConflictError]:
        """Take many requests in by one transaction, each for its project; a result for each, in order."""
        keys = [concept_key(message, project, self.key) for message, project in messages]
        with self.writing() as connection:
            now = now or clock(connection)
            known = known_bodies(connection, [str(message.id) for message, _ in messages])
            same = in_force(connection, [key for key in keys if key])
            results: list[tuple[str, bool] | ConflictError] = []
            rows, events = [], []
            for (message, project), concept in zip(messages, keys, strict=True):
                name, body = str(message.id), keyed(self.key, message.sha256)
                if (before := known.get(name)) is not None:
                    results.append((name, False) if before == body else conflict(name))
                    continue
                row, happened = enter(message, project, same.get(concept or "", []), key=self.key, actor=actor, now=now)
                known[name] = body
                rows.append(row)
                events += happened
                results.append((name, True))
            if rows:
                connection.execute(sa.insert(requests), rows)
                log_events(connection, events, {row["id"]: row for row in rows})
            names = [result[0] for result in results if not isinstance(result, ConflictError)]
            found = {record.id: record for record in select_records(connection, requests.c.id.in_(names))}
        return [result if isinstance(result, ConflictError) else (found[result[0]], result[1]) for result in results]

    # What happens to a request

    def transition(
        self,
        request_id: str,
        after: State,
        *,
        actor: str,
        reason: str,
        erasure_id: str | None = None,
        details: Mapping[str, Any] | None = None,
        now: datetime | None = None,
    ) -> Record:
        """Bring a request to another state, and log it.

        Args:
            details: figures for the log; no names, which the log must not hold.

        Raises:
            TransitionError: it may not follow the state the request is in.
            DataError: there is no such request.
        """
        with self.writing() as connection:
            record = get(connection, request_id)
            change(
                connection,
                record,
                after,
                actor=actor,
                reason=reason,
                now=now or clock(connection),
                details=details,
                **({"erasure_id": erasure_id} if erasure_id else {}),
            )
            return get(connection, request_id)

    def cancel(self, request_id: str, *, actor: str, reason: str, now: datetime | None = None) -> Record:
        """Withdraw a request; a worker that runs it learns so at its next sign of life."""
        return self.transition(request_id, State.CANCELLED, actor=actor, reason=reason, now=now)

    def hold(self, request_id: str, *, actor: str, reason: str, now: datetime | None = None) -> Record:
        """Keep a request from running, for example under a legal hold; its deadline stays."""
        return self.transition(request_id, State.ON_HOLD, actor=actor, reason=reason, now=now)

    def release(
        self,
        request_id: str,
        *,
        actor: str,
        reason: str,
        concept: str | None = None,
        surrogate: str | None = None,
        now: datetime | None = None,
    ) -> Record:
        """Let a request run: from hold, after an answer (``concept``, ``surrogate``), a failure or a roll-back.

        Raises:
            TransitionError: it is in no state from which it can be scheduled.
            ConfigError: it needs a concept and none is given.
            DataError: what is given is no name.
        """
        with self.writing() as connection:
            now = now or clock(connection)
            record = get(connection, request_id)
            check_transition(request_id, record.state, State.SCHEDULED)
            if record.state is State.RUNNING:
                raise TransitionError(f"Request {request_id} is running; there is nothing to release.")
            answered = concept or record.concept
            if answered is None:
                raise ConfigError(f"Request {request_id} names no concept, so nothing can be erased. Give --concept.")
            body = make_message(id=record.id, kind="object", concept=answered, surrogate=surrogate or "auto")
            given: dict[str, Any] = {
                "concept": body.concept,
                "concept_key": keyed(self.key, concept_digest(answered, record.base)),
                "attempts": 0,
                "not_before": None,
            }
            if surrogate:
                given["surrogate"] = body.surrogate
            change(connection, record, State.SCHEDULED, actor=actor, reason=reason, now=now, **given)
            return get(connection, request_id)

    def extend(self, request_id: str, *, actor: str, reason: str, now: datetime | None = None) -> Record:
        """Move the deadline as far as the request's regulation lets it, once, with a reason, before it is over.

        Raises:
            TransitionError: the deadline is over, it was extended before, or the request is closed.
            ConfigError: no reason is given.
        """
        if not reason.strip():
            raise ConfigError("An extension needs a reason: the person is told why it takes longer.")
        with self.writing() as connection:
            now = now or clock(connection)
            record = get(connection, request_id)
            if record.extended:
                raise TransitionError(f"Request {request_id} was extended before; the law allows it once.")
            if record.state not in OPEN:
                raise TransitionError(f"Request {request_id} is {record.state}; its deadline no longer matters.")
            if now > record.due_at:
                raise TransitionError(
                    f"Request {request_id} was due on {record.due_at:%Y-%m-%d}; "
                    "an extension is possible before that day alone."
                )
            due = extension(record.received_at, record.regulation, record.due_at)
            row = update(connection, request_id, due_at=due, extended=True)
            said = Event(
                "extended", actor, now, reason=minimal(reason, record), request_id=request_id,
                details=json.dumps({"due_at": due.isoformat()}),
            )  # fmt: skip
            log_events(connection, [said], {request_id: row})
            return get(connection, request_id)

    def minimise(self, request_id: str, *, actor: str, reason: str, now: datetime | None = None) -> Record:
        """Forget the names in a request that is over: concept, aliases, surrogate, pictures and subject.

        What is left (ids, times, states, ``concept_key``) still shows that and when it was done.

        Raises:
            TransitionError: it is not over.
        """
        with self.writing() as connection:
            record = get(connection, request_id)
            if record.state not in (State.LIVE, State.CANCELLED, State.DUPLICATE):
                raise TransitionError(f"Request {request_id} is {record.state}: its names are still needed.")
            row = update(
                connection, request_id, concept=None, aliases=[], surrogate=None, pictures=[], subject=None, reason=None
            )
            at = now or clock(connection)
            said = Event("minimised", actor, at, reason=minimal(reason, record), request_id=request_id)
            log_events(connection, [said], {request_id: row})
            return get(connection, request_id)

    def append(
        self,
        event: str,
        *,
        actor: str,
        reason: str = "",
        request_id: str | None = None,
        erasure_id: str | None = None,
        details: Mapping[str, Any] | None = None,
        now: datetime | None = None,
    ) -> int:
        """Log something that is no transition (a release, a refused approval, a purge); gives its number.

        Args:
            details: must hold no names: the log is never changed.
        """
        with self.writing() as connection:
            happened = Event(
                event, actor, now or clock(connection), reason=reason, request_id=request_id, erasure_id=erasure_id,
                details=json.dumps(dict(details or {}), sort_keys=True),
            )  # fmt: skip
            return chain.append(connection, [happened])[0]

    # Looking

    def get(self, request_id: str) -> Record:
        """One request.

        Raises:
            DataError: there is none; suggests the nearest.
        """
        with self.reading() as connection:
            return get(connection, request_id)

    def find(
        self, *, states: Sequence[State] | None = None, erasure_id: str | None = None, limit: int | None = None
    ) -> list[Record]:
        """Requests by deadline, of all states or of some, of all erasures or of one; all of them, unless limited."""
        wanted: list[sa.ColumnElement[bool]] = []
        if states is not None:
            wanted.append(requests.c.state.in_(states))
        if erasure_id is not None:
            wanted.append(requests.c.erasure_id == erasure_id)
        with self.reading() as connection:
            return select_records(connection, *wanted, limit=limit)

    def history(
        self,
        *,
        request_id: str | None = None,
        erasure_id: str | None = None,
        after: int = 0,
        limit: int | None = None,
    ) -> list[Entry]:
        """Rows of the log, oldest first: of a request, of an erasure, or all after number ``after``."""
        log = tables.log.c
        wanted: list[sa.ColumnElement[bool]] = [log.seq > after]
        if request_id is not None:
            wanted.append(log.request_id == request_id)
        if erasure_id is not None:
            wanted.append(log.erasure_id == erasure_id)
        columns = [log[field.name] for field in fields(Entry)]
        with self.reading() as connection:
            rows = connection.execute(sa.select(*columns).where(*wanted).order_by(log.seq).limit(limit))
            return [Entry(**{**row, "details": json.loads(row["details"])}) for row in rows.mappings()]

    def ended_at(self, rows: int, head: str) -> bool:
        """Whether the log ended there, but for what sealed an older one when this version opened it."""
        found = self.history(after=max(rows, 1) - 1)
        if rows:
            if not found or found[0].hash != head:
                return False
            found = found[1:]
        return all(entry.event == SEALED_EVENT for entry in found)

    def verify(self) -> ChainReport:
        """Check the whole chain; see `fade.requests.chain.verify`."""
        # One picture of all tables: whoever writes meanwhile must not look like a forger.
        options = {OPTION: self.key, "fade_reading": True}
        if self.engine.dialect.name == "postgresql":
            options["isolation_level"] = "REPEATABLE READ"
        with tables.reached(), self.engine.connect().execution_options(**options) as connection:
            return chain.verify(connection)
