"""Requests' rows and letters sealed in the log; "same concept" and "same message" known under the ledger's key."""

import json
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from alembic import op

from fade.requests.chain import row_hash
from fade.requests.messages import concept_digest
from fade.requests.sealing import LETTERS, SEAL, SEALED_EVENT, key_id, keyed, ledger_key, seal_letter, seal_request
from fade.requests.tables import UTCDateTime

revision = "0002"
down_revision = "0001"

_TIMES = ("received_at", "due_at", "state_at", "not_before")
_requests = sa.table(
    "requests",
    *(
        sa.column(name)
        for name in (
            "id", "body_sha256", "external_id", "regulation", "legal_basis", "kind", "concept", "concept_key",
            "surrogate", "subject", "base", "priority", "callback_url", "state", "reason", "erasure_id",
            "duplicate_of", "attempts", "fence",
        )
    ),
    sa.column("aliases", sa.JSON),
    sa.column("pictures", sa.JSON),
    sa.column("extended", sa.Boolean),
    *(sa.column(name, UTCDateTime) for name in _TIMES),
)  # fmt: skip
_outbox = sa.table("outbox", *(sa.column(name) for name in ("id", "request_id", "seq", "url", "body")))
_head = sa.table("head", *(sa.column(name) for name in ("id", "seq", "hash", "key_id")))
_LOG = (
    "seq", "request_id", "erasure_id", "event", "before", "after", "actor", "reason", "details", "previous", "hash",
)  # fmt: skip
_log = sa.table("log", *(sa.column(name) for name in _LOG), sa.column("at", UTCDateTime))


def upgrade() -> None:
    """Remember the key; put what is there under it."""
    op.add_column("head", sa.Column("key_id", sa.String(16)))
    connection, key = op.get_bind(), ledger_key(make=True)
    letters: dict[str, dict[str, str]] = {}
    for row in connection.execute(sa.select(_outbox).order_by(_outbox.c.id)):
        seal = seal_letter(key, request_id=row.request_id, url=row.url, body=row.body)
        letters.setdefault(row.request_id, {})[str(row.seq)] = seal
    seq, previous = connection.execute(sa.select(_head.c.seq, _head.c.hash).with_for_update()).one()
    now = datetime.now(UTC)
    for name in connection.scalars(sa.select(_requests.c.id).order_by(_requests.c.id)).all():
        seq += 1
        event = _seal(connection, name, letters.get(name, {}), key)
        event |= {"seq": seq, "at": now, "previous": previous}
        previous = event["hash"] = row_hash(event)
        connection.execute(sa.insert(_log), event)
    connection.execute(sa.update(_head).values(seq=seq, hash=previous, key_id=key_id(key)))


def _seal(connection: sa.Connection, name: str, letters: dict[str, str], key: bytes) -> dict[str, Any]:
    """One request's hashes under the key, and the row of the log that seals it."""
    this = _requests.c.id == name
    row = dict(connection.execute(sa.select(_requests).where(this)).mappings().one())
    if row["concept"] is not None:  # spelt as this version compares names
        row["concept_key"] = concept_digest(row["concept"], row["base"])
    row |= {column: keyed(key, row[column]) for column in ("body_sha256", "concept_key") if row[column] is not None}
    connection.execute(
        sa.update(_requests).where(this).values(body_sha256=row["body_sha256"], concept_key=row["concept_key"])
    )
    details = {SEAL: seal_request(key, row)} | ({LETTERS: letters} if letters else {})
    return {
        "request_id": name, "erasure_id": row["erasure_id"], "event": SEALED_EVENT, "before": None, "after": None,
        "actor": "ledger", "reason": "the ledger's tables were brought up to date",
        "details": json.dumps(details, sort_keys=True),
    }  # fmt: skip
