"""Where the services keep their state, set before Prefect or MLflow is imported.

Everything lies under ``.fade`` in the project; no library reports its use; variables already set win.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

from fade.errors import ConfigError
from fade.files import read_json

STATE = Path(".fade")
SERVICES = STATE / "services.json"
ERASURES = Path("data/erasures")
"""A folder for each erasure, named by its id."""


def project_root(start: Path | None = None) -> Path:
    """The nearest folder upwards that holds params.yaml and dvc.yaml.

    Raises:
        ConfigError: there is none.
    """
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / "params.yaml").is_file() and (folder / "dvc.yaml").is_file():
            return folder
    raise ConfigError(f"{here} lies in no FADE project: expected params.yaml and dvc.yaml in it or above it.")


def configure() -> None:
    """Enter the project and point Prefect, MLflow, DVC and the hub libraries at it."""
    from fade.environment import environment, load_file  # late, so that `fade --help` does not wait for it

    os.chdir(os.environ.get("FADE_ROOT") or project_root())
    load_file()
    environment()  # what is misspelt is said before anything runs
    STATE.mkdir(exist_ok=True)
    defaults = {
        "PREFECT_HOME": str((STATE / "prefect").resolve()),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
        "PREFECT_LOGGING_LEVEL": "WARNING",
        "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",  # Prefect's own choice is pickle
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # of a few kilobytes, between our own lines
        "DVC_NO_ANALYTICS": "1",
        "GX_ANALYTICS_ENABLED": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "DIFFUSERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if SERVICES.is_file():
        running = read_json(SERVICES)
        if _alive(running["pid"]):
            defaults |= {"PREFECT_API_URL": running["prefect"] + "/api", "MLFLOW_TRACKING_URI": running["mlflow"]}
    # A stage's command is `python ...`: it must be the Python that runs this.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", module="(prefect|mlflow|great_expectations|diffusers|transformers|peft).*")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
