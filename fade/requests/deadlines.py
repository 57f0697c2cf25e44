"""Deadline warnings: once for each open request that is nearly due or overdue, and once more after an extension."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from fade.environment import environment
from fade.errors import ConfigError
from fade.requests import chain, tables
from fade.requests.chain import Event
from fade.requests.ledger import Ledger
from fade.requests.messages import is_reachable
from fade.requests.records import Record, clock, letter, letter_seals, select_records
from fade.requests.sealing import LETTERS
from fade.requests.states import OPEN
from fade.requests.tables import requests

NEAR, OVER = "deadline.near", "deadline.over"


@dataclass(frozen=True, slots=True)
class DeadlineWarning:
    """A warning about a request; ``event`` is ``deadline.near`` or ``deadline.over``."""

    request: Record
    event: str


def alert_url() -> str | None:
    """Where warnings go besides the log, FADE_ALERT_URL; they are webhooks like all others.

    Raises:
        ConfigError: it is no address that webhooks are sent to.
    """
    url = environment().alert_url
    if url is not None and (fault := is_reachable(url)):
        raise ConfigError(f"FADE_ALERT_URL {fault}.")
    return url


def warn(ledger: Ledger, *, days: float, url: str | None = None, now: datetime | None = None) -> list[DeadlineWarning]:
    """Log a warning for each open request due within ``days`` that has none yet, and queue a webhook to ``url``."""
    found = []
    with ledger.writing() as connection:
        now = now or clock(connection)
        for event, wanted in (
            (NEAR, (requests.c.due_at > now, requests.c.due_at <= now + timedelta(days=days))),
            (OVER, (requests.c.due_at <= now,)),
        ):
            new = select_records(connection, requests.c.state.in_(OPEN), *wanted, ~_was_warned(event))
            found += [DeadlineWarning(record, event) for record in new]
        first = chain.lock_head(connection)[0] + 1
        letters = [_letter(one, seq, url, now) for seq, one in enumerate(found, first)] if url is not None else []
        sealed = [{LETTERS: letter_seals(ledger.key, [one])} for one in letters] or [{}] * len(found)
        chain.append(
            connection,
            [
                Event(
                    one.event, "deadlines", now, request_id=one.request.id, erasure_id=one.request.erasure_id,
                    details=json.dumps({"due_at": one.request.due_at.isoformat(), **more}, sort_keys=True),
                )
                for one, more in zip(found, sealed, strict=True)
            ],
        )  # fmt: skip
        if letters:
            connection.execute(sa.insert(tables.outbox), letters)
    return found


def _was_warned(event: str) -> Any:
    """Condition: the log holds this warning of the request, and no extension after it."""
    told, extended = tables.log.alias("told"), tables.log.alias("extended")
    later = sa.exists().where(
        extended.c.request_id == requests.c.id, extended.c.event == "extended", extended.c.seq > told.c.seq
    )
    return sa.exists().where(told.c.request_id == requests.c.id, told.c.event == event, ~later)


def _letter(warning: DeadlineWarning, seq: int, url: str, now: datetime) -> dict[str, Any]:
    record = warning.request
    body = {
        "alert": warning.event, "id": record.id, "external_id": record.external_id, "sequence": seq,
        "state": record.state, "due_at": record.due_at.isoformat(), "at": now.isoformat(),
    }  # fmt: skip
    return letter(record.id, seq, url, body, now)
