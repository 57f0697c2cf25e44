"""Prefect tasks of an erasure: paths in, small records out; a stage DVC calls current is not run again."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping
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

from fade.errors import FadeError, nameless
from fade.files import read_json, write_json
from fade.methods.fade.distillation import DistillStep
from fade.spec import load_spec
from fade.steps import distill as distill_step
from fade.steps import evaluate as evaluate_step
from fade.steps import foreign as foreign_step
from fade.steps import gate_attacks as gate_attacks_step
from fade.steps import generate as generate_step
from fade.steps import mask as mask_step
from fade.steps import saliency as saliency_step
from fade.steps import split as split_step
from tasks.dvc import versioning
from tasks.expectations import validation
from tasks.mlflow import registration, runs, tracking

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


def _once(folder: Path, stage: str, work: Callable[[], Any]) -> bool:
    """Run a stage unless DVC calls it current; record it, its seconds and its peak memory."""
    logger = get_run_logger()
    if versioning.is_current(folder, stage):
        logger.info("%s is current: not run again", stage)
        return False
    begun = time.perf_counter()
    work()
    seconds = time.perf_counter() - begun
    timings = read_json(folder / "timings.json") if (folder / "timings.json").is_file() else {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    write_json(folder / "timings.json", {**timings, stage: {"seconds": round(seconds, 3), "peak_mib": round(peak, 1)}})
    versioning.record(folder, stage)
    logger.info("%s took %.1f s", stage, seconds)
    return True


@task(name="generate", **_OPTIONS)
@_words_kept_back
def generate(folder: Path) -> bool:
    """Pictures that the base draws, where none are left."""

    def work() -> None:
        with _Progress("generate", 0) as progress:
            for done, total in generate_step.generate_catalog(folder):
                progress.bar.total = total
                progress.at(done)

    return _once(folder, "generate", work)


@task(name="split", **_OPTIONS)
@_words_kept_back
def split(folder: Path) -> bool:
    """Forget, surrogate, retain and holdout sets."""
    return _once(folder, "split", lambda: split_step.split(folder))


@task(name="validate", **_OPTIONS)
@_words_kept_back
def validate(folder: Path) -> bool:
    """Great Expectations over the splits; a failing suite stops the flow with the reason."""
    return _once(folder, "validate", lambda: validation.validate(folder))


@task(name="saliency", **_OPTIONS)
@_words_kept_back
def saliency(folder: Path) -> bool:
    """Score of every module."""
    return _once(folder, "saliency", lambda: saliency_step.saliency(folder))


@task(name="mask", **_OPTIONS)
@_words_kept_back
def mask(folder: Path) -> bool:
    """Modules that may change."""
    return _once(folder, "mask", lambda: mask_step.mask(folder))


@task(name="distill", **_OPTIONS)
@_words_kept_back
def distill(folder: Path) -> bool:
    """Train the adapter; progress as an artifact and on a terminal."""

    def work() -> None:
        spec = load_spec(folder)
        with (
            _Progress("distill", spec.distill.in_force.steps) as progress,
            runs.live_curve(spec.id) as send,
        ):
            unread: list[DistillStep] = []
            for step in distill_step.distill_adapter(folder):
                unread.append(step)
                # Reading a figure waits until the step is computed: a GPU is asked once in a while.
                if step.losses.device.type == "cpu" or step.step % READ_EVERY == 0:
                    progress.at(step.step, f"forget {step.forget_loss:.4f} retain {step.retain_loss:.4f}")
                    _send_all(unread, send)
            _send_all(unread, send)

    return _once(folder, "distill", work)


def _send_all(steps: list[DistillStep], send: Callable[[int, Mapping[str, float]], None]) -> None:
    """Send the figures of steps, and empty the list."""
    for step in steps:
        send(step.step, {name: getattr(step, name) for name in runs.CURVE})
    steps.clear()


@task(name="foreign", **_OPTIONS)
@_words_kept_back
def foreign(folder: Path) -> bool:
    """Another tool's adapter as one of this library."""
    return _once(folder, "foreign", lambda: foreign_step.convert_foreign(folder))


@task(name="attack", **_OPTIONS)
@_words_kept_back
def attack(folder: Path) -> bool:
    """The attacks whose bounds the gate asks for."""

    def work() -> None:
        with _Progress("attacks", 0) as progress:
            for done, total in gate_attacks_step.gate_attacks(folder):
                progress.bar.total = total
                progress.at(done)

    return _once(folder, "attack", work)


@task(name="evaluate", **_OPTIONS)
@_words_kept_back
def evaluate(folder: Path) -> bool:
    """Pictures before and after, judged; the figures as a table."""

    def work() -> None:
        with _Progress("pictures", 0) as progress:
            for done, total in evaluate_step.evaluate(folder):
                progress.bar.total = total
                progress.at(done)

    ran = _once(folder, "evaluate", work)
    metrics = read_json(folder / "evaluation" / "metrics.json")
    judged = metrics["judges"]["report"]
    rows = [
        {"figure": name.upper(), "base": f"{judged['before'][name]['value']:.4f}", "erased": f"{v['value']:.4f}"}
        | {"95 % interval": f"{v['low']:.4f} to {v['high']:.4f}"}
        for name in ("ua", "ira", "cra")
        for v in [judged["after"][name]]
    ]
    key = _key(folder)
    create_table_artifact(rows, key=f"figures-{key}", description=f"Drift {metrics['drift']:.4f}")
    return ran


def lineage_of(folder: Path) -> dict[str, str]:
    """What an adapter comes from: DVC's hash of each output, each split's own, and where the pictures are from."""
    splits = split_step.hashes(folder) if (folder / "splits").is_dir() else {}  # a purge takes them
    return {
        **{f"dvc.{name}": value for name, value in versioning.lock_record(folder).items()},
        **{f"split.{name}.sha256": digest for name, digest in splits.items()},
        "pictures": "generated by the base" if load_spec(folder).data_free else "catalog",
    }


@task(name="register", **_OPTIONS)
@_words_kept_back
def register(folder: Path) -> tracking.AdapterVersion:
    """The adapter as a version of a registered model, logged in the ledger."""
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
    version = runs.register(folder, spec, timings=read_json(folder / "timings.json"), lineage=lineage)
    if registration.log_registration(version, folder, spec, data_md5=versioning.lock_record(folder)):
        runs.say_code(version)
    if found := read_json(folder / "evaluation" / "metrics.json").get("attacks"):
        sheet = folder / "attacks" / "sheet.png"
        tracking.show_attack(version, found, sheet if sheet.is_file() else None)
    tracking.refresh_page(version)
    return version


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

    def __init__(self, name: str, total: int) -> None:
        self.bar = tqdm(total=total, desc=name, disable=None, leave=False)
        self.artifact = cast("UUID", create_progress_artifact(progress=0.0, description=name))
        self.shown = 0

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def at(self, done: int, note: str = "") -> None:
        """Say how far the work is."""
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(done - self.bar.n)
        tenth = 10 * done // max(self.bar.total or 1, 1)
        self.bar.n = done
        if tenth > self.shown:
            self.shown = tenth
            update_progress_artifact(self.artifact, progress=10.0 * tenth)
