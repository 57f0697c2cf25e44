"""Prefect tasks of an erasure: paths in, small records out; a stage DVC calls current is not run again."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast
from uuid import UUID

from prefect import get_run_logger, task
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run
from tqdm import tqdm

from fade import pipeline
from fade.errors import FadeError, nameless
from fade.evaluation.measured import Evaluation
from fade.evaluation.records import load
from fade.files import read_json, write_json
from fade.methods.method import Step as MethodStep
from fade.pipeline import TIMINGS, Step
from fade.spec import load_spec
from fade.steps.split import hashes
from tasks.dvc import versioning
from tasks.mlflow import registration, runs, tracking, version_page

_P = ParamSpec("_P")
_R = TypeVar("_R")
READ_EVERY = 10
"""Steps of distillation on a GPU between two looks at their figures."""


class KeptBackError(FadeError):
    """What Prefect is told of an error: its kind. Its words may name somebody, and Prefect keeps what it is told.

    Attributes:
        origin: the error itself, for whoever called the flow.
    """

    def __init__(self, origin: FadeError) -> None:
        super().__init__(nameless(origin))
        self.origin = origin


def _words_kept_back(work: Callable[_P, _R]) -> Callable[_P, _R]:
    """A task whose errors reach Prefect's database and logs without their words."""

    @wraps(work)
    def told(*arguments: _P.args, **named: _P.kwargs) -> _R:
        try:
            return work(*arguments, **named)
        except FadeError as error:
            raise KeptBackError(error) from None

    return told


def _may_help(_task: Any, _run: Any, state: Any) -> bool:
    """Retry what may pass the next time; what the library refused on purpose will be refused again."""
    return not isinstance(state.result(raise_on_failure=False), FadeError)


_OPTIONS: dict[str, Any] = {
    "cache_policy": NO_CACHE,  # DVC decides what is current: Prefect's cache sees only a task's own lines
    "retries": 2,
    "retry_delay_seconds": [2, 10],
    "retry_condition_fn": _may_help,
}


def run_step(folder: Path, step: Step) -> bool:
    """Run a step as a Prefect task of its name, unless DVC calls it current; gives whether it ran."""
    return _step.with_options(name=step.name)(folder, step.name)


@task(**_OPTIONS)
@_words_kept_back
def _step(folder: Path, name: str) -> bool:
    """One step of an erasure: recorded in DVC, with its seconds and its peak memory, once it has run to its end."""
    logger = get_run_logger()
    if versioning.is_current(folder, name):
        logger.info("%s is current: not run again", name)
        return False
    begun = time.perf_counter()
    _watched(next(step for step in pipeline.STEPS if step.name == name), folder)
    seconds = time.perf_counter() - begun
    path = folder / TIMINGS
    timings = read_json(path) if path.is_file() else {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    write_json(path, {**timings, name: {"seconds": round(seconds, 3), "peak_mib": round(peak, 1)}})
    versioning.record(folder, name)
    logger.info("%s took %.1f s", name, seconds)
    return True


def _watched(step: Step, folder: Path) -> None:
    """Run a step; show how far it is, and a training's figures on its run in MLflow while it goes on."""
    bar: _Progress | None = None
    unread: list[MethodStep] = []
    with ExitStack() as opened:
        send = opened.enter_context(runs.live_curve(folder.name))
        for at in pipeline.run(step, folder):
            bar = bar or opened.enter_context(_Progress(step.name))
            if isinstance(at.said, tuple):
                bar.at(at.done, at.total)
                continue
            unread.append(at.said)
            # Reading a figure waits until the step is computed: a GPU is asked once in a while.
            if at.said.at_hand or at.done % READ_EVERY == 0:
                bar.at(at.done, at.total, f"forget {at.said.forget_loss:.4f} retain {at.said.retain_loss:.4f}")
                _send_all(unread, send)
        _send_all(unread, send)


def _send_all(steps: list[MethodStep], send: Callable[[int, Mapping[str, float]], None]) -> None:
    """Send the figures of steps, and empty the list."""
    for step in steps:
        found = step.figures()
        send(step.step, {name: found[name] for name in runs.CURVE if name in found})
    steps.clear()


def lineage_of(folder: Path) -> dict[str, str]:
    """What an adapter comes from: DVC's hash of each output, each split's own, and where the pictures are from."""
    spec = load_spec(folder)
    splits = hashes(folder) if (folder / "splits").is_dir() else {}  # a purge takes them
    return {
        **{f"dvc.{name}": value for name, value in versioning.lock_record(folder).items()},
        **{f"split.{name}.sha256": digest for name, digest in splits.items()},
        "pictures": "generated by the base" if spec.data_free else "catalog",
        **({"asked": "by name", "clip.sha256": spec.clip_sha256 or "none"} if spec.by_name else {}),
    }


@task(name="register", **_OPTIONS)
@_words_kept_back
def register(folder: Path) -> tracking.AdapterVersion:
    """The adapter as a version of a registered model, logged in the ledger; its figures as a table."""
    _show_figures(folder)
    lineage = lineage_of(folder)
    if run_id := flow_run.get_id():
        lineage["prefect.flow_run_id"] = str(run_id)
    version = register_version(folder, lineage)
    _show(version, folder)
    if page := tracking.page_of(version):
        create_link_artifact(page, key=f"version-{_key(folder)}", link_text=f"{version.model}/{version.version}")
    return version


def register_version(folder: Path, lineage: Mapping[str, str]) -> tracking.AdapterVersion:
    """Register a finished erasure and log it; needs no Prefect, and after a purge none of what was purged.

    Raises:
        LineageError: its spec was changed since it was registered before.
    """
    registration.check_request(folder)
    spec = load_spec(folder)
    version = runs.register(folder, spec, timings=read_json(folder / TIMINGS), lineage=lineage)
    if registration.log_registration(version, folder, spec, data_md5=versioning.lock_record(folder)):
        runs.say_code(version)
    if found := load(Evaluation, folder / "evaluation" / "metrics.json").attacks:
        sheet = folder / "attacks" / "sheet.png"
        version_page.show_attack(version, found, sheet if sheet.is_file() else None)
    version_page.refresh_page(version)
    return version


def _show_figures(folder: Path) -> None:
    """What the evaluation found, on the flow's page."""
    metrics = load(Evaluation, folder / "evaluation" / "metrics.json")
    before = metrics.report.before.rates
    rows = [
        {"figure": name.upper(), "base": f"{before[name].value:.4f}", "erased": f"{found.value:.4f}"}
        | {"95 % interval": f"{found.low:.4f} to {found.high:.4f}"}
        for name, found in metrics.report.after.rates.items()
    ]
    create_table_artifact(rows, key=f"figures-{_key(folder)}", description=f"Drift {metrics.drift:.4f}")


def _show(version: tracking.AdapterVersion, folder: Path) -> None:
    """Before and after on the flow's page by address: a copy in Prefect's database could not be purged."""
    key = f"sheet-{_key(folder)}"
    address = tracking.file_address(version, "sheet.png")
    if address is None:
        create_markdown_artifact(f"`{folder}/evaluation/sheet.png`", key=key, description="before / after")
    else:
        create_image_artifact(address, key=key, description="before / after")


def _key(folder: Path) -> str:
    """An artifact's key: small letters, digits and dashes."""
    return folder.name.replace("_", "-").lower()


class _Progress:
    """A progress bar on a terminal, and a Prefect progress artifact moved every tenth."""

    def __init__(self, name: str) -> None:
        self.bar = tqdm(desc=name, disable=None, leave=False)
        self.artifact = cast("UUID", create_progress_artifact(progress=0.0, description=name))
        self.shown = 0

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def at(self, done: int, total: int, note: str = "") -> None:
        """Say how far the work is; a search for settings may take more steps than were foreseen."""
        total = max(total, done)
        self.bar.total = total
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(done - self.bar.n)
        tenth = 10 * done // max(total, 1)
        self.bar.n = done
        if tenth > self.shown:
            self.shown = tenth
            update_progress_artifact(self.artifact, progress=10.0 * tenth)
