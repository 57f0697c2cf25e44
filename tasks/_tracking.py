"""MLflow: a run per erasure, the adapter as a version of a registered model, aliases as approval.

The only file that imports mlflow. Names of persons appear in no run name, tag, parameter or metric: a
model is called by its erasure's id.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

import mlflow
import mlflow.diffusers
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from fade.adapters.store import load_card
from fade.config import Request
from fade.errors import LineageError, RegistryError, listing, nearest
from fade.evaluation.report import loss_figure
from fade.files import read_json
from fade.lineage import git_state, library_versions
from tasks._page import ATTACK, DOCS, Page, page

EXPERIMENT, STUDIES = "erasures", "studies"
MODEL_PREFIX = "erasure-"
APPROVED, CANDIDATE = "approved", "candidate"
CURVE = ("forget_loss", "retain_loss", "gradient_norm")
"""Figures of each step of the training."""
LIVE_SECONDS = 5.0
_PHASE = "phase"
RELEASE_TAG, TOGETHER_TAG, WITHDRAWN = "release", "together", "withdrawn"
logger = logging.getLogger(__name__)
BORDERLINE, DECISION_TAG = "borderline", "gate_decision"
for _name in ("mlflow", "alembic", "mlflow.models.model"):
    logging.getLogger(_name).setLevel(logging.ERROR)


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One registered adapter.

    Attributes:
        model: registered model, one for each erasure; its name holds only the erasure's id.
        aliases: among them ``candidate`` (offered) and ``approved`` (live).
        gate: ``passed``, ``failed`` or ``borderline``, as its tag says; the release flow asks what was measured.
        release: what the release flow said last: ``live``, ``rolled back``, ``waiting: why``, ``refused: why``.
        inversion: share of pictures in which white-box inversion brings the concept back; None if not measured.
        decision: why a person lets a borderline version pass; empty where nobody decided.
    """

    model: str
    version: int
    run_id: str
    adapter_sha256: str
    base_sha256: str
    kind: str
    gate: str
    aliases: tuple[str, ...]
    ua: float
    ira: float
    cra: float
    drift: float
    release: str = ""
    inversion: float | None = None
    decision: str = ""

    @property
    def live(self) -> bool:
        """Whether a person approved this version."""
        return APPROVED in self.aliases

    @property
    def offered(self) -> bool:
        """Whether it waits for a person's approval."""
        return CANDIDATE in self.aliases

    @property
    def erasure(self) -> str:
        """Id of the erasure that made it."""
        return self.model.removeprefix(MODEL_PREFIX)


@contextmanager
def _client() -> Iterator[MlflowClient]:
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('.fade/mlflow.db').resolve()}"
    if uri.startswith("sqlite"):
        Path(".fade").mkdir(exist_ok=True)
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    try:
        yield MlflowClient(uri, uri)
    except MlflowException as error:
        raise RegistryError(
            f"MLflow at {uri} refused or cannot be reached: {str(error).splitlines()[0]}. "
            "Check MLFLOW_TRACKING_URI, or unset it to use the embedded store."
        ) from error


def register(
    folder: Path, request: Request, *, timings: Mapping[str, Any], lineage: Mapping[str, str]
) -> AdapterVersion:
    """Log the erasure's run and register its adapter; alias ``candidate`` if its gate passed.

    Done twice for one adapter, it gives the version that is there.

    Args:
        timings: seconds and peak memory of each step.
        lineage: further tags (``dvc.*``, ``prefect.*``).

    Raises:
        RegistryError: MLflow refuses or is down; nothing is lost, run the erasure again.
    """
    card = load_card(folder / "adapter")
    metrics = read_json(folder / "evaluation" / "metrics.json")
    if card["adapter_sha256"] != metrics["adapter_sha256"]:
        raise LineageError(f"{folder}: the evaluation is of another adapter. Run the erasure again.")
    model = MODEL_PREFIX + request.id
    with _client() as client:
        for version in versions():
            if version.model == model and version.adapter_sha256 == card["adapter_sha256"]:
                if version.release.startswith(WITHDRAWN):  # and is asked for again
                    client.set_model_version_tag(model, str(version.version), RELEASE_TAG, "")
                    _offer(client, model, version.version)
                return find_version(model, version.version)
        run_id = _log_run(
            client,
            folder,
            request,
            metrics=metrics,
            timings=timings,
            lineage={**lineage, "adapter.sha256": card["adapter_sha256"]},
        )
        number = _log_version(client, run_id, model, folder=folder, request=request, metrics=metrics, card=card)
        return next(v for v in versions() if v.model == model and v.version == number)


def _log_run(
    client: MlflowClient,
    folder: Path,
    request: Request,
    *,
    metrics: dict[str, Any],
    timings: Mapping[str, Any],
    lineage: Mapping[str, str],
) -> str:
    run_id = _taken_over(client, request.id) or str(
        client.create_run(_experiment(client, EXPERIMENT), run_name=request.id).info.run_id
    )
    git = git_state()
    tags = {
        "erasure": request.id,
        "kind": kind_of(request),
        "origin": "distilled here" if request.imported is None else "imported",
        "base.sha256": request.base_sha256,
        "git.commit": git["commit"],
        "git.dirty": git["dirty"],
        **{f"library.{name}": version for name, version in library_versions().items()},
        **lineage,
    }
    settings = request.model_dump(mode="json")
    # What another tool made was made without these settings.
    steps = _STEPS if request.imported is None else ("split", "evaluate", "gate")
    params = {f"{step}.{key}": value for step in steps for key, value in settings[step].items()}
    if not any(pair.person for pair in request.pairs):
        params |= {"concept": _all(pair.concept for pair in request.pairs)}
        params |= {"surrogate": _all(pair.surrogate for pair in request.pairs)}
    client.log_batch(
        run_id,
        metrics=[Metric(key, float(value), 0, 0) for key, value in flat_figures(metrics, timings).items()],
        params=[Param(key, str(value)) for key, value in params.items()],
        tags=[RunTag(key, value) for key, value in tags.items()],
    )
    for name in (
        "evaluation/report.html",
        "evaluation/sheet.png",
        "evaluation/metrics.json",
        "dvc.lock",
        "validation.json",
    ):
        client.log_artifact(run_id, str(folder / name))
    _log_docs(client, run_id, folder / "docs")
    if request.imported is None:
        client.log_artifact(run_id, str(folder / "mask" / "mask.json"))
        _log_curve(client, run_id, pd.read_csv(folder / "curve.csv"))
    _log_splits(run_id, folder, lineage)
    client.set_terminated(run_id, "FINISHED")
    return run_id


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
            with _client() as client:
                if not run_id:
                    for dead in _unfinished(client, erasure):
                        client.set_terminated(dead, "KILLED")
                    run = client.create_run(
                        _experiment(client, EXPERIMENT), run_name=erasure, tags={"erasure": erasure, _PHASE: "distill"}
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
    return [run.info.run_id for run in client.search_runs([_experiment(client, EXPERIMENT)], asked)]


def _taken_over(client: MlflowClient, erasure: str) -> str | None:
    """The run that showed the training, now the one of the registration; None if there is none."""
    for run_id in _unfinished(client, erasure)[:1]:
        client.set_tag(run_id, _PHASE, "register")
        return run_id
    return None


def page_of(version: AdapterVersion) -> str | None:
    """The address of a version's page; None without an MLflow server."""
    uri = mlflow.get_tracking_uri()
    return f"{uri}/#/models/{version.model}/versions/{version.version}" if uri.startswith("http") else None


def _all(names: Iterable[str]) -> str:
    return ", ".join(names)


def kind_of(request: Request) -> str:
    """What is erased, as a tag may say it: ``person``, ``object``, ``style``, or several of them."""
    kinds = dict.fromkeys("person" if pair.person else pair.kind for pair in request.pairs)
    return _all(kinds)


def log_study(name: str, folder: Path, table: pd.DataFrame) -> None:
    """A run of the experiment ``studies``: the table's means as metrics, a step a row, its picture and table.

    The rows of single erasures stay in the project: they name what was erased.
    """
    with _client() as client:
        run = client.create_run(_experiment(client, STUDIES), run_name=name)
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


def _experiment(client: MlflowClient, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    embedded = mlflow.get_tracking_uri().startswith("sqlite")
    place = Path(".fade/mlartifacts").resolve().as_uri() if embedded else None
    return str(client.create_experiment(name, artifact_location=place))


def _new_version(
    client: MlflowClient, run_id: str, model: str, *, folder: Path, request: Request, card: dict[str, Any]
) -> int:
    """A LoRA goes through MLflow's flavour for diffusers; a sparse difference, which it does not know, as files."""
    if card["type"] == "lora":
        with mlflow.start_run(run_id=run_id):
            logged = mlflow.diffusers.log_model(
                adapter_path=str(folder / "adapter"),
                base_model=str(Path(request.base).resolve()),
                name="adapter",
                registered_model_name=model,
                pip_requirements=["torch", "diffusers", "peft", "safetensors"],
            )
        return int(logged.registered_model_version)
    client.log_artifacts(run_id, str(folder / "adapter"), "adapter")
    if not client.search_registered_models(filter_string=f"name = '{model}'"):
        client.create_registered_model(model)
    source = f"{client.get_run(run_id).info.artifact_uri}/adapter"
    return int(client.create_model_version(model, source=source, run_id=run_id).version)


_STEPS = ("split", "saliency", "mask", "distill", "evaluate", "gate")


def _log_splits(run_id: str, folder: Path, lineage: Mapping[str, str]) -> None:
    """The splits as MLflow inputs: picture hashes alone, with DVC's hash of the whole as a tag."""
    with mlflow.start_run(run_id=run_id):
        for name in ("forget", "surrogate", "retain", "holdout", "held_out"):
            hashes = pd.read_parquet(folder / "splits" / f"{name}.parquet", columns=["sha256"])
            data = mlflow.data.from_pandas(hashes, source=str(folder / "splits"), name=name)
            mlflow.log_input(data, context=name, tags={"dvc.md5": lineage.get("dvc.splits", "unknown")})


def flat_figures(metrics: Mapping[str, Any], timings: Mapping[str, Any]) -> dict[str, float]:
    """Figures as MLflow metrics: the report judge's, with interval bounds, before and after."""
    judged = metrics["judges"]["report"]
    figures = {"drift": metrics["drift"], "adapter_bytes": metrics["adapter_bytes"], "samples": metrics["samples"]}
    for when, prefix in (("after", ""), ("before", "base_")):
        for name in ("ua", "ira", "cra", "scrambled", *(["surrogate"] if "surrogate" in judged[when] else [])):
            figures[prefix + name] = judged[when][name]["value"]
            figures[f"{prefix}{name}_low"] = judged[when][name]["low"]
            figures[f"{prefix}{name}_high"] = judged[when][name]["high"]
    for step, spent in timings.items():
        figures[f"seconds_{step}"] = spent["seconds"]
        figures[f"peak_mib_{step}"] = spent["peak_mib"]
    return figures


def _log_version(
    client: MlflowClient,
    run_id: str,
    model: str,
    *,
    folder: Path,
    request: Request,
    metrics: dict[str, Any],
    card: dict[str, Any],
) -> int:
    judged = metrics["judges"]["report"]["after"]
    gate = metrics["gate"].get("verdict") or ("passed" if metrics["gate"]["passed"] else "failed")
    number = _new_version(client, run_id, model, folder=folder, request=request, card=card)
    tags = {
        "adapter_sha256": card["adapter_sha256"],
        "type": card["type"],
        "base_sha256": request.base_sha256,
        "kind": kind_of(request),
        "gate": gate,
        **{name: f"{judged[name]['value']:.4f}" for name in ("ua", "ira", "cra")},
    }
    for key, value in tags.items():
        client.set_model_version_tag(model, str(number), key, value)
    if gate == "passed":
        _offer(client, model, number)
    # Last of all: a version counts once it has its drift, so one whose registration was cut off never does.
    client.set_model_version_tag(model, str(number), "drift", f"{metrics['drift']:.4f}")
    return number


def _offer(client: MlflowClient, model: str, number: int) -> None:
    client.set_registered_model_alias(model, CANDIDATE, str(number))


def withdraw(version: AdapterVersion, reason: str) -> None:
    """Take a version off offer: its alias ``candidate`` goes, and its page says why."""
    with _client() as client:
        client.set_model_version_tag(version.model, str(version.version), RELEASE_TAG, f"{WITHDRAWN}: {reason}")
        client.delete_registered_model_alias(version.model, CANDIDATE)


def refresh_page(version: AdapterVersion) -> None:
    """Write a version's page anew, from what its run and its tags hold now."""
    metrics = json.loads(run_file(version, "metrics.json"))
    with _client() as client:
        run = client.get_run(version.run_id)
        tags = client.get_model_version(version.model, str(version.version)).tags
        of = Page(
            metrics=metrics,
            least=_least(metrics, run.data.params),
            run=(version.run_id, run.info.experiment_id),
            tags=run.data.tags,
            files={path.partition("/")[0] for path in _files_of(client, version.run_id)},
            inversion=float(tags["inversion"]) if "inversion" in tags else None,
            together=tags.get(TOGETHER_TAG, ""),
            study=_newest_study(client),
        )
        client.update_model_version(version.model, str(version.version), description=page(of, approved=APPROVED))


def _least(metrics: Mapping[str, Any], params: Mapping[str, str]) -> dict[str, float]:
    """What the gate asks of each figure, from the run's parameters."""
    before = metrics["judges"]["report"]["before"]
    return {"ua": float(params["gate.ua"])} | {
        name: before[name]["value"] - float(params[f"gate.{name}_loss"]) for name in ("ira", "cra")
    }


def _newest_study(client: MlflowClient) -> tuple[str, str] | None:
    found = client.get_experiment_by_name(STUDIES)
    if found is None:
        return None
    runs = client.search_runs([found.experiment_id], order_by=["attributes.start_time DESC"], max_results=1)
    return (runs[0].info.run_id, found.experiment_id) if runs else None


def _pages(search: Callable[..., Any]) -> Iterator[Any]:
    """All of the project's models or versions: the server gives them in pages."""
    token = None
    while True:
        page = search(filter_string=f"name LIKE '{MODEL_PREFIX}%'", max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def versions() -> list[AdapterVersion]:
    """Every registered adapter, oldest first."""
    with _client() as client:
        found = []
        aliases: dict[tuple[str, int], list[str]] = {}
        for model in _pages(client.search_registered_models):
            for alias, number in model.aliases.items():
                aliases.setdefault((model.name, int(number)), []).append(alias)
        for version in _pages(client.search_model_versions):
            tags, number = version.tags, int(version.version)
            if "adapter_sha256" not in tags or "drift" not in tags:
                continue  # registration died half-way; the next run of the erasure registers again
            one = AdapterVersion(
                model=version.name,
                version=number,
                run_id=version.run_id or "",
                adapter_sha256=tags["adapter_sha256"],
                base_sha256=tags["base_sha256"],
                kind=tags["kind"],
                gate=tags["gate"],
                aliases=tuple(sorted(aliases.get((version.name, number), []))),
                ua=float(tags["ua"]),
                ira=float(tags["ira"]),
                cra=float(tags["cra"]),
                drift=float(tags["drift"]),
                release=tags.get(RELEASE_TAG, ""),
                inversion=float(tags["inversion"]) if "inversion" in tags else None,
                decision=tags.get(DECISION_TAG, ""),
            )
            found.append((version.creation_timestamp, one))
        return [version for _, version in sorted(found, key=lambda item: (item[0], item[1].version))]


def find_version(name: str, number: int | None = None) -> AdapterVersion:
    """One adapter by model name or erasure id; its newest version if none is named.

    Raises:
        RegistryError: there is none; suggests the nearest.
    """
    model = name if name.startswith(MODEL_PREFIX) else MODEL_PREFIX + name
    everything = versions()
    known = [version for version in everything if version.model == model]
    if not known:
        raise RegistryError(f"No adapter {name!r} is registered. {nearest(model, {v.model for v in everything})}")
    if number is None:
        return known[-1]
    chosen = [version for version in known if version.version == number]
    if not chosen:
        raise RegistryError(f"{model} has no version {number}: it has {listing(v.version for v in known)}.")
    return chosen[0]


def approve(name: str, number: int | None = None, *, decision: str = "") -> AdapterVersion:
    """Set alias ``approved``: the version is live.

    Args:
        decision: why a person lets a borderline version pass; kept on its page as the tag ``gate_decision``.

    Raises:
        RegistryError: unknown, its gate failed, it is borderline and nobody decided, or its files were changed since
            registration.
    """
    version = find_version(name, number)
    if version.gate == BORDERLINE and not (decision or version.decision):
        raise RegistryError(
            f"{version.model} version {version.version} is borderline: its figures pass the gate, not every bound is "
            "sure. Read its report, then approve it with --because 'your reason', or leave it out."
        )
    if version.gate not in ("passed", BORDERLINE):
        raise RegistryError(f"{version.model} version {version.version} did not pass its gate; it is not approved.")
    fetch_adapter(version)
    with _client() as client:
        if decision and version.gate == BORDERLINE:
            client.set_model_version_tag(version.model, str(version.version), DECISION_TAG, decision)
        client.set_registered_model_alias(version.model, APPROVED, str(version.version))
    return find_version(version.model, version.version)


def rollback(name: str, to: int | None = None) -> AdapterVersion:
    """Take an approved adapter back: remove alias ``approved``, or move it to version ``to``.

    Raises:
        RegistryError: unknown, or nothing of this model is approved.
    """
    model = find_version(name).model
    approved = [version for version in versions() if version.model == model and version.live]
    if not approved:
        raise RegistryError(f"Nothing to roll back: no version of {model} is approved.")
    if to is not None:
        return approve(model, to)
    with _client() as client:
        client.delete_registered_model_alias(model, APPROVED)
    return find_version(model, approved[0].version)


def fetch_adapter(version: AdapterVersion) -> Path:
    """A local folder with the registered adapter, its hash checked against the registry's tag.

    Raises:
        RegistryError: MLflow does not have it.
        LineageError: its bytes are not the ones registered.
    """
    uri = f"models:/{version.model}/{version.version}"
    with _client() as client:
        if client.get_model_version(version.model, str(version.version)).tags.get("type") == "delta":
            folder = Path(mlflow.artifacts.download_artifacts(uri))
        else:
            folder = Path(mlflow.diffusers.load_model(uri).adapter_path)
    folder = folder if folder.is_dir() else folder.parent
    card = load_card(folder)
    if card["adapter_sha256"] != version.adapter_sha256:
        raise LineageError(
            f"{version.model} version {version.version} holds another adapter than was registered: "
            f"{card['adapter_sha256'][:12]} instead of {version.adapter_sha256[:12]}. It is not used."
        )
    return folder


def approved_now() -> dict[str, int]:
    """Registered model to the version that its alias ``approved`` names: one question to the server."""
    with _client() as client:
        found = _pages(client.search_registered_models)
        return {model.name: int(model.aliases[APPROVED]) for model in found if APPROVED in model.aliases}


def say_release(version: AdapterVersion, what: str) -> None:
    """Show on a version's page what became of its approval."""
    if what == version.release:
        return
    with _client() as client:
        client.set_model_version_tag(version.model, str(version.version), RELEASE_TAG, what)


def log_attack(version: AdapterVersion, figures: Mapping[str, float | None], sheet: Path | None) -> None:
    """Attacks: metrics and a picture of the version's run, and a tag for each on its page."""
    known = {key: value for key, value in figures.items() if value is not None}
    with _client() as client, tempfile.TemporaryDirectory() as folder:
        if sheet is not None:
            shutil.copyfile(sheet, Path(folder) / ATTACK)
            client.log_artifact(version.run_id, str(Path(folder) / ATTACK))
        client.log_batch(version.run_id, metrics=[Metric(key, value, 0, 0) for key, value in known.items()])
        for name in (key for key in known if f"base_{key}" in known or key == "inversion"):
            client.set_model_version_tag(version.model, str(version.version), name, f"{known[name]:.4f}")
    refresh_page(version)


def say_gate(version: AdapterVersion, verdict: str) -> None:
    """What the gate says now that attacks were run; the alias ``candidate`` follows it."""
    with _client() as client:
        client.set_model_version_tag(version.model, str(version.version), "gate", verdict)
        if verdict == "passed":
            client.set_registered_model_alias(version.model, CANDIDATE, str(version.version))
        elif CANDIDATE in version.aliases:
            client.delete_registered_model_alias(version.model, CANDIDATE)


def run_metrics(version: AdapterVersion) -> dict[str, float]:
    """The figures of a version's run, attacks among them."""
    with _client() as client:
        return dict(client.get_run(version.run_id).data.metrics)


def tag_version(version: AdapterVersion, tags: Mapping[str, str]) -> None:
    """Set tags of a version."""
    with _client() as client:
        for name, value in tags.items():
            client.set_model_version_tag(version.model, str(version.version), name, value)


def run_file(version: AdapterVersion, name: str) -> bytes:
    """A file of a version's run, e.g. ``metrics.json``.

    Raises:
        RegistryError: MLflow does not have it.
    """
    with _client() as client, tempfile.TemporaryDirectory() as folder:
        return Path(client.download_artifacts(version.run_id, name, folder)).read_bytes()


def file_address(version: AdapterVersion, name: str) -> str | None:
    """Where a browser finds a file of a version's run; None without a server."""
    server = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not server.startswith(("http://", "https://")):
        return None
    return f"{server.rstrip('/')}/get-artifact?path={name}&run_uuid={version.run_id}"


def run_tags(version: AdapterVersion) -> dict[str, str]:
    """Tags of a version's run: commit, libraries, hashes of DVC's outputs."""
    with _client() as client:
        return dict(client.get_run(version.run_id).data.tags)


def say_together(version: AdapterVersion, what: str) -> None:
    """Show on a version's page how it did together with everything live."""
    with _client() as client:
        if client.get_model_version(version.model, str(version.version)).tags.get(TOGETHER_TAG) == what:
            return
        client.set_model_version_tag(version.model, str(version.version), TOGETHER_TAG, what)
    refresh_page(version)


def run_objects(version: AdapterVersion, names: Iterable[str]) -> list[tuple[str, str, int]]:
    """Those of these files, or of the files in these folders, that a version's run has: name, SHA-256, bytes."""
    wanted = set(names)
    with _client() as client:
        paths = [path for path in _files_of(client, version.run_id) if path.partition("/")[0] in wanted]
    found = [(name, run_file(version, name)) for name in sorted(paths)]
    return [(name, hashlib.sha256(content).hexdigest(), len(content)) for name, content in found]


def _files_of(client: MlflowClient, run_id: str, folder: str | None = None) -> Iterator[str]:
    """Paths of a run's files; folders that are empty are not among them."""
    for one in client.list_artifacts(run_id, folder):
        if one.is_dir:
            yield from _files_of(client, run_id, one.path)
        else:
            yield one.path


def delete_run_file(version: AdapterVersion, name: str) -> None:
    """Delete a file of a version's run from MLflow's artifact store."""
    with _client() as client:
        uri = client.get_run(version.run_id).info.artifact_uri
        get_artifact_repository(uri).delete_artifacts(name)
