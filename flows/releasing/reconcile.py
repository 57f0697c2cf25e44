"""Compare what the ledger's chain, the signed manifests and MLflow say, and say what to do where they differ."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fade.errors import FadeError, LineageError
from fade.evaluation.attacked import Attacks
from fade.evaluation.measured import Evaluation
from fade.evaluation.records import parse
from fade.requests.ledger import Ledger
from fade.requests.states import State
from flows.releasing.approval import named
from flows.releasing.released import model_of, released
from flows.settings import ERASURES
from tasks.mlflow import tracking
from tasks.mlflow.registration import (
    REJUDGED,
    Registration,
    as_param,
    attacks_of,
    decision_of,
    registrations,
    request_sha256,
    rows_of,
)
from tasks.mlflow.runs import flat_figures
from tasks.mlflow.tracking import APPROVED, JUDGED, MODEL_PREFIX, AdapterVersion


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing of which two places say different things.

    Attributes:
        name: of the version, ``erasure-<id>/<version>``, or the ledger.
        live: whether it is about what runtimes draw with.
    """

    name: str
    said: str
    do: str
    live: bool = False


def compare(ledger: Ledger) -> list[Difference]:
    """Every difference between ledger, manifests and MLflow; nothing is changed.

    Raises:
        RegistryError: the ledger or MLflow cannot be asked.
        SignatureError: a manifest that is there is not ours.
    """
    found: list[Difference] = []
    try:
        ledger.verify()
    except LineageError as error:
        found.append(Difference("the ledger", str(error), "restore it from a backup: fade restore DIR"))
    versions = {named(one): one for one in tracking.versions()}
    models = tracking.models()
    live: dict[str, str] = {}
    for manifest in released().values():
        for entry in manifest.adapters:
            live[entry.name] = entry.adapter_sha256
            found += _of_live(ledger, entry.name, entry.adapter_sha256, versions, model_of(entry) in models)
    found += _of_requests(ledger, {name.partition("/")[0].removeprefix(MODEL_PREFIX) for name in live})
    for name, version in versions.items():
        found += _of_version(ledger, version, live=name in live)
    return found


def _of_live(
    ledger: Ledger, name: str, adapter_sha256: str, versions: Mapping[str, AdapterVersion], has_model: bool
) -> Iterator[Difference]:
    """What is live, held against the ledger's registration and MLflow's version."""
    model, _, number = name.partition("/")
    erasure = model.removeprefix(MODEL_PREFIX)
    rows = [row for row in registrations(ledger, erasure) if row.version == int(number)]
    out = f"fade rollback {erasure} takes it out"
    if not rows or rows[-1].adapter_sha256 != adapter_sha256:
        said = "it is live, and the ledger did not register this adapter"
        yield Difference(name, said, f"restore the ledger from a backup, or run the erasure again; {out}", True)
    version = versions.get(name)
    if version is None:
        gone = "its version is" if has_model else "its registered model is"
        do = f"fade reconcile --register {erasure}, then fade approve {erasure}; or restore MLflow; {out}"
        yield Difference(name, f"it is live, and {gone} gone from MLflow", do, True)
    elif not any(one.live for one in versions.values() if one.model == model):
        said = f"it is live, and no version of it has the alias {APPROVED} in MLflow"
        yield Difference(name, said, f"fade approve {erasure} if it is to stay live; {out}", True)
    elif not version.live:
        other = next(one for one in versions.values() if one.model == model and one.live)
        said = f"it is live, and its alias {APPROVED} is on version {other.version}: {other.release or 'not looked at'}"
        yield Difference(name, said, f"fade release; or fade approve {erasure}:{number} to keep this one", True)


def _of_requests(ledger: Ledger, live: set[str]) -> Iterator[Difference]:
    for one in ledger.find(states=[State.LIVE], limit=2**31):
        if one.erasure_id not in live:
            said = f"request {one.id} is {one.state}, and no manifest has its erasure"
            name = f"{MODEL_PREFIX}{one.erasure_id}"
            yield Difference(name, said, f"fade release; fade approve {one.erasure_id} makes it live again", True)


def _of_version(ledger: Ledger, version: AdapterVersion, *, live: bool) -> Iterator[Difference]:
    """A version in MLflow, held against the ledger."""
    name = named(version)
    rows = [row for row in registrations(ledger, version.erasure) if row.version == version.version]
    if not rows:
        said = "the ledger did not register it: nobody measured it here, or it was registered by hand"
        yield Difference(name, said, "delete the version in MLflow; if it is your own, run the erasure again", live)
        return
    folder = ERASURES / version.erasure
    try:
        metrics = figures_of(rows[-1], folder, version)
        odd = tampered(ledger, rows[-1], version.erasure, version, metrics)
    except FadeError as error:
        odd = [str(error)]
    for said in odd:
        do = f"put it right, or register it anew: fade reconcile --register {version.erasure}"
        yield Difference(name, said, do, live)
    if version.live and not live:
        said = f"it is approved and not live: {version.release or 'the release flow has not looked at it yet'}"
        yield Difference(name, said, "fade release; what it refuses it says why", False)


def figures_of(row: Registration, folder: Path, version: AdapterVersion | None) -> Evaluation:
    """The figures that were logged, from this machine or from MLflow, whichever still has the very bytes.

    Raises:
        LineageError: one of them has other figures than were logged, or neither has any.
        ConfigError: what was logged are no figures of an evaluation.
    """
    found: bytes | None = None
    local = folder / "evaluation" / "metrics.json"
    places = {f"{local}": local.read_bytes()} if local.is_file() else {}
    if version is not None and version.run_id == row.run_id:
        places["metrics.json in MLflow"] = tracking.run_file(version, "metrics.json")
    for place, content in places.items():
        if (digest := hashlib.sha256(content).hexdigest()) != row.metrics_sha256:
            raise LineageError(
                f"{place} was changed since it was logged: its hash is {digest[:12]}, the ledger says "
                f"{row.metrics_sha256[:12]}."
            )
        found = content
    if found is None:
        raise LineageError(f"The figures of {folder.name} are neither in {local} nor in MLflow: restore one of them.")
    return parse(Evaluation, found, f"metrics.json of {folder.name}")


def tampered(
    ledger: Ledger, row: Registration, erasure: str, version: AdapterVersion | None, metrics: Evaluation
) -> list[str]:
    """Where MLflow or a file says something else today than the chain says was so: a sentence each.

    The gate's thresholds in ``spec.yaml`` are not among it: they decide nothing once a version is registered.
    """
    odd = []
    folder = ERASURES / erasure
    if (folder / "spec.yaml").is_file() and request_sha256(folder) != row.request_sha256:
        odd.append(f"{folder}/spec.yaml was changed since the erasure was registered")
    if version is None:
        return odd
    which = {"run_id": row.run_id, "adapter_sha256": row.adapter_sha256, "base_sha256": row.base_sha256}
    which |= {"kind": row.kind, "gate": _verdict(ledger, row, erasure)}
    decision = decision_of(ledger, row, erasure)
    which |= {"decision": decision.reason if decision else ""}
    odd += [
        f"MLflow's {name} of the version is {getattr(version, name)[:60]!r}, logged was {said[:60]!r}"
        for name, said in which.items()
        if getattr(version, name) != said
    ]
    if version.run_id != row.run_id:
        return odd
    attacks = attacks_of(ledger, row, erasure, metrics)
    return odd + _shown(version, metrics, attacks) + _run(version, row, metrics, attacks)


def _verdict(ledger: Ledger, row: Registration, erasure: str) -> str:
    since = [one for one in rows_of(ledger, erasure) if one.event == REJUDGED]
    since = [one for one in since if one.details.get("adapter_sha256") == row.adapter_sha256]
    return str(since[-1].details["verdict"]) if since else row.verdict


def _shown(version: AdapterVersion, metrics: Evaluation, attacks: Attacks) -> list[str]:
    """Figures on the version's page."""
    unjudged = metrics.gate.verdict == tracking.UNJUDGED
    logged = {name: None if unjudged else found.value for name, found in metrics.report.after.rates.items()}
    odd = []
    for name, value in {**logged, "drift": metrics.drift}.items():
        now: float | None = getattr(version, name)
        alike = now is value if now is None or value is None else math.isclose(now, value, abs_tol=5.1e-5)
        if not alike:
            here, then = (tracking.UNJUDGED if one is None else f"{one:.4f}" for one in (now, value))
            odd.append(f"MLflow's {name} of the version is {here}, logged was {then}")
    shown, inversion = version.inversion, attacks.get("inversion")
    if shown is not None and (inversion is None or not math.isclose(shown, inversion.value, abs_tol=5.1e-5)):
        said = "none" if inversion is None else inversion.value
        odd.append(f"MLflow's inversion of the version is {shown:.4f}, logged was {said}")
    return odd


def _run(version: AdapterVersion, row: Registration, metrics: Evaluation, attacks: Attacks) -> list[str]:
    """Figures, settings and code that the version's run names."""
    today = tracking.run_record(version)
    known = {name: value for name, value in attacks.flat().items() if value is not None}
    figures = {**flat_figures(metrics, {}), **known}
    odd = [
        f"MLflow's figure {name} of the run is {today.metrics[name]:.6g}, logged was {value:.6g}"
        for name, value in figures.items()
        if name in today.metrics and not math.isclose(today.metrics[name], value, rel_tol=1e-9, abs_tol=1e-12)
    ]
    odd += [
        f"MLflow's run has the attack {name.removeprefix('base_')}, and the log has not"
        for name in today.metrics
        if name.startswith("base_")
        and name.removeprefix("base_") not in JUDGED
        and name not in figures
        and not name.endswith(("_low", "_high"))
    ]
    odd += [
        f"MLflow's parameter {step}.{key} of the run is {today.params[f'{step}.{key}'][:60]!r}, logged was {value!r}"
        for step, settings in row.parameters.items()
        if isinstance(settings, Mapping)
        for key, value in settings.items()
        if f"{step}.{key}" in today.params and today.params[f"{step}.{key}"] != as_param(value)
    ]
    code = {"git.commit": row.code["commit"], **{n: v for n, v in row.code.items() if n.startswith("library.")}}
    return odd + [
        f"MLflow's {name} of the run is {today.tags[name][:60]!r}, logged was {said[:60]!r}"
        for name, said in code.items()
        if name in today.tags and today.tags[name] != said
    ]
