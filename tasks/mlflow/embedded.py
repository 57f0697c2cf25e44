"""The embedded MLflow's registry by its tables, for commands that must not wait until MLflow is imported (seconds).

What is asked and written here is what ``MlflowClient`` asks and writes of the same database, by the same names: the
project's registered models, their versions, aliases and tags, and what a run holds. It is only used where the tables
are of the revision that is known here; with any other ``MlflowClient`` itself is asked, and so is a server: but the one
that ``fade up`` runs on these tables is only asked to write.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fade.errors import RegistryError

REVISION = "dc11669786a5"
"""Of the tables of MLflow 3.17, as Alembic calls it; the tests hold it against the MLflow that is installed."""
SQLITE = "sqlite:///"
DATABASE = Path(".fade/mlflow.db")
SERVICES = Path(".fade/services.json")
"""Addresses of the servers that run beside this project, as whoever starts them writes it."""
WAIT_SECONDS = 60.0
"""For another program that writes."""
_DELETED = "Deleted_Internal"
_WORKSPACE = "default"
_OF_VERSION = "FROM model_versions WHERE workspace = ? AND current_stage != ?"


class Page(list[Any]):
    """All that was searched for; ``token`` would lead to more, and there is none."""

    token: str | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """A registered model; ``aliases`` by their names."""

    name: str
    aliases: dict[str, int]


@dataclass(frozen=True, slots=True)
class Version:
    """A version of a registered model."""

    name: str
    version: int
    run_id: str
    creation_timestamp: int
    tags: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunInfo:
    """Where a run's files lie."""

    run_id: str
    experiment_id: str
    artifact_uri: str


@dataclass(frozen=True, slots=True)
class RunData:
    """What was logged of a run."""

    metrics: dict[str, float]
    params: dict[str, str]
    tags: dict[str, str]


@dataclass(frozen=True, slots=True)
class Run:
    """A run."""

    info: RunInfo
    data: RunData


@dataclass(frozen=True, slots=True)
class Experiment:
    """An experiment."""

    experiment_id: str


@contextmanager
def opened(uri: str) -> Iterator[EmbeddedRegistry | None]:
    """The registry of an embedded store; None if ``uri`` is no such store, or its tables are of another revision.

    Raises:
        RegistryError: the database cannot be read or written, or does not have what is asked of it.
    """
    path = Path(uri.removeprefix(SQLITE))
    if not uri.startswith(SQLITE) or not path.is_file():
        yield None
        return
    try:
        # Not made where it is missing, nor a transaction begun by itself: each write is one.
        address = f"file:{quote(str(path.resolve()))}?mode=rw"
        with closing(sqlite3.connect(address, uri=True, timeout=WAIT_SECONDS, isolation_level=None)) as connection:
            yield EmbeddedRegistry(connection) if _is_known(connection) else None
    except sqlite3.Error as error:
        raise RegistryError(
            f"MLflow's database {path} refused: {error}. Another program may hold it, or the file is damaged: "
            "`fade doctor` looks at it."
        ) from error


def _is_known(connection: sqlite3.Connection) -> bool:
    try:
        return connection.execute("SELECT version_num FROM alembic_version").fetchall() == [(REVISION,)]
    except sqlite3.OperationalError:  # no such table: not made yet
        return False


class EmbeddedRegistry:
    """What small commands ask of ``MlflowClient``, under the same names."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def search_registered_models(self, filter_string: str, max_results: int, page_token: str | None) -> Page:
        """Every registered model of the name that ``name LIKE '...'`` asks for, by name."""
        asked = (_WORKSPACE, _like(filter_string))
        aliases: dict[str, dict[str, int]] = {}
        for name, alias, version in self._connection.execute(
            "SELECT name, alias, version FROM registered_model_aliases WHERE workspace = ? AND name LIKE ?", asked
        ):
            aliases.setdefault(name, {})[alias] = int(version)
        names = self._connection.execute(
            "SELECT name FROM registered_models WHERE workspace = ? AND name LIKE ? ORDER BY name", asked
        )
        return Page(Model(name, aliases.get(name, {})) for (name,) in names)

    def search_model_versions(self, filter_string: str, max_results: int, page_token: str | None) -> Page:
        """Every version of the registered models of such a name."""
        like = _like(filter_string)
        tags: dict[tuple[str, int], dict[str, str]] = {}
        for name, version, key, value in self._connection.execute(
            "SELECT name, version, key, value FROM model_version_tags WHERE workspace = ? AND name LIKE ?",
            (_WORKSPACE, like),
        ):
            tags.setdefault((name, version), {})[key] = value
        rows = self._connection.execute(
            f"SELECT name, version, run_id, creation_time {_OF_VERSION} AND name LIKE ?", (_WORKSPACE, _DELETED, like)
        )
        return Page(
            Version(name, version, run, made, tags.get((name, version), {})) for name, version, run, made in rows
        )

    def get_model_version(self, name: str, version: str) -> Version:
        """One version.

        Raises:
            RegistryError: there is none.
        """
        which = (_WORKSPACE, _DELETED, name, int(version))
        row = self._connection.execute(
            f"SELECT name, version, run_id, creation_time {_OF_VERSION} AND name = ? AND version = ?", which
        ).fetchone()
        if row is None:
            raise RegistryError(f"MLflow's database has no version {version} of {name}.")
        tags = self._connection.execute(
            "SELECT key, value FROM model_version_tags WHERE workspace = ? AND name = ? AND version = ?",
            (_WORKSPACE, name, int(version)),
        )
        return Version(row[0], row[1], row[2], row[3], dict(tags))

    def get_run(self, run_id: str) -> Run:
        """One run.

        Raises:
            RegistryError: there is none.
        """
        row = self._connection.execute(
            "SELECT experiment_id, artifact_uri FROM runs WHERE run_uuid = ?", (run_id,)
        ).fetchone()
        if row is None:
            raise RegistryError(f"MLflow's database has no run {run_id}.")
        found = {
            table: dict(self._connection.execute(f"SELECT key, value FROM {table} WHERE run_uuid = ?", (run_id,)))
            for table in ("params", "tags")
        }
        metrics = self._connection.execute(
            "SELECT key, CASE WHEN is_nan THEN NULL ELSE value END FROM latest_metrics WHERE run_uuid = ?", (run_id,)
        )
        numbers = {key: float("nan") if value is None else float(value) for key, value in metrics}
        return Run(RunInfo(run_id, str(row[0]), str(row[1])), RunData(numbers, found["params"], found["tags"]))

    def get_experiment_by_name(self, name: str) -> Experiment | None:
        """An experiment, if there is one of this name."""
        row = self._connection.execute(
            "SELECT experiment_id FROM experiments WHERE workspace = ? AND name = ?", (_WORKSPACE, name)
        ).fetchone()
        return None if row is None else Experiment(str(row[0]))

    def search_runs(self, experiment_ids: Sequence[str], *, order_by: Sequence[str], max_results: int) -> Page:
        """The newest runs of an experiment.

        Raises:
            RegistryError: another order is asked for.
        """
        if list(order_by) != ["attributes.start_time DESC"]:
            raise RegistryError(f"Runs are only searched by the time they began, the newest first: got {order_by}.")
        (experiment,) = experiment_ids
        rows = self._connection.execute(
            "SELECT run_uuid FROM runs WHERE experiment_id = ? AND lifecycle_stage = 'active' "
            "ORDER BY start_time DESC, run_uuid LIMIT ?",
            (int(experiment), max_results),
        ).fetchall()
        return Page(self.get_run(run_id) for (run_id,) in rows)

    def set_model_version_tag(self, name: str, version: str, key: str, value: str) -> None:
        """Set a tag of a version.

        Raises:
            RegistryError: there is no such version.
        """
        self._write(
            name,
            version,
            "INSERT INTO model_version_tags (workspace, name, version, key, value) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (workspace, key, name, version) DO UPDATE SET value = excluded.value",
            (_WORKSPACE, name, int(version), key, str(value)),
        )

    def set_registered_model_alias(self, name: str, alias: str, version: str) -> None:
        """Let an alias name a version, and no other.

        Raises:
            RegistryError: there is no such version.
        """
        self._write(
            name,
            version,
            "INSERT INTO registered_model_aliases (workspace, name, alias, version) VALUES (?, ?, ?, ?) "
            "ON CONFLICT (workspace, name, alias) DO UPDATE SET version = excluded.version",
            (_WORKSPACE, name, alias, int(version)),
        )

    def delete_registered_model_alias(self, name: str, alias: str) -> None:
        """Take an alias away; nothing happens if it is not there."""
        self._connection.execute(
            "DELETE FROM registered_model_aliases WHERE workspace = ? AND name = ? AND alias = ?",
            (_WORKSPACE, name, alias),
        )

    def update_model_version(self, name: str, version: str, description: str) -> None:
        """Write a version's page.

        Raises:
            RegistryError: there is no such version.
        """
        self._write(
            name,
            version,
            "UPDATE model_versions SET description = ?, last_updated_time = ? "
            "WHERE workspace = ? AND name = ? AND version = ?",
            (description, time.time_ns() // 10**6, _WORKSPACE, name, int(version)),
        )

    def _write(self, name: str, version: str, statement: str, values: Sequence[object]) -> None:
        """One change of a version that is there, as one transaction."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            self.get_model_version(name, version)
            self._connection.execute(statement, values)
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")


def _like(filter_string: str) -> str:
    """The pattern of ``name LIKE 'pattern'``.

    Raises:
        RegistryError: something else is asked for.
    """
    before, quoted, rest = filter_string.partition("name LIKE '")
    if before or not quoted or rest.count("'") != 1 or not rest.endswith("'"):
        raise RegistryError(f"Only names are searched for here: got {filter_string!r}, expected name LIKE '...'.")
    return rest[:-1]
