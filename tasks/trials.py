"""Prefect task of one trial: in a process of its own, or beside others in this one, on one copy of the base."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from fade.errors import FadeError
from fade.hardware import card_for_a_process
from fade.spec import load_spec
from fade.studies.trial import figures, run_trial


class TrialError(FadeError, RuntimeError):
    """A trial ended without figures; the message is what it said last."""


# A trial that is asked for again finds on disk what it has finished, so nothing is cached here.
@task(name="trial", task_run_name="trial-{folder.name}", cache_policy=NO_CACHE)
def trial(
    folder: Path, *, attacks: Sequence[str] = (), here: bool = False, say: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Run the trial of a folder that holds ``spec.yaml``; give its figures.

    Args:
        attacks: attacks to run, by name (``fade.steps.attacks.KINDS``).
        here: in this process, where bases may be shared (``fade.models.sharing``).

    Raises:
        TrialError: the trial failed in its process, with its reason.
        FadeError: it failed here.
    """

    def told(step: str) -> None:
        if say is not None:
            say(f"{load_spec(folder).concept}: {step}")

    if here:
        from fade.hardware import compute_device
        from fade.models.sharing import own_stream

        with own_stream(compute_device()):
            return run_trial(load_spec(folder), attacks=attacks, root=folder.parent, say=told)
    command = [sys.executable, "-m", "fade.studies.trial", str(folder), *(f"--attack={kind}" for kind in attacks)]
    log = folder.with_suffix(".log")  # beside it: a trial of other code empties its folder
    with log.open("w", encoding="utf-8") as errors, card_for_a_process() as card:
        surroundings = {**os.environ, **card}
        running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=surroundings)
        try:
            for line in running.stdout or ():
                told(line.strip())
            status = running.wait()
        finally:
            if running.poll() is None:
                running.terminate()
                running.wait()
    if status != 0:
        last = (log.read_text(encoding="utf-8").strip().splitlines() or [f"exit status {status}"])[-1]
        raise TrialError(f"The trial in {folder} failed: {last} (whole log: {log})")
    return figures(folder)
