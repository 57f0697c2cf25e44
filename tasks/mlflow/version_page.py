"""Writing a version's page in MLflow: text, tags, figures of attacks; what counts is logged in the ledger."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fade.errors import LineageError
from fade.evaluation.attacked import Attacks
from fade.evaluation.measured import Evaluation
from fade.evaluation.records import as_json, parse
from fade.requests.ledger import Ledger
from fade.temporary import temporary_folder
from tasks.mlflow.client import STUDIES, files_of, mlflow_client, registry
from tasks.mlflow.page import ATTACK, Page, page
from tasks.mlflow.registration import ATTACKED, REJUDGED
from tasks.mlflow.tracking import APPROVED, CANDIDATE, PURGED_TAG, RELEASE_TAG, TOGETHER_TAG, AdapterVersion, run_file

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from tasks.mlflow.embedded import EmbeddedRegistry

logger = logging.getLogger(__name__)


def refresh_page(version: AdapterVersion) -> None:
    """Write a version's page anew, from what its run and its tags hold now.

    Raises:
        LineageError: its run does not hold what a registered run holds.
    """
    content = run_file(version, "metrics.json")
    with registry(writing=True) as client:
        run = client.get_run(version.run_id)
        tags = client.get_model_version(version.model, str(version.version)).tags
        try:
            metrics = parse(Evaluation, content, f"metrics.json of {version.model} version {version.version}")
            of = Page(
                metrics=metrics,
                least=_least(metrics, run.data.params),
                run=(version.run_id, run.info.experiment_id),
                tags=run.data.tags,
                files=set(files_of(client, version.run_id)),
                inversion=float(tags["inversion"]) if "inversion" in tags else None,
                together=tags.get(TOGETHER_TAG, ""),
                purged=tags.get(PURGED_TAG, ""),
                study=_newest_study(client),
            )
            said = page(of, approved=APPROVED)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LineageError(
                f"The page of {version.model} version {version.version} cannot be written: its run was changed "
                f"({type(error).__name__}: {error}). Run the erasure again."
            ) from None
        client.update_model_version(version.model, str(version.version), description=said)


def _least(metrics: Evaluation, params: Mapping[str, str]) -> dict[str, float]:
    """What the gate asks of each figure, from the run's parameters."""
    before = metrics.report.before.rates
    return {"ua": float(params["gate.ua"])} | {
        name: before[name].value - float(params[f"gate.{name}_loss"]) for name in ("ira", "cra")
    }


def _newest_study(client: MlflowClient | EmbeddedRegistry) -> tuple[str, str] | None:
    found = client.get_experiment_by_name(STUDIES)
    if found is None:
        return None
    runs = client.search_runs([found.experiment_id], order_by=["attributes.start_time DESC"], max_results=1)
    return (runs[0].info.run_id, found.experiment_id) if runs else None


def show_release(version: AdapterVersion, what: str) -> None:
    """Show on a version's page what became of its approval."""
    if what == version.release:
        return
    tag_version(version, {RELEASE_TAG: what})


def log_attack(version: AdapterVersion, attacks: Attacks, sheet: Path | None) -> None:
    """Attacks that were run on a registered version: into the ledger's log, then onto its page."""
    details = {"version": version.version, "adapter_sha256": version.adapter_sha256, "figures": as_json(attacks)}
    with Ledger() as ledger:
        ledger.append(ATTACKED, actor="fade", erasure_id=version.erasure, details=details)
    show_attack(version, attacks, sheet)


def show_attack(version: AdapterVersion, attacks: Attacks, sheet: Path | None) -> None:
    """Attacks as metrics and a picture of the version's run, and a tag for each on its page."""
    from mlflow.entities import Metric

    known = {key: float(value) for key, value in attacks.flat().items() if value is not None}
    with mlflow_client() as client, temporary_folder("attack") as folder:
        if sheet is not None:
            shutil.copyfile(sheet, folder / ATTACK)
            client.log_artifact(version.run_id, str(folder / ATTACK))
        client.log_batch(version.run_id, metrics=[Metric(key, value, 0, 0) for key, value in known.items()])
        for name, found in attacks.root.items():
            client.set_model_version_tag(version.model, str(version.version), name, f"{found.value:.4f}")
    refresh_page(version)


def record_verdict(version: AdapterVersion, verdict: str) -> None:
    """What the gate says now that attacks were run, logged and shown; the alias ``candidate`` follows it."""
    details = {"version": version.version, "adapter_sha256": version.adapter_sha256, "verdict": verdict}
    with Ledger() as ledger:
        ledger.append(REJUDGED, actor="fade", erasure_id=version.erasure, details=details)
    with registry(writing=True) as client:
        client.set_model_version_tag(version.model, str(version.version), "gate", verdict)
        if verdict == "passed":
            client.set_registered_model_alias(version.model, CANDIDATE, str(version.version))
        elif CANDIDATE in version.aliases:
            client.delete_registered_model_alias(version.model, CANDIDATE)


def tag_version(version: AdapterVersion, tags: Mapping[str, str]) -> None:
    """Set tags of a version."""
    with registry(writing=True) as client:
        for name, value in tags.items():
            client.set_model_version_tag(version.model, str(version.version), name, value)


def show_together(version: AdapterVersion, what: str) -> None:
    """Show on a version's page how it did together with everything live."""
    with registry(writing=True) as client:
        if client.get_model_version(version.model, str(version.version)).tags.get(TOGETHER_TAG) == what:
            return
        client.set_model_version_tag(version.model, str(version.version), TOGETHER_TAG, what)
    refresh_page(version)


def show_purged(version: AdapterVersion, what: str) -> None:
    """Show on a version's page that its data was purged, and nothing that is gone."""
    with registry(writing=True) as client:
        client.set_model_version_tag(version.model, str(version.version), PURGED_TAG, what)
    try:
        refresh_page(version)
    except LineageError as error:  # a run that somebody changed holds up no purge
        logger.warning("%s", error)
