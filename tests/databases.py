"""A database of its own for a test, on SQLite or on the PostgreSQL that runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


class Cluster:
    """A PostgreSQL of a test's own, on a port of its own, that may be stopped and started."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        self.url = f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres"
        programs = [*Path("/usr/lib/postgresql").glob("*/bin/initdb"), Path(shutil.which("initdb") or "")]
        if not programs[0].is_file():
            missing("PostgreSQL's initdb")
        self.programs = programs[0].parent
        if os.geteuid() == 0:
            shutil.chown(folder, "postgres", "postgres")
        self._call("initdb", "--auth=trust", "--username=postgres", "--no-sync")

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c shared_buffers=16MB"
        self._call("pg_ctl", "start", "--wait", f"--log={self.folder / 'log'}", "-o", options)

    def stop(self) -> None:
        """End it and every connection to it, as a restart does."""
        self._call("pg_ctl", "stop", "--wait", "--mode=fast")

    def _call(self, program: str, *arguments: str) -> None:
        # PostgreSQL refuses to run as root.
        user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        command = [*user, str(self.programs / program), f"--pgdata={self.folder / 'data'}", *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/", timeout=300)


@contextmanager
def cluster(port: int) -> Iterator[Cluster]:
    """A PostgreSQL that runs, ended and removed with the block."""
    folder = Path(tempfile.mkdtemp(prefix="fade-postgresql-"))
    found = Cluster(folder, port)
    found.start()
    try:
        yield found
    finally:
        with suppress(subprocess.CalledProcessError):  # a test may have stopped it
            found.stop()
        shutil.rmtree(folder)
