"""A database of its own for a test, on SQLite or on the PostgreSQL that runs."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

POSTGRESQL = os.environ.get("FADE_TEST_POSTGRESQL", "postgresql://postgres@127.0.0.1:5432/postgres")


def missing(what: str) -> None:
    """A service that is not there: a failure where tests must be whole, else a skip that says so."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{what} does not answer")


@contextmanager
def database(kind: str, folder: Path) -> Iterator[str]:
    """The address of an empty database, removed at the end."""
    if kind == "sqlite":
        yield f"sqlite:///{folder / 'ledger.db'}"
        return
    name = f"fade_{uuid.uuid4().hex[:12]}"
    try:
        admin = psycopg.connect(POSTGRESQL, autocommit=True, connect_timeout=5)
    except psycopg.OperationalError:
        missing(f"PostgreSQL at {POSTGRESQL}")
    with admin:
        admin.execute(f"CREATE DATABASE {name}")
        try:
            yield POSTGRESQL.rsplit("/", 1)[0].replace("postgresql://", "postgresql+psycopg://") + f"/{name}"
        finally:
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
