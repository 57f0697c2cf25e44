"""The ledger's tables, the engine that opens them, and their migrations.

SQLite by default; PostgreSQL through psycopg. All times are UTC.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from filelock import FileLock
from sqlalchemy.engine import URL, Connection, Dialect, Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, StatementError
from sqlalchemy.exc import DataError as ValueRefused

from fade.errors import ConfigError, DataError, RegistryError

DEFAULT_URL = "sqlite:///.fade/ledger.db"
HEAD = "0004"
"""The newest migration; a test holds it to the files."""
GENESIS = "0" * 64
"""What the first row of the chain follows."""
_MIGRATION_LOCK = 0x66616465  # "fade": the advisory lock that one migration at a time takes


class UTCDateTime(sa.TypeDecorator[datetime]):
    """An aware time, kept in UTC without its zone, so that SQLite and PostgreSQL compare alike."""

    impl = sa.DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """To UTC; a time without a zone is a mistake of the caller."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ConfigError(f"A time without a zone cannot be kept: got {value.isoformat()}. Give it in UTC.")
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """As an aware time."""
        return None if value is None else value.replace(tzinfo=UTC)


_BIG = sa.BigInteger().with_variant(sa.Integer, "sqlite")  # SQLite counts up INTEGER keys alone
metadata = sa.MetaData()

requests = sa.Table(
    "requests",
    metadata,
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
    sa.Column("project", sa.String(64), nullable=False),
    sa.Column("base", sa.Text, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("callback_url", sa.Text),
    sa.Column("received_at", UTCDateTime, nullable=False),
    sa.Column("due_at", UTCDateTime, nullable=False),
    sa.Column("extended", sa.Boolean, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("state_at", UTCDateTime, nullable=False),
    sa.Column("reason", sa.Text),
    sa.Column("held_from", sa.String(16)),
    sa.Column("step", sa.String(32)),
    sa.Column("erasure_id", sa.String(64)),
    sa.Column("duplicate_of", sa.String(36)),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("not_before", UTCDateTime),
    sa.Column("worker", sa.String(128)),
    sa.Column("lease_until", UTCDateTime),
    sa.Column("fence", sa.Integer, nullable=False),
    sa.Index("requests_by_state", "state", "due_at"),
    sa.Index("requests_by_concept", "concept_key"),
    sa.Index("requests_by_erasure", "erasure_id"),
)
"""What is asked and where it stands. ``base`` is the project's when the request came, or when it ran. ``concept_key``
says "same concept on the same base" without a name, and ``body_sha256`` "the same message": both are hashes under the
ledger's key (`fade.requests.sealing`)."""

log = sa.Table(
    "log",
    metadata,
    sa.Column("seq", _BIG, primary_key=True, autoincrement=False),
    sa.Column("request_id", sa.String(36)),
    sa.Column("erasure_id", sa.String(64)),
    sa.Column("event", sa.String(32), nullable=False),
    sa.Column("before", sa.String(16)),
    sa.Column("after", sa.String(16)),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("details", sa.Text, nullable=False),
    sa.Column("at", UTCDateTime, nullable=False),
    sa.Column("previous", sa.String(64), nullable=False),
    sa.Column("hash", sa.String(64), nullable=False),
    sa.Index("log_by_request", "request_id", "seq"),
    sa.Index("log_by_erasure", "erasure_id", "seq"),
)
"""What happened, in order; rows are added and never changed. Each holds the hash of the row before."""

head = sa.Table(
    "head",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("seq", _BIG, nullable=False),
    sa.Column("hash", sa.String(64), nullable=False),
    sa.Column("key_id", sa.String(16)),
)
"""One row: the chain's end, and which key the ledger was made with. Whoever appends locks it first, and a log that was
cut off no longer fits it."""

outbox = sa.Table(
    "outbox",
    metadata,
    sa.Column("id", _BIG, primary_key=True),
    sa.Column("request_id", sa.String(36), nullable=False),
    sa.Column("seq", _BIG, nullable=False),
    sa.Column("url", sa.Text, nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("next_at", UTCDateTime, nullable=False),
    sa.Column("sent_at", UTCDateTime),
    sa.Column("sent_seal", sa.String(64)),
    sa.Column("error", sa.Text),
    sa.Index("outbox_by_turn", "sent_at", "next_at"),
)
"""Webhooks to send: written in the transaction of the state they tell of, so that none is lost."""


def ledger_url(given: str | None) -> URL:
    """The database's address; PostgreSQL always through psycopg.

    Raises:
        ConfigError: it is no address, or of a database the ledger does not know.
    """
    try:
        url = make_url(given or DEFAULT_URL)
    except ArgumentError:
        raise ConfigError(
            "FADE_LEDGER_URL is no database address; expected sqlite:///FILE or postgresql+psycopg://HOST/NAME."
        ) from None
    if url.drivername in ("postgresql", "postgres"):
        url = url.set(drivername="postgresql+psycopg")
    if url.drivername not in ("sqlite", "postgresql+psycopg"):
        raise ConfigError(
            f"The ledger does not know the database {url.drivername!r}; "
            "expected sqlite:///FILE or postgresql+psycopg://HOST/NAME."
        )
    return url


def open_engine(url: URL) -> Engine:
    """An engine whose transactions take SQLite's write lock at their beginning, unless they only read."""
    if url.drivername == "sqlite":
        if url.database:
            _make_private(Path(url.database))
        engine = sa.create_engine(url, connect_args={"timeout": 60}, hide_parameters=True)
        sa.event.listen(engine, "connect", _prepare_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
        return engine
    return sa.create_engine(url, pool_pre_ping=True, connect_args={"connect_timeout": 10}, hide_parameters=True)


def _make_private(path: Path) -> None:
    """An empty file that its owner alone reads: it will hold names. SQLite's journals take its mode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver begins nothing by itself: _begin_sqlite does
    for pragma in ("journal_mode=WAL", "synchronous=FULL"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    reading = connection.get_execution_options().get("fade_reading", False)
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")


@contextlib.contextmanager
def reached() -> Iterator[None]:
    """Turn database errors into ours: DataError for a refused value, RegistryError for an unreachable database."""
    try:
        yield
    except (ValueRefused, IntegrityError, UnicodeEncodeError) as error:
        raise _refused_value(error) from None
    except DBAPIError as error:
        raise RegistryError(
            f"The ledger's database refused or cannot be reached: {str(error.orig).splitlines()[0]}. "
            "Nothing of this transaction was kept; try again when it runs."
        ) from error
    except StatementError as error:
        raise _refused_value(error.orig or error) from None


def _refused_value(error: BaseException) -> DataError:
    return DataError(
        f"The ledger's database does not take a value of this request ({type(error).__name__}). "
        "Nothing of this transaction was kept. Correct the request."  # without the value, which may be a name
    )


def revision(engine: Engine) -> str | None:
    """The migration the database has; None if it is empty."""
    try:
        with engine.connect().execution_options(fade_reading=True) as connection:
            if not sa.inspect(connection).has_table("alembic_version"):
                return None
            found: str | None = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
            return found
    except DBAPIError as error:
        raise RegistryError(
            f"The ledger at {engine.url.render_as_string()} cannot be opened: {str(error.orig).splitlines()[0]}. "
            "Check FADE_LEDGER_URL and that the database runs."
        ) from error


def upgrade(engine: Engine) -> None:
    """Bring the tables to the newest migration; several processes may ask at once.

    Raises:
        RegistryError: the database cannot be reached, or was made by a newer version.
    """
    found = revision(engine)
    if found == HEAD:
        return
    if found is not None and found > HEAD:
        raise RegistryError(f"The ledger was made by a newer version ({found}; this one knows {HEAD}). Update fade.")
    if engine.dialect.name == "sqlite":
        if engine.url.database:
            Path(engine.url.database).chmod(0o600)  # an older version made it as the umask said
        with FileLock(f"{engine.url.database}.lock", timeout=120), engine.begin() as connection:
            _run_migrations(connection)
    else:
        with engine.begin() as connection:
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
            _run_migrations(connection)


def _run_migrations(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
