"""Gather what an erasure's evidence says, and seal it.

Only what was hashed into the ledger's chain when it happened is sealed: the registration with figures, thresholds,
settings, code and base, attacks run later, decisions, approvals. Where MLflow or a file says something else today,
nothing is sealed, and what differs is said.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fade.errors import DataError, LineageError, listing
from fade.evaluation.asked import asked_of_rates, asked_of_ua
from fade.evaluation.attacked import Attacks
from fade.evaluation.figures import Rate
from fade.evaluation.measured import Evaluation
from fade.requests.evidence import chain_rows, seal
from fade.requests.ledger import Ledger
from fade.requests.records import Entry, Record
from fade.signing import signing_key
from flows.proving.purge import state_of
from flows.releasing.approval import APPROVED, TAKEN_BACK
from flows.releasing.reconcile import figures_of, tampered
from flows.releasing.released import KEYS, live_versions
from flows.settings import ERASURES
from tasks.mlflow import tracking
from tasks.mlflow.registration import DECIDED, REJUDGED, Registration, attacks_of, registrations, rows_of
from tasks.mlflow.tracking import MODEL_PREFIX

EVIDENCE = Path("data/evidence")


def gather(name: str, ledger: Ledger) -> tuple[str, dict[str, Any]]:
    """The id of the erasure and the content of its evidence, without names.

    Args:
        name: a request's id in the ledger, or an erasure's id.

    Raises:
        DataError: the request has no erasure yet.
        LineageError: the log is broken, it did not register the erasure, or MLflow or a file says something else than
            what was logged; names what.
    """
    erasure, requests = _which(name, ledger)
    row = _registered(ledger, erasure)
    report = ledger.verify()
    version = _version_of(erasure, row)
    metrics = figures_of(row, ERASURES / erasure, version)
    if odd := tampered(ledger, row, erasure, version, metrics):
        raise LineageError(
            f"Nothing is sealed: {listing(odd, 10)}. Evidence says only what the log says; find out who changed it "
            "(`fade reconcile` says what to do)."
        )
    rows = chain_rows(ledger, erasure_id=erasure, requests=[one.id for one in requests])
    return erasure, {
        "erasure": {
            "id": erasure,
            "version": f"{MODEL_PREFIX}{erasure}/{row.version}",
            "kind": row.kind,
            "live": row.version in live_versions(MODEL_PREFIX + erasure),
            "in_the_registry": version is not None,
        },
        "sealed_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "requests": [_request(one) for one in requests],
        "metrics": _metrics(row, metrics),
        "gate": _gate(ledger, row, erasure),
        "attacks": _attacks(attacks_of(ledger, row, erasure, metrics)),
        "approvals_and_deployments": [
            {"at": one["at"], "event": one["event"], "by": one["actor"], "details": one["details"]}
            for one in rows
            if one["event"].startswith("release.") or one["event"] in (APPROVED, TAKEN_BACK)
        ],
        "purge": _purged(ERASURES / erasure),
        "code": row.code,
        "base_sha256": row.base_sha256,
        "adapter_sha256": row.adapter_sha256,
        "metrics_sha256": row.metrics_sha256,
        "data_hashes_md5": row.data_md5,
        "parameters": row.parameters,
        "chain": {"rows_in_all": report.rows, "head": report.head, "rows": rows},
    }


def seal_evidence(name: str, ledger: Ledger) -> tuple[Path, dict[str, Any]]:
    """Seal the evidence of a request or erasure under ``data/evidence/<erasure>/``, and log that it was."""
    erasure, content = gather(name, ledger)
    folder = EVIDENCE / erasure
    sha256 = seal(folder, content, signing_key(KEYS))
    ledger.append("evidence", actor="fade", erasure_id=erasure, details={"sha256": sha256})
    return folder, content


def _which(name: str, ledger: Ledger) -> tuple[str, list[Record]]:
    erasure = name.removeprefix(MODEL_PREFIX)
    requests = ledger.find(erasure_id=erasure)
    if not requests and "-" in erasure:
        record = ledger.get(erasure)
        if record.erasure_id is None:
            raise DataError(f"Request {record.id} is {record.state}: it has no erasure to give evidence of yet.")
        erasure, requests = record.erasure_id, ledger.find(erasure_id=record.erasure_id)
    return erasure, requests


def _registered(ledger: Ledger, erasure: str) -> Registration:
    """What is live of it, or else what was registered last."""
    found = registrations(ledger, erasure)
    if not found:
        raise LineageError(
            f"The ledger did not register the erasure {erasure}: there is nothing to give evidence of. If it is your "
            "own, run the erasure again."
        )
    live = live_versions(MODEL_PREFIX + erasure)
    return ([row for row in found if row.version in live] or found)[-1]


def _version_of(erasure: str, row: Registration) -> tracking.AdapterVersion | None:
    model = MODEL_PREFIX + erasure
    found = [one for one in tracking.versions() if (one.model, one.version) == (model, row.version)]
    return found[0] if found else None


def _request(one: Record) -> dict[str, Any]:
    return {
        "id": one.id,
        "regulation": one.regulation,
        "received": one.received_at.isoformat(),
        "due": one.due_at.isoformat(),
        "extended": one.extended,
        "state": str(one.state),
        "since": one.state_at.isoformat(),
    }


def _metrics(row: Registration, metrics: Evaluation) -> dict[str, Any]:
    """Figures against the thresholds they were judged by, with intervals; concepts by number."""
    before, after, gate = metrics.report.before, metrics.report.after, row.thresholds
    figures = [
        _figure(name.upper(), before.rates[name].value, after.rates[name], least)
        for name, least in asked_of_rates(metrics.report, gate).items()
    ]
    figures += [
        _figure(f"UA of concept {number}", None, one.ua, least)
        for number, (one, least) in enumerate(
            zip(after.erased.values(), asked_of_ua(metrics.report, gate).values(), strict=False), start=1
        )
    ]
    return {"judge": "report", "figures": figures, "drift": metrics.drift}


def _figure(name: str, base: float | None, erased: Rate, asked: float) -> dict[str, Any]:
    return {
        "figure": name,
        "base": base,
        "erased": erased.value,
        "low_95": erased.low,
        "high_95": erased.high,
        "asked": asked,
        "pictures": erased.count,
    }


def _gate(ledger: Ledger, row: Registration, erasure: str) -> dict[str, Any]:
    """Thresholds, verdicts and decisions, each as it was logged."""
    rows = [one for one in rows_of(ledger, erasure) if one.details.get("adapter_sha256") == row.adapter_sha256]
    since = [{"at": one.at.isoformat(), "verdict": one.details["verdict"]} for one in rows if one.event == REJUDGED]
    return {
        "thresholds": row.gate,
        "verdict_at_registration": row.verdict,
        "verdicts_after_attacks": since,
        "decisions": [_decision(one) for one in rows if one.event == DECIDED],
    }


def _decision(made: Entry) -> dict[str, Any]:
    return {
        "at": made.at.isoformat(),
        "by": made.actor,
        "why": made.reason,
        "the_gate_said": made.details["verdict"],
    }


def _attacks(attacks: Attacks) -> list[dict[str, Any]]:
    """Every attack that was run, by the figures that were logged."""
    return [
        {
            "attack": name,
            "brought_back": found.value,
            "low_95": found.low,
            "high_95": found.high,
            "on_the_base": found.base,
        }
        for name, found in attacks.root.items()
    ]


def _purged(folder: Path) -> dict[str, Any]:
    state, receipts = state_of(folder)
    if state == "not purged":
        return {"state": state}
    removed = [one for one in receipts if one["removed"]]
    kept = [one for one in receipts if not one["removed"]]
    return {"state": state, "removed": len(removed), "kept_for_other_erasures": len(kept), "receipts": receipts}
