"""A letter of the outbox that was sent has a seal that says so."""

import sqlalchemy as sa
from alembic import op

from fade.requests.sealing import ledger_key, seal_sent
from fade.requests.tables import UTCDateTime

revision = "0003"
down_revision = "0002"

_outbox = sa.table("outbox", sa.column("id"), sa.column("sent_at", UTCDateTime), sa.column("sent_seal"))


def upgrade() -> None:
    """Seal what was sent before."""
    op.add_column("outbox", sa.Column("sent_seal", sa.String(64)))
    connection = op.get_bind()
    sent = connection.execute(sa.select(_outbox.c.id, _outbox.c.sent_at).where(_outbox.c.sent_at.is_not(None))).all()
    key = ledger_key() if sent else b""
    for number, at in sent:
        seal = seal_sent(key, number=number, sent_at=at)
        connection.execute(sa.update(_outbox).where(_outbox.c.id == number).values(sent_seal=seal))
