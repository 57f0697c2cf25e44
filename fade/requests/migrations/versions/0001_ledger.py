"""Requests, the chained log and its head, the outbox."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_BIG = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_TIME = sa.DateTime()


def upgrade() -> None:
    """Make the tables of the first version."""
    _make_requests()
    _make_log()
    _make_outbox()


def _make_requests() -> None:
    op.create_table(
        "requests",
        sa.Column("id", sa.String(36), primary_key=True),
        sa.Column("body_sha256", sa.String(64), nullable=False),
        sa.Column("external_id", sa.Text),
        sa.Column("regulation", sa.String(32), nullable=False),
        sa.Column("legal_basis", sa.Text),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("concept", sa.Text),
        sa.Column("concept_key", sa.String(64)),
        sa.Column("aliases", sa.JSON, nullable=False),
        sa.Column("surrogate", sa.Text),
        sa.Column("pictures", sa.JSON, nullable=False),
        sa.Column("subject", sa.Text),
        sa.Column("base", sa.Text, nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("callback_url", sa.Text),
        sa.Column("received_at", _TIME, nullable=False),
        sa.Column("due_at", _TIME, nullable=False),
        sa.Column("extended", sa.Boolean, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("state_at", _TIME, nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("held_from", sa.String(16)),
        sa.Column("step", sa.String(32)),
        sa.Column("erasure_id", sa.String(64)),
        sa.Column("duplicate_of", sa.String(36)),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("not_before", _TIME),
        sa.Column("worker", sa.String(128)),
        sa.Column("lease_until", _TIME),
        sa.Column("fence", sa.Integer, nullable=False),
    )
    op.create_index("requests_by_state", "requests", ["state", "due_at"])
    op.create_index("requests_by_concept", "requests", ["concept_key"])
    op.create_index("requests_by_erasure", "requests", ["erasure_id"])


def _make_log() -> None:
    """The log, and its head: the newest row's number and hash."""
    op.create_table(
        "log",
        sa.Column("seq", _BIG, primary_key=True, autoincrement=False),
        sa.Column("request_id", sa.String(36)),
        sa.Column("erasure_id", sa.String(64)),
        sa.Column("event", sa.String(32), nullable=False),
        sa.Column("before", sa.String(16)),
        sa.Column("after", sa.String(16)),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("details", sa.Text, nullable=False),
        sa.Column("at", _TIME, nullable=False),
        sa.Column("previous", sa.String(64), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
    )
    op.create_index("log_by_request", "log", ["request_id", "seq"])
    op.create_index("log_by_erasure", "log", ["erasure_id", "seq"])
    op.create_table(
        "head",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("seq", _BIG, nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
    )
    op.execute(f"INSERT INTO head (id, seq, hash) VALUES (1, 0, '{'0' * 64}')")


def _make_outbox() -> None:
    op.create_table(
        "outbox",
        sa.Column("id", _BIG, primary_key=True),
        sa.Column("request_id", sa.String(36), nullable=False),
        sa.Column("seq", _BIG, nullable=False),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("next_at", _TIME, nullable=False),
        sa.Column("sent_at", _TIME),
        sa.Column("error", sa.Text),
    )
    op.create_index("outbox_by_turn", "outbox", ["sent_at", "next_at"])
