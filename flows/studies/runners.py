"""Where the parts of a study run side by side: in threads of this program, or on the workers of a Dask cluster."""

from __future__ import annotations

import os
from typing import Any

from prefect.task_runners import ThreadPoolTaskRunner

from fade.errors import ConfigError, ResourceError

CONNECT_SECONDS = 60


def side_by_side(parallel: int, dask: str | None = None) -> Any:
    """Prefect's task runner: ``parallel`` threads, or the cluster whose scheduler has this address.

    How many parts a cluster runs at once is the number of its workers' threads. Workers share this project's
    folder and were started in it; the parts are processes there too, and hand on files and figures alone.

    Raises:
        ConfigError: Dask is not installed, or a worker runs in another folder.
        ResourceError: the cluster cannot be reached, or has no worker.
    """
    if dask is None:
        return ThreadPoolTaskRunner(max_workers=parallel)
    try:
        from distributed import Client
        from prefect_dask import DaskTaskRunner
    except ImportError:
        raise ConfigError("--dask needs a package that is not installed: pip install 'fade-erasure[dask]'.") from None
    try:
        with Client(dask, timeout=CONNECT_SECONDS, set_as_default=False) as client:
            folders: dict[str, str] = client.run(os.getcwd)
    except (OSError, ValueError) as error:
        raise ResourceError(
            f"No Dask cluster can be reached at {dask}: {error}. Expected a scheduler's address, "
            "e.g. tcp://127.0.0.1:8786; start one: dask scheduler --host 127.0.0.1"
        ) from error
    if not folders:
        raise ResourceError(
            f"The Dask cluster at {dask} has no worker. In the project's folder: dask worker {dask} --nthreads 1"
        )
    here = os.getcwd()
    for worker, folder in sorted(folders.items()):
        if folder != here:
            raise ConfigError(f"The Dask worker {worker} runs in {folder}: expected {here}. Start it there.")
    return DaskTaskRunner(address=dask)
