"""MLflow's runs: an erasure's run from the first step of its training to the registered version; studies.

Names of persons appear in no run name, tag, parameter or metric: a model is called by its erasure's id.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fade.adapters.card import load_card
from fade.errors import AdapterFormatError, LineageError, RegistryError
from fade.evaluation.beside import self_contained
from fade.evaluation.figures import Rate
from fade.evaluation.measured import Evaluation
from fade.evaluation.records import load
from fade.evaluation.report import loss_figure
from fade.lineage import git_state, library_versions
from fade.methods.fade.masks import load_mask
from fade.pipeline import LOSSES, sections_of, steps_of
from fade.spec import Spec
from tasks.mlflow.client import EXPERIMENT, STUDIES, experiment, mlflow_client, read_file
from tasks.mlflow.page import DOCS
from tasks.mlflow.registration import as_param, kind_of
from tasks.mlflow.tracking import (
    ADAPTER,
    JUDGED,
    MODEL_PREFIX,
    RELEASE_TAG,
    UNJUDGED,
    WITHDRAWN,
    AdapterVersion,
    fetch_adapter,
    find_version,
    offer,
    versions,
)

# isort: split
# After tasks.mlflow.client, which sets MLflow's switches.
import mlflow
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

CURVE = ("forget_loss", "retain_loss", "gradient_norm")
"""Figures of each step of the training."""
LIVE_SECONDS = 5.0
_PHASE = "phase"
logger = logging.getLogger(__name__)


def register(folder: Path, spec: Spec, *, timings: Mapping[str, Any], lineage: Mapping[str, str]) -> AdapterVersion:
    """Log the erasure's run and register its adapter; alias ``candidate`` if its gate passed.

    Done twice for one adapter, it gives the version that is there.

    Args:
        timings: seconds and peak memory of each step.
        lineage: further tags (``dvc.*``, ``prefect.*``).

    Raises:
        RegistryError: MLflow refuses or is down; nothing is lost, run the erasure again.
    """
    card = load_card(folder / "adapter")
    metrics = load(Evaluation, folder / "evaluation" / "metrics.json")
    if card["adapter_sha256"] != metrics.adapter_sha256:
        raise LineageError(f"{folder}: the evaluation is of another adapter. Run the erasure again.")
    model = MODEL_PREFIX + spec.id
    with mlflow_client() as client:
        for version in versions():
            if version.model == model and _is_this(client, version, folder, card["adapter_sha256"]):
                if version.release.startswith(WITHDRAWN):  # and is asked for again
                    client.set_model_version_tag(model, str(version.version), RELEASE_TAG, "")
                    offer(client, model, version.version)
                return find_version(model, version.version)
        run_id = _log_run(
            client,
            folder,
            spec,
            metrics=metrics,
            timings=timings,
            lineage={**lineage, "adapter.sha256": card["adapter_sha256"]},
        )
        number = _log_version(client, run_id, model, folder=folder, spec=spec, metrics=metrics, card=card)
        return next(v for v in versions() if v.model == model and v.version == number)


def _is_this(client: MlflowClient, version: AdapterVersion, folder: Path, adapter_sha256: str) -> bool:
    """Whether a version is this erasure's: whoever may write to MLflow can make one that only says so."""
    if version.fault or version.adapter_sha256 != adapter_sha256:
        return False
    try:
        fetch_adapter(version)
        content = read_file(client, version.run_id, "metrics.json")
    except (RegistryError, LineageError, AdapterFormatError, MlflowException) as error:
        logger.warning("%s version %d is not taken for this erasure: %s", version.model, version.version, error)
        return False
    return content == (folder / "evaluation" / "metrics.json").read_bytes()


def _log_run(
    client: MlflowClient,
    folder: Path,
    spec: Spec,
    *,
    metrics: Evaluation,
    timings: Mapping[str, Any],
    lineage: Mapping[str, str],
) -> str:
    run_id = _taken_over(client, spec.id) or str(
        client.create_run(experiment(client, EXPERIMENT), run_name=spec.id).info.run_id
    )
    tags = {
        "erasure": spec.id,
        "kind": kind_of(spec),
        "origin": f"made here by {spec.method}" if spec.imported is None else "imported",
        "base.sha256": spec.base_sha256,
        **code_tags(),
        **lineage,
    }
    settings = spec.model_dump(mode="json")
    params = {f"{section}.{key}": value for section in sections_of(spec) for key, value in settings[section].items()}
    params |= {f"{method}.{key}": value for method, own in spec.methods.items() for key, value in own.items()}
    if any(pair.person for pair in spec.pairs):
        params.pop("attacks.names", None)
    else:
        params |= {"concept": ", ".join(pair.concept for pair in spec.pairs)}
        params |= {"surrogate": ", ".join(pair.surrogate for pair in spec.pairs)}
    client.log_batch(
        run_id,
        metrics=[Metric(key, float(value), 0, 0) for key, value in flat_figures(metrics, timings).items()],
        params=[Param(key, as_param(value)) for key, value in params.items()],
        tags=[RunTag(key, value) for key, value in tags.items()],
    )
    made = {name for step in steps_of(spec) for name in step.outputs}
    if "mask" in made:
        load_mask(folder / "mask", sha256=load_card(folder / "adapter")["mask_sha256"])
    for name in ("dvc.lock", *(name for step in steps_of(spec) for name in step.logged)):
        if not (folder / name).exists():  # a purge takes some of them
            continue
        if name.endswith(".html"):  # MLflow shows a page alone
            client.log_text(run_id, self_contained(folder / name), Path(name).name)
        else:
            client.log_artifact(run_id, str(folder / name))
    _log_docs(client, run_id, folder / "docs")
    if LOSSES in made:
        _log_curve(client, run_id, pd.read_csv(folder / LOSSES))
    if (folder / "splits").is_dir():
        _log_splits(run_id, folder, lineage)
    client.set_terminated(run_id, "FINISHED")
    return run_id


def code_tags() -> dict[str, str]:
    """Commit and libraries, as a run's tags."""
    git = git_state()
    return {
        "git.commit": git["commit"],
        "git.dirty": git["dirty"],
        **{f"library.{name}": version for name, version in library_versions().items()},
    }


def say_code(version: AdapterVersion) -> None:
    """Commit and libraries onto a version's run anew: what registered it died before the log had it."""
    with mlflow_client() as client:
        client.log_batch(version.run_id, tags=[RunTag(key, value) for key, value in code_tags().items()])


def _log_docs(client: MlflowClient, run_id: str, docs: Path) -> None:
    """Great Expectations' pages, less the films and fonts that come with each."""
    wanted = [path for path in sorted(docs.rglob("*")) if path.suffix in (".html", ".css", ".js")]
    for path in wanted:
        client.log_artifact(run_id, str(path), (Path(DOCS) / path.relative_to(docs)).parent.as_posix())


def _log_curve(client: MlflowClient, run_id: str, curve: pd.DataFrame) -> None:
    sent = {point.step for point in client.get_metric_history(run_id, CURVE[0])}
    points = [
        Metric(key, float(row[key]), 0, int(row["step"]))
        for row in curve.to_dict("records")
        if row["step"] not in sent
        for key in CURVE
        if key in row
    ]
    for start in range(0, len(points), 1000):
        client.log_batch(run_id, metrics=points[start : start + 1000])
    client.log_figure(run_id, loss_figure(curve), "curve.png")


@contextmanager
def live_curve(erasure: str) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """A run that shows an erasure's training while it goes on; `register` goes on with it.

    Gives a function that takes a step and its figures; they are sent every few seconds. An MLflow that
    cannot be reached stops no training: the rest of the curve is logged when the adapter is registered.
    """
    run_id, waiting, sent_at = "", list[Metric](), time.monotonic()

    def flush() -> None:
        nonlocal run_id, sent_at
        try:
            with mlflow_client() as client:
                if not run_id:
                    for dead in _unfinished(client, erasure):
                        client.set_terminated(dead, "KILLED")
                    run = client.create_run(
                        experiment(client, EXPERIMENT), run_name=erasure, tags={"erasure": erasure, _PHASE: "distill"}
                    )
                    run_id = str(run.info.run_id)
                client.log_batch(run_id, metrics=waiting)
        except RegistryError as error:
            logger.warning("the curve is not shown while it grows: %s", error)
            sent_at = math.inf
        else:
            sent_at = time.monotonic()
        waiting.clear()

    def send(step: int, figures: Mapping[str, float]) -> None:
        waiting.extend(Metric(key, value, time.time_ns() // 10**6, step) for key, value in figures.items())
        if time.monotonic() - sent_at > LIVE_SECONDS:
            flush()

    yield send
    if run_id and waiting and sent_at < math.inf:
        flush()


def _unfinished(client: MlflowClient, erasure: str) -> list[str]:
    """Runs of an erasure that were begun by its training and not taken over."""
    asked = f"tags.erasure = '{erasure}' and tags.{_PHASE} = 'distill' and attributes.status = 'RUNNING'"
    return [run.info.run_id for run in client.search_runs([experiment(client, EXPERIMENT)], asked)]


def _taken_over(client: MlflowClient, erasure: str) -> str | None:
    """The run that showed the training, now the one of the registration; None if there is none."""
    for run_id in _unfinished(client, erasure)[:1]:
        client.set_tag(run_id, _PHASE, "register")
        return run_id
    return None


def log_study(name: str, folder: Path, table: pd.DataFrame) -> None:
    """A run of the experiment ``studies``: the table's means as metrics, a step a row, its picture and table.

    The rows of single erasures stay in the project: they name what was erased.
    """
    with mlflow_client() as client:
        run = client.create_run(experiment(client, STUDIES), run_name=name)
        numbers = table.select_dtypes("number")
        points = [
            Metric(key, float(row[key]), 0, step)
            for step, row in enumerate(numbers.to_dict("records"))
            for key in numbers
            if pd.notna(row[key])
        ]
        for start in range(0, len(points), 1000):
            client.log_batch(run.info.run_id, metrics=points[start : start + 1000])
        for artifact in ("tradeoff.png", "scatter.png", "sequence.png", "table.md"):
            if (folder / artifact).is_file():
                client.log_artifact(run.info.run_id, str(folder / artifact))
        client.set_terminated(run.info.run_id, "FINISHED")


def _new_version(client: MlflowClient, run_id: str, model: str, *, folder: Path) -> int:
    """The adapter as files of its run: no flavour, so that nobody is led to load what others may have written."""
    client.log_artifacts(run_id, str(folder / "adapter"), ADAPTER)
    if not client.search_registered_models(filter_string=f"name = '{model}'"):
        client.create_registered_model(model)
    source = f"{client.get_run(run_id).info.artifact_uri}/{ADAPTER}"
    return int(client.create_model_version(model, source=source, run_id=run_id).version)


def _log_splits(run_id: str, folder: Path, lineage: Mapping[str, str]) -> None:
    """The splits as MLflow inputs: picture hashes alone, with DVC's hash of the whole as a tag."""
    with mlflow.start_run(run_id=run_id):
        for name in ("forget", "surrogate", "retain", "holdout", "held_out"):
            hashes = pd.read_parquet(folder / "splits" / f"{name}.parquet", columns=["sha256"])
            data = mlflow.data.from_pandas(hashes, source=str(folder / "splits"), name=name)
            mlflow.log_input(data, context=name, tags={"dvc.md5": lineage.get("dvc.splits", "unknown")})


def flat_figures(metrics: Evaluation, timings: Mapping[str, Any]) -> dict[str, float]:
    """Figures as MLflow metrics: the report judge's, with interval bounds, before and after.

    Of what is unjudged they are called ``unjudged_...``, so that no chart or table takes them for what they are not;
    how much the judge recognises keeps its name: that says why.
    """
    judged, unjudged = metrics.report, "unjudged_" if metrics.gate.verdict == UNJUDGED else ""
    figures: dict[str, float] = {
        "drift": metrics.drift,
        "adapter_bytes": metrics.adapter_bytes,
        "samples": metrics.samples,
    }
    said: dict[str, Rate | None] = {name: getattr(judged.after, name) for name in JUDGED}
    said |= {f"base_{name}": getattr(judged.before, name) for name in JUDGED}
    said |= judged.overwriting()
    rates = {unjudged + name: found for name, found in said.items()}
    rates |= {f"recognised_{name.replace(' ', '_')}": found for name, found in judged.recognised.items()}
    for name, found in rates.items():
        if found is not None:
            figures |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
    for one in metrics.detectors:
        if one.able:
            figures |= {f"shown_by_{one.name}": one.after.value, f"base_shown_by_{one.name}": one.before.value}
    for step, spent in timings.items():
        figures[f"seconds_{step}"] = spent["seconds"]
        figures[f"peak_mib_{step}"] = spent["peak_mib"]
    return figures


def least_recognised(metrics: Evaluation) -> float:
    """The least that the report judge recognises of an erased concept in the base's own pictures."""
    return min(found.value for name, found in metrics.report.recognised.items() if name.startswith("concept"))


def _log_version(
    client: MlflowClient,
    run_id: str,
    model: str,
    *,
    folder: Path,
    spec: Spec,
    metrics: Evaluation,
    card: dict[str, Any],
) -> int:
    number = _new_version(client, run_id, model, folder=folder)
    tags = {
        "adapter_sha256": card["adapter_sha256"],
        "type": card["type"],
        "base_sha256": spec.base_sha256,
        "kind": kind_of(spec),
        "gate": metrics.gate.verdict,
        **{
            name: UNJUDGED if metrics.gate.verdict == UNJUDGED else f"{found.value:.4f}"
            for name, found in metrics.report.after.rates.items()
        },
        "recognised": f"{least_recognised(metrics):.4f}",
    }
    for key, value in tags.items():
        client.set_model_version_tag(model, str(number), key, value)
    if metrics.gate.passed:
        offer(client, model, number)
    # Last of all: a version counts once it has its drift, so one whose registration was cut off never does.
    client.set_model_version_tag(model, str(number), "drift", f"{metrics.drift:.4f}")
    return number
