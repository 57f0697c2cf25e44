"""How a message becomes a request: duplicates in the ledger, its row, its deadline, its first events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from fade.errors import ConflictError
from fade.project import Project
from fade.requests.chain import Event
from fade.requests.messages import Message, concept_digest
from fade.requests.records import deadline
from fade.requests.sealing import keyed
from fade.requests.states import State
from fade.requests.tables import requests


@dataclass(frozen=True, slots=True)
class ErasureInForce:
    """A live request for the same concept on the same base, with the pictures and the person that it named."""

    id: str
    erasure_id: str | None
    pictures: frozenset[str]
    subject: str | None

    def covers(self, pictures: Sequence[str], subject: str | None) -> bool:
        """Whether a new request for these pictures and this person adds nothing: all were named in this one."""
        return self.pictures >= {*pictures} and subject in (None, self.subject)


def known_bodies(connection: Connection, names: Sequence[str]) -> dict[str, str]:
    """Keyed hash of the stored message, by id, for those of the ids that the ledger knows."""
    asked = sa.select(requests.c.id, requests.c.body_sha256).where(requests.c.id.in_(names))
    return {row.id: row.body_sha256 for row in connection.execute(asked)}


def in_force(connection: Connection, keys: Sequence[str]) -> dict[str, list[ErasureInForce]]:
    """Live requests by concept key (keyed hash of concept and base), the oldest first."""
    asked = sa.select(
        requests.c.concept_key, requests.c.id, requests.c.erasure_id, requests.c.pictures, requests.c.subject
    ).where(requests.c.concept_key.in_(keys), requests.c.state == State.LIVE)
    found: dict[str, list[ErasureInForce]] = {}
    for row in connection.execute(asked.order_by(requests.c.state_at, requests.c.id)):
        found.setdefault(row.concept_key, []).append(
            ErasureInForce(row.id, row.erasure_id, frozenset(row.pictures), row.subject)
        )
    return found


def conflict(name: str) -> ConflictError:
    """The error for a sender who uses an id again for another request."""
    return ConflictError(
        f"Request {name} is in the ledger already, with other content. "
        "The id is the idempotency key: send what was sent before, or a new id."
    )


def concept_key(message: Message, project: Project, key: bytes) -> str | None:
    """Equal for the same concept on the same base, under the ledger's key; None without a concept."""
    return None if message.concept is None else keyed(key, concept_digest(message.concept, project.base))


def enter(
    message: Message, project: Project, known: Sequence[ErasureInForce], *, key: bytes, actor: str, now: datetime
) -> tuple[dict[str, Any], list[Event]]:
    """The row of a new request and its first events: received, then scheduled, duplicate or in need of input.

    Args:
        project: the one that it is for.
        known: requests in force for the same concept on the same base. One that names no pictures or person but
            theirs is closed as a duplicate; one that names its own is due, as nobody has forgotten those yet.
        key: the ledger's.
    """
    same = next((one for one in known if one.covers(message.pictures, message.subject)), None)
    received = min(message.received_at or now, now)  # a sender's clock that is ahead must not move the deadline
    if message.concept is None:
        after, reason = State.NEEDS_INPUT, "It names pictures and no concept: which concept do they show?"
    elif same is not None:
        after, reason = State.DUPLICATE, f"The same concept is erased on this base already, by request {same.id}."
    else:
        after, reason = State.SCHEDULED, "complete"
    name = str(message.id)
    row = {
        **message.model_dump(mode="json", exclude={"version", "received_at"}),
        "id": name,
        "body_sha256": keyed(key, message.sha256),
        "concept_key": concept_key(message, project, key),
        "project": project.name,
        "base": project.base,
        "received_at": received,
        "due_at": deadline(received, message.regulation),
        "extended": False,
        "state": after,
        "state_at": now,
        "reason": reason,
        "erasure_id": same.erasure_id if same else None,
        "duplicate_of": same.id if same else None,
        "attempts": 0,
        "fence": 0,
    }
    first = Event("state", actor, now, reason="received", request_id=name, after=State.RECEIVED)
    then = Event(
        "state", actor, now, reason=reason, request_id=name, erasure_id=row["erasure_id"], before=State.RECEIVED,
        after=after,
    )  # fmt: skip
    return row, [first, then]
