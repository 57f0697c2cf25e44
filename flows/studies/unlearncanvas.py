"""Flow: UnlearnCanvas on a user's checkpoint, its pictures drawn in shards, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from fade.errors import DataError
from fade.evaluation.records import load
from fade.evaluation.unlearncanvas import UnlearnCanvas
from fade.hardware import card_for_a_process
from fade.studies.unlearncanvas import begin
from flows.prefect_beside import beside_is_up
from flows.studies.runners import side_by_side
from tasks.mlflow import runs
from tasks.trials import TrialError


def run_unlearncanvas(
    out: Path,
    *,
    base: str,
    target: str,
    classifiers: Path,
    adapter: Path | None,
    real: Path | None,
    features: Path | None,
    clip: Path | None,
    guidance: float,
    steps: int,
    seed_images: bool,
    styles: str | None,
    objects: str | None,
    batch: int,
    shards: int,
    dask: str | None = None,
) -> UnlearnCanvas:
    """Draw what is not drawn yet, judge it; give the metrics.

    Args:
        shards: parts that are drawn side by side.
        dask: address of a cluster whose workers draw them; see ``flows.studies.runners``.

    Raises:
        ConfigError: the folder holds another run's pictures, or an option names what the benchmark has not.
        DataError: a classifier is missing.
        TrialError: a shard failed, with its reason; what is drawn stays.
    """
    # Before the long part: pictures without classifiers would be of no use.
    if not classifiers.is_dir():
        raise DataError(f"No classifiers in {classifiers}: expected a folder with style and object.")
    runner = side_by_side(shards, dask)
    begin(out, base=base, target=target, adapter=adapter, steps=steps, guidance=guidance)
    part = [*(["--styles", styles] if styles else []), *(["--objects", objects] if objects else [])]
    drawing = [
        str(out),
        "--base",
        base,
        "--batch",
        str(batch),
        *(["--adapter", str(adapter)] if adapter else []),
        *part,
    ]
    commands = [["draw", *drawing, "--shard", str(i), "--shards", str(shards)] for i in range(shards)]
    judging = ["judge", str(out), "--classifiers", str(classifiers), *part]
    for name, path in (("--real", real), ("--features", features), ("--clip", clip)):
        if path is not None:
            if not path.exists():
                raise DataError(f"{name} {path} does not exist.")
            judging += [name, str(path)]
    if not seed_images:
        judging.append("--without-seed-images")
    beside_is_up()
    unlearncanvas.with_options(task_runner=runner)(commands, judging)
    metrics = load(UnlearnCanvas, out / "metrics.json")
    row = metrics.distances()
    for name, found in metrics.rates.items():
        row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
    runs.log_study(f"unlearncanvas-{target}", out, pd.DataFrame([row]))
    return metrics


@flow(name="unlearncanvas")
def unlearncanvas(drawing: list[list[str]], judging: list[str]) -> None:
    """Every shard, then the judging."""
    for future in [step.submit(command) for command in drawing]:
        future.result()
    step(judging)


@task(name="unlearncanvas-step", cache_policy=NO_CACHE)
def step(arguments: list[str]) -> None:
    """One shard, or the judging, in a process of its own.

    Raises:
        TrialError: it failed, with its reason.
    """
    command = [sys.executable, "-m", "fade.studies.unlearncanvas", *arguments]
    with card_for_a_process() as card:
        surroundings = {**os.environ, **card}
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, env=surroundings)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise TrialError(f"UnlearnCanvas ended early ({' '.join(arguments[:1])}): {last}")
