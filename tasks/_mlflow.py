"""MLflow's client: how it is reached, and that what it refuses is one of our errors.

With ``_tracking`` and ``_runs`` the only files that import mlflow.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

import mlflow
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from fade.errors import RegistryError

WAIT_SECONDS = 300.0
"""For another process that makes the embedded store's tables."""
EXPERIMENT, STUDIES = "erasures", "studies"
for _name in ("mlflow", "alembic", "mlflow.models.model"):
    logging.getLogger(_name).setLevel(logging.ERROR)


@contextmanager
def mlflow_client() -> Iterator[MlflowClient]:
    """A client of the server of MLFLOW_TRACKING_URI, or of the embedded store.

    Raises:
        RegistryError: it refuses or cannot be reached.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('.fade/mlflow.db').resolve()}"
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


@cache
def _make_tables(uri: str) -> None:
    """The embedded store's tables, made by one process at a time: of two at their first use one would else fail."""
    with FileLock(".fade/mlflow.lock", timeout=WAIT_SECONDS):
        client = MlflowClient(uri, uri)
        client.search_experiments(max_results=1)
        client.search_registered_models(max_results=1)  # the registry's store makes its own


def experiment(client: MlflowClient, name: str) -> str:
    """Id of an experiment, made if it is not there."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    embedded = mlflow.get_tracking_uri().startswith("sqlite")
    place = Path(".fade/mlartifacts").resolve().as_uri() if embedded else None
    try:
        return str(client.create_experiment(name, artifact_location=place))
    except MlflowException:
        # Another process made it in between.
        if (found := client.get_experiment_by_name(name)) is None:
            raise
        return str(found.experiment_id)


def files_of(client: MlflowClient, run_id: str, folder: str | None = None) -> Iterator[str]:
    """Paths of a run's files; folders that are empty are not among them."""
    for one in client.list_artifacts(run_id, folder):
        if one.is_dir:
            yield from files_of(client, run_id, one.path)
        else:
            yield one.path


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
