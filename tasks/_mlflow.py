"""MLflow's client: how it is reached, and that what it refuses is one of our errors.

With ``_tracking`` and ``_runs`` the only files that import mlflow.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from fade.errors import RegistryError

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
        yield MlflowClient(uri, uri)
    except MlflowException as error:
        raise RegistryError(
            f"MLflow at {uri} refused or cannot be reached: {str(error).splitlines()[0]}. "
            "Check MLFLOW_TRACKING_URI, or unset it to use the embedded store."
        ) from error


def experiment(client: MlflowClient, name: str) -> str:
    """Id of an experiment, made if it is not there."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    embedded = mlflow.get_tracking_uri().startswith("sqlite")
    place = Path(".fade/mlartifacts").resolve().as_uri() if embedded else None
    return str(client.create_experiment(name, artifact_location=place))


def files_of(client: MlflowClient, run_id: str, folder: str | None = None) -> Iterator[str]:
    """Paths of a run's files; folders that are empty are not among them."""
    for one in client.list_artifacts(run_id, folder):
        if one.is_dir:
            yield from files_of(client, run_id, one.path)
        else:
            yield one.path
