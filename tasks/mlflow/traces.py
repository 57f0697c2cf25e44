"""What MLflow keeps of an erasure: the files of all its runs, registered or cut off, shown or deleted."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from fade.errors import LineageError
from tasks.mlflow.client import delete_file, files_of, is_ours, mlflow_client, read_file

# isort: split
# After tasks.mlflow.client, which sets MLflow's switches.
from mlflow.entities import ViewType

logger = logging.getLogger(__name__)


def runs_of(erasure: str) -> list[str]:
    """Ids of the runs of an erasure: those of every version, and those that never led to one.

    A run that says so and whose files lie where this project keeps none is somebody else's: it holds nothing of ours,
    and holds up no purge.
    """
    with mlflow_client() as client:
        experiments = [one.experiment_id for one in client.search_experiments(view_type=ViewType.ALL)]
        found = client.search_runs(experiments, f"tags.erasure = '{erasure}'", run_view_type=ViewType.ALL)
        return sorted(run.info.run_id for run in found if is_ours(run.info.artifact_uri))


def run_bytes(run_id: str, name: str) -> bytes:
    """A file of a run."""
    with mlflow_client() as client:
        return read_file(client, run_id, name)


def run_files(run_id: str, names: Iterable[str]) -> list[str]:
    """Those of these files, or of the files in these folders, that a run has.

    A run whose files are said to lie where this project keeps none is somebody else's doing: it stops no purge, and
    nothing is removed there.
    """
    wanted = set(names)
    try:
        with mlflow_client() as client:
            return sorted(path for path in files_of(client, run_id) if path.partition("/")[0] in wanted)
    except LineageError as error:
        logger.warning("not looked at: %s", error)
        return []


def delete_run_file(run_id: str, name: str) -> None:
    """Delete a file of a run from MLflow's artifact store."""
    with mlflow_client() as client:
        delete_file(client, run_id, name)
