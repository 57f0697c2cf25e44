"""Each request names its project; those from before projects had names are the default project's."""

import json
from datetime import UTC, datetime

import sqlalchemy as sa
from alembic import op

from fade.environment import environment
from fade.project import load_projects
from fade.requests.chain import row_hash
from fade.requests.sealing import SEAL, SEALED_EVENT, ledger_key, seal_request
from fade.requests.tables import UTCDateTime

revision = "0004"
down_revision = "0003"

_PLAIN = (
    "id", "body_sha256", "external_id", "regulation", "legal_basis", "kind", "concept", "concept_key", "surrogate",
    "subject", "project", "base", "priority", "callback_url", "state", "reason", "erasure_id", "duplicate_of",
    "attempts", "fence",
)  # fmt: skip
_requests = sa.table(
    "requests",
    *(sa.column(name) for name in _PLAIN),
    *(sa.column(name, sa.JSON) for name in ("aliases", "pictures")),
    sa.column("extended", sa.Boolean),
    *(sa.column(name, UTCDateTime) for name in ("received_at", "due_at", "state_at", "not_before")),
)
_head = sa.table("head", *(sa.column(name) for name in ("id", "seq", "hash")))
_LOG = (
    "seq", "request_id", "erasure_id", "event", "before", "after", "actor", "reason", "details", "previous", "hash",
)  # fmt: skip
_log = sa.table("log", *(sa.column(name) for name in _LOG), sa.column("at", UTCDateTime))


def upgrade() -> None:
    """Add the column; what is there gets the default project's name, which the log seals."""
    op.add_column("requests", sa.Column("project", sa.String(64)))
    connection = op.get_bind()
    names = connection.scalars(sa.select(_requests.c.id).order_by(_requests.c.id)).all()
    if names:
        # The first that FADE_PROJECT names, else that of params.yaml: an older version knew no other.
        project = load_projects(environment().projects).served[0]
        connection.execute(sa.update(_requests).values(project=project.name))
        _seal(connection, list(names))
    with op.batch_alter_table("requests") as batch:
        batch.alter_column("project", existing_type=sa.String(64), nullable=False)


def _seal(connection: sa.Connection, names: list[str]) -> None:
    key, now = ledger_key(), datetime.now(UTC)
    seq, previous = connection.execute(sa.select(_head.c.seq, _head.c.hash).with_for_update()).one()
    for name in names:
        seq += 1
        row = dict(connection.execute(sa.select(_requests).where(_requests.c.id == name)).mappings().one())
        event = {
            "seq": seq, "request_id": name, "erasure_id": row["erasure_id"], "event": SEALED_EVENT, "before": None,
            "after": None, "actor": "ledger", "reason": "the ledger's tables were brought up to date", "at": now,
            "details": json.dumps({SEAL: seal_request(key, row)}, sort_keys=True), "previous": previous,
        }  # fmt: skip
        previous = event["hash"] = row_hash(event)
        connection.execute(sa.insert(_log), event)
    connection.execute(sa.update(_head).values(seq=seq, hash=previous))
