"""Where the services keep their state, set before Prefect or MLflow is imported.

Everything lies under ``.fade`` in the project; no library reports its use; variables already set win.
"""

from __future__ import annotations

import os
import secrets
import sys
import warnings
from contextlib import suppress
from pathlib import Path

from fade.errors import ConfigError
from fade.files import read_json
from flows.cli.main import nearest_project
from tasks.mlflow.embedded import SERVICES

STATE = Path(".fade")
PREFECT_AUTH = STATE / "prefect-auth"
"""What Prefect's API asks for, USER:PASSWORD; also what a person types into its pages."""
ERASURES = Path("data/erasures")
"""A folder for each erasure, named by its id."""

DEFAULTS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    "PREFECT_LOGGING_LEVEL": "WARNING",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_CLASS": "tasks.console.OneMessage",
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
    # Threads that wait for each other turn in circles for milliseconds before they sleep, which beside any other work
    # makes two of them ten times slower than one. A tenth of a millisecond costs nothing on idle cores.
    "GOMP_SPINCOUNT": "2000",
}
"""Variables of libraries, where nobody set them otherwise."""


def project_root(start: Path | None = None) -> Path:
    """The nearest folder upwards that holds params.yaml and dvc.yaml.

    Raises:
        ConfigError: there is none.
    """
    here = (start or Path.cwd()).resolve()
    if (found := nearest_project(here)) is None:
        raise ConfigError(f"{here} lies in no FADE project: expected params.yaml and dvc.yaml in it or above it.")
    return found


def configure() -> None:
    """Enter the project and point Prefect, MLflow, DVC and the hub libraries at it."""
    from fade.environment import environment, load_file  # late, so that `fade --help` does not wait for it

    os.chdir(os.environ.get("FADE_ROOT") or project_root())
    load_file()
    environment()  # what is misspelt is said before anything runs
    STATE.mkdir(exist_ok=True)
    defaults = {
        **DEFAULTS,
        "PREFECT_HOME": str((STATE / "prefect").resolve()),
    }
    own = None
    if SERVICES.is_file():
        running = read_json(SERVICES)
        if is_running(running["pid"]):
            own = running["prefect"] + "/api"
            defaults |= {"PREFECT_API_URL": own, "MLFLOW_TRACKING_URI": running["mlflow"]}
    if os.environ.get("PREFECT_API_URL") in (None, "", own):
        # The server beside this, or the one that Prefect starts by itself for a command; no other is told the string.
        auth = prefect_auth()
        defaults |= {"PREFECT_API_AUTH_STRING": auth, "PREFECT_SERVER_API_AUTH_STRING": auth}
        defaults |= {"PREFECT_SERVER_CORS_ALLOWED_ORIGINS": "http://127.0.0.1:4200"}
    # A stage's command is `python ...`: it must be the Python that runs this.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    quiet()


def quiet() -> None:
    """What libraries warn of in their own code is nothing that a person here could mend."""
    warnings.filterwarnings("ignore", module="(prefect|mlflow|great_expectations|diffusers|transformers|peft).*")


def prefect_auth() -> str:
    """PREFECT_SERVER_API_AUTH_STRING, else the string of ``.fade/prefect-auth``, made at first use."""
    return os.environ.get("PREFECT_SERVER_API_AUTH_STRING") or kept_secret(PREFECT_AUTH, prefix="fade:")


def kept_secret(path: Path, *, prefix: str = "") -> str:
    """The secret in a file that its owner alone may read; made if it is not there, by whoever comes first."""
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
            stream.write(prefix + secrets.token_urlsafe(32))
        try:
            with suppress(FileExistsError):
                os.link(partial, path)  # never over one that another program made meanwhile
        finally:
            partial.unlink()
    return path.read_text(encoding="utf-8").strip()


def is_running(pid: int) -> bool:
    """Whether a process runs: one that has ended, and whose end its parent has not asked for yet, does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    try:
        said = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return not Path("/proc/self").exists()  # it ended just now; or there is no such folder, as on macOS
    return said.rpartition(")")[2].split()[0] != "Z"
