"""MLflow's client: how it is reached, that what it refuses is one of our errors, and how its files are read.

Whoever may write to MLflow chooses what it answers. So files are only downloaded, by names that this project gave
them, from where this project keeps them: no model is loaded, no ``MLmodel`` read, no address followed that a version's
or a run's record names elsewhere. This folder holds the only files that import mlflow, and those that small commands
need import it where they use it: it takes seconds.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

from fade.environment import environment
from fade.errors import LineageError, RegistryError
from fade.files import read_json
from fade.temporary import temporary_folder
from tasks.mlflow.embedded import DATABASE, SERVICES, SQLITE, EmbeddedRegistry, opened

if TYPE_CHECKING:
    from mlflow import MlflowClient

WAIT_SECONDS = 300.0
"""For another process that makes the embedded store's tables."""
EXPERIMENT, STUDIES = "erasures", "studies"
ARTIFACTS = Path(".fade/mlartifacts")
"""Where the embedded MLflow, and that of ``fade ui``, keep their files."""
MOST_FILES = 10_000
"""Of a run. A listing without end is no run of ours."""
for _name in ("mlflow", "alembic", "mlflow.models.model"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or the embedded store."""
    return os.environ.get("MLFLOW_TRACKING_URI") or _database()


def _database() -> str:
    return f"{SQLITE}{DATABASE.resolve()}"


def _reading_uri() -> str:
    """Where what ``tracking_uri`` leads to is read: of this project's own server from the tables that it keeps."""
    uri = tracking_uri()
    own = SERVICES.is_file() and read_json(SERVICES).get("mlflow") == uri
    return _database() if own else uri


@contextmanager
def mlflow_client() -> Iterator[MlflowClient]:
    """A client of the server of MLFLOW_TRACKING_URI, or of the embedded store.

    Raises:
        RegistryError: it refuses or cannot be reached.
    """
    import mlflow
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    uri = tracking_uri()
    if uri.startswith("sqlite"):
        Path(".fade").mkdir(exist_ok=True)
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    try:
        if uri.startswith("sqlite"):
            _make_tables(uri)
        yield MlflowClient(uri, uri)
    except MlflowException as error:
        raise RegistryError(
            f"MLflow at {uri} refused or cannot be reached: {str(error).splitlines()[0]}. "
            "Check MLFLOW_TRACKING_URI, or unset it to use the embedded store."
        ) from error


@contextmanager
def registry(*, writing: bool = False) -> Iterator[MlflowClient | EmbeddedRegistry]:
    """Registered models and runs: of the embedded store by its tables, which takes no import of MLflow, else a client.

    Args:
        writing: a server writes itself, as it may have to tell others what was changed. What is only read comes from
            the tables of the server that runs beside this project: an approval asks twenty things.

    Raises:
        RegistryError: as ``mlflow_client``.
    """
    with opened(tracking_uri() if writing else _reading_uri()) as embedded:
        if embedded is not None:
            yield embedded
            return
    with mlflow_client() as client:
        yield client


def tables_beside() -> None:
    """Have another process make the embedded store's tables, where there are none yet.

    That takes seconds of one core. An erasure needs them at its end, and loads its libraries on one core until then.
    """
    uri = tracking_uri()
    if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).is_file():
        command = [sys.executable, "-c", "from tasks.mlflow.client import mlflow_client as made\nwith made(): pass"]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        # Whether it succeeds is seen by whoever asks for the tables: they are then made there.
        threading.Thread(target=subprocess.run, args=(command,), kwargs=quiet, daemon=True).start()


@cache
def _make_tables(uri: str) -> None:
    """The embedded store's tables, made by one process at a time: of two at their first use one would else fail."""
    from filelock import FileLock
    from mlflow import MlflowClient

    # It tells on standard error of what nobody asked about, before what a first command has to say.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    with FileLock(".fade/mlflow.lock", timeout=WAIT_SECONDS):
        client = MlflowClient(uri, uri)
        client.search_experiments(max_results=1)
        client.search_registered_models(max_results=1)  # the registry's store makes its own


def experiment(client: MlflowClient, name: str) -> str:
    """Id of an experiment, made if it is not there."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    embedded = tracking_uri().startswith("sqlite")
    place = ARTIFACTS.resolve().as_uri() if embedded else None
    try:
        return str(client.create_experiment(name, artifact_location=place))
    except MlflowException:
        # Another process made it in between.
        if (found := client.get_experiment_by_name(name)) is None:
            raise
        return str(found.experiment_id)


def files_of(client: MlflowClient | EmbeddedRegistry, run_id: str, folder: str | None = None) -> Iterator[str]:
    """Paths of a run's files, by name; folders that are empty are not among them.

    Raises:
        LineageError: the run's files lie elsewhere than this project keeps them, a path leads out of the run, or there
            is no end of them.
    """
    uri, store = _store_of(client, run_id)
    waiting, count = [folder], 0
    while waiting:
        inside = waiting.pop(0)
        if inside is not None:
            _local(uri, inside)
        for one in store.list_artifacts(inside):
            if not _is_inside(one.path, inside):
                raise LineageError(f"Run {run_id} lists {one.path!r}, which is no file of it. It is not read.")
            count += 1
            if count > MOST_FILES:
                raise LineageError(f"Run {run_id} lists more than {MOST_FILES} files: it is no run of this project.")
            if one.is_dir:
                waiting.append(one.path)
            else:
                yield one.path


def fetch_files(client: MlflowClient | EmbeddedRegistry, run_id: str, names: Iterable[str], folder: Path) -> list[Path]:
    """Download files of a run by their names under ``folder``; nothing of them is interpreted.

    Raises:
        RegistryError: MLflow does not have one of them.
        LineageError: they lie elsewhere than this project keeps them, or a name leads out of the run.
    """
    uri, store = _store_of(client, run_id)
    fetched = []
    for name in names:
        if not _is_inside(name, None):
            raise LineageError(f"{name!r} is no name of a run's file: expected a path inside of the run.")
        _local(uri, name)
        try:
            fetched.append(Path(store.download_artifacts(name, str(folder))))
        except OSError as error:
            raise RegistryError(f"MLflow does not give the file {name} of run {run_id}: {error.strerror}.") from None
        if not fetched[-1].is_file():
            raise LineageError(f"{name} of run {run_id} is no file. Register the adapter again.")
    return fetched


def read_file(client: MlflowClient | EmbeddedRegistry, run_id: str, name: str) -> bytes:
    """A file of a run, e.g. ``metrics.json``.

    Raises:
        As ``fetch_files``.
    """
    with temporary_folder("run-file") as folder:
        return fetch_files(client, run_id, [name], folder.resolve())[0].read_bytes()


def delete_file(client: MlflowClient | EmbeddedRegistry, run_id: str, name: str) -> None:
    """Delete a file of a run.

    Raises:
        LineageError: it lies elsewhere than this project keeps its files, or the name leads out of the run.
    """
    uri, store = _store_of(client, run_id)
    if not _is_inside(name, None):
        raise LineageError(f"{name!r} is no name of a run's file. It is not deleted.")
    _local(uri, name)
    store.delete_artifacts(name)


def _store_of(client: MlflowClient | EmbeddedRegistry, run_id: str) -> tuple[str, Any]:
    """Where a run's files lie, if this project keeps files there."""
    uri = str(client.get_run(run_id).info.artifact_uri)
    if not is_ours(uri):
        raise LineageError(
            f"The files of run {run_id} are said to lie in {uri}, where this project keeps none: nothing is read or "
            "deleted there. If MLflow's files do lie there, name the place in FADE_MLFLOW_ARTIFACTS."
        )
    if urlsplit(uri).scheme in ("", "file"):
        return uri, _LocalFiles(_path(uri))
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    return uri, get_artifact_repository(uri)


@dataclass(frozen=True, slots=True)
class _Listed:
    path: str
    is_dir: bool


@dataclass(frozen=True, slots=True)
class _LocalFiles:
    """A run's files in a folder of this machine, as MLflow's own repository of such a folder has them."""

    root: Path

    def list_artifacts(self, inside: str | None) -> list[_Listed]:
        """Files and folders, by name."""
        folder = self.root / (inside or "")
        if not folder.is_dir():
            return []
        return [_Listed(path.relative_to(self.root).as_posix(), path.is_dir()) for path in sorted(folder.iterdir())]

    def download_artifacts(self, name: str, folder: str) -> str:
        """A copy of a file under ``folder``; of what is no file its own place."""
        path, copy = self.root / name, Path(folder) / name
        if path.is_dir():
            return str(path)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        return str(copy)

    def delete_artifacts(self, name: str) -> None:
        """Remove a file."""
        (self.root / name).unlink()


def is_ours(uri: str) -> bool:
    """Whether this project keeps MLflow's files at an address."""
    parts = urlsplit(uri)
    if "%" in parts.path or ".." in PurePosixPath(parts.path).parts or parts.query or parts.fragment:
        return parts.scheme == "file" and _is_own(uri)
    if parts.scheme in ("", "file"):
        return _is_own(uri)
    if parts.scheme == "mlflow-artifacts":  # through the server itself
        return parts.netloc in ("", urlsplit(tracking_uri()).netloc.rpartition("@")[2])
    known = (environment().mlflow_artifacts or "").split()
    return any(uri == one.rstrip("/") or uri.startswith(one.rstrip("/") + "/") for one in known)


def _is_own(uri: str) -> bool:
    return urlsplit(uri).netloc in ("", "localhost") and _path(uri).resolve().is_relative_to(ARTIFACTS.resolve())


def _path(uri: str) -> Path:
    return Path(unquote(urlsplit(uri).path))


def _local(uri: str, name: str) -> None:
    """Refuse a link that leads out of the run's folder, and what is neither a file nor a folder."""
    if urlsplit(uri).scheme not in ("", "file"):
        return
    root, path = _path(uri).resolve(), _path(uri) / name
    if not path.resolve().is_relative_to(root):
        raise LineageError(f"{name} in {root} is a link to somewhere else. It is not followed.")
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise LineageError(f"{name} in {root} is neither a file nor a folder. It is not read.")


def _is_inside(name: str, folder: str | None) -> bool:
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        return False
    return folder is None or path.parent == PurePosixPath(folder)


def server(*, users: bool = False) -> Any:
    """MLflow's own server as an ASGI application, set up by the variables that ``mlflow server`` hands it.

    Args:
        users: with users and passwords (MLflow's ``basic-auth``).
    """
    if users:
        from mlflow.server.auth import create_app

        return create_app()
    from mlflow.server.fastapi_app import app

    return app
