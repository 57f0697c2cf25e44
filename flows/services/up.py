"""``fade up``: servers, intake, scheduled drain, release watch and small commands in one, until Ctrl-C."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from fade.environment import environment
from fade.project import Projects
from flows.queue.schedules import checked_cron, checked_zone
from flows.services.local import HOST, check_port, running, stop_all, wait_for
from flows.settings import STATE, kept_secret, prefect_auth

TOKEN_FILE = STATE / "intake-token"
AGAIN_SECONDS = 5.0
COMMAND = "flows.cli.app"


@dataclass
class Programs:
    """The programs beside the servers, each a module with its words and a log file; one that ends is started again.

    honcho, which runs infra/native/Procfile, stops all programs when one ends; here the others must go on."""

    environment: Mapping[str, str]
    commands: dict[str, list[str]]
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    ended: dict[str, float] = field(default_factory=dict)

    def start(self, name: str) -> None:
        """Start a program in a process group of its own, so that Ctrl-C reaches it through this program alone."""
        with (STATE / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                [sys.executable, "-m", *self.commands[name]],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=dict(self.environment),
            )

    def look(self) -> Iterator[str]:
        """Restart programs that ended a few seconds ago; yields a message for each that ended."""
        now = time.monotonic()
        for name, process in list(self.running.items()):
            if process.poll() is not None:
                del self.running[name]
                self.ended[name] = now
                yield (
                    f"{name} ended with status {process.returncode}; see {STATE / name}.log. "
                    f"It is started again in {AGAIN_SECONDS:.0f} s."
                )
        for name in [name for name, when in self.ended.items() if now - when >= AGAIN_SECONDS]:
            del self.ended[name]
            self.start(name)

    def stop(self) -> None:
        """Stop all programs."""
        stop_all(self.running.values())


@dataclass(frozen=True, slots=True)
class RunningStack:
    """Addresses of the running servers, and the programs beside them."""

    mlflow: str
    prefect: str
    intake: str
    programs: Programs


@contextmanager
def run_stack(
    *,
    mlflow_port: int,
    prefect_port: int,
    intake_port: int,
    projects: Projects,
    cron: str,
    timezone: str = "UTC",
    ended: threading.Event | None = None,
) -> Iterator[RunningStack]:
    """Run servers and programs until the block ends; entered once they answer.

    Args:
        projects: those that the intake and the drain serve.
        ended: set while it starts, it stops all again.

    Raises:
        KeyboardInterrupt: ``ended`` was set before all answered.
        ConfigError: ``cron`` is no cron line, or ``timezone`` no time zone.
        ResourceError: a port is taken, or something ended or did not answer in time.
    """
    cron, timezone = checked_cron(cron), checked_zone(timezone)
    check_port(intake_port, "the HTTP intake", "--intake-port")
    with running(mlflow_port=mlflow_port, prefect_port=prefect_port, ended=ended) as services:
        served = [word for one in projects.served for word in ("--project", str(one.params))]
        commands = {
            "intake": [COMMAND, "intake", "--follow", *served],
            "intake-http": [COMMAND, "intake-http", "--port", str(intake_port), *served],
            "drain": [COMMAND, "drain", "--cron", cron, "--timezone", timezone, *served],
            "release": [COMMAND, "release", "--watch"],
            "commands": ["flows.services.commands"],
        }
        if environment().webhook_secret:
            commands["webhooks"] = [COMMAND, "webhooks", "--follow"]
        variables = {
            **os.environ,
            "MLFLOW_TRACKING_URI": services.mlflow,
            "PREFECT_API_URL": f"{services.prefect}/api",
            "PREFECT_API_AUTH_STRING": prefect_auth(),
            "FADE_INTAKE_TOKEN": intake_token(),
        }
        programs = Programs(variables, commands)
        try:
            for name in commands:
                programs.start(name)
            intake = f"http://{HOST}:{intake_port}"
            wait_for(f"{intake}/health", "intake-http", programs.running["intake-http"], ended)
            yield RunningStack(services.mlflow, services.prefect, intake, programs)
        finally:
            programs.stop()


def intake_token() -> str:
    """FADE_INTAKE_TOKEN; without it one that is made once and kept in ``.fade/intake-token``, for this user alone."""
    given = environment().intake_token
    return given.get_secret_value() if given else kept_secret(TOKEN_FILE)
