"""Gather what an erasure's evidence says, and seal it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fade.config import Request, Settings, load_request
from fade.errors import ConfigError, DataError
from fade.requests.evidence import chain_rows, seal
from fade.requests.ledger import Ledger
from fade.signing import signing_key
from fade.steps.attacks import attack_figures
from flows.approval import named
from flows.purge import state_of
from flows.released import KEYS
from tasks import _tracking, _versioning
from tasks._tracking import MODEL_PREFIX, AdapterVersion

EVIDENCE = Path("data/evidence")


def gather(name: str, ledger: Ledger) -> tuple[str, dict[str, Any]]:
    """The id of the erasure and the content of its evidence, without names.

    Args:
        name: a request's id in the ledger, or an erasure's id.

    Raises:
        DataError: the request has no erasure yet.
        RegistryError: the erasure is not registered.
    """
    erasure = name.removeprefix(MODEL_PREFIX)
    requests = ledger.find(erasure_id=erasure)
    if not requests and "-" in erasure:
        record = ledger.get(erasure)
        if record.erasure_id is None:
            raise DataError(f"Request {record.id} is {record.state}: it has no erasure to give evidence of yet.")
        erasure, requests = record.erasure_id, ledger.find(erasure_id=record.erasure_id)
    version = _tracking.find_version(erasure)
    folder = Path("data/erasures") / erasure
    if not (folder / "request.yaml").is_file():
        raise ConfigError(f"{folder} is not on this machine: seal the evidence where the erasure was made.")
    request, tags = load_request(folder), _tracking.run_tags(version)
    report = ledger.verify()
    rows = chain_rows(ledger, erasure_id=erasure, requests=[one.id for one in requests])
    return erasure, {
        "erasure": {"id": erasure, "version": named(version), "kind": version.kind, "release": version.release},
        "sealed_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "requests": [
            {
                "id": one.id,
                "regulation": one.regulation,
                "received": one.received_at.isoformat(),
                "due": one.due_at.isoformat(),
                "extended": one.extended,
                "state": str(one.state),
                "since": one.state_at.isoformat(),
            }
            for one in requests
        ],
        "metrics": _metrics(version, request),
        "attacks": _attacks(version, folder),
        "approvals_and_deployments": [
            {"at": row["at"], "event": row["event"], "by": row["actor"], "details": row["details"]}
            for row in rows
            if row["event"].startswith("release.")
        ],
        "purge": _purged(folder),
        "code": {
            "commit": tags.get("git.commit", "unknown"),
            "commit_holds_all_the_code": tags.get("git.dirty") == "false",
            **{name: tag for name, tag in tags.items() if name.startswith("library.")},
        },
        "base_sha256": version.base_sha256,
        "adapter_sha256": version.adapter_sha256,
        "data_hashes_md5": _versioning.lock_record(folder),
        "parameters": {step: getattr(request, step).model_dump(mode="json") for step in _steps(request)},
        "chain": {"rows_in_all": report.rows, "head": report.head, "rows": rows},
    }


def seal_evidence(name: str, ledger: Ledger) -> tuple[Path, dict[str, Any]]:
    """Seal the evidence of a request or erasure under ``data/evidence/<erasure>/``, and log that it was."""
    erasure, content = gather(name, ledger)
    folder = EVIDENCE / erasure
    sha256 = seal(folder, content, signing_key(KEYS))
    ledger.append("evidence", actor="fade", erasure_id=erasure, details={"sha256": sha256})
    return folder, content


def _steps(request: Request) -> list[str]:
    return [name for name in Settings.model_fields if hasattr(getattr(request, name), "model_dump")]


def _metrics(version: AdapterVersion, request: Request) -> dict[str, Any]:
    """Figures against their thresholds, with intervals; concepts by number."""
    report = json.loads(_tracking.run_file(version, "metrics.json"))["judges"]["report"]
    before, after = report["before"], report["after"]
    asked: Mapping[str, float] = {
        "ua": request.gate.ua,
        "ira": before["ira"]["value"] - request.gate.ira_loss,
        "cra": before["cra"]["value"] - request.gate.cra_loss,
    }
    figures = [
        {"figure": name.upper(), "base": before[name]["value"], "erased": after[name]["value"]}
        | {
            "low_95": after[name]["low"],
            "high_95": after[name]["high"],
            "asked": least,
            "pictures": after[name]["count"],
        }
        for name, least in asked.items()
    ]
    figures += [
        {"figure": f"UA of concept {number}", "base": None, "erased": one["ua"]["value"]}
        | {"low_95": one["ua"]["low"], "high_95": one["ua"]["high"], "asked": request.gate.ua}
        | {"pictures": one["ua"]["count"]}
        for number, one in enumerate(after["erased"].values(), start=1)
    ]
    return {"gate": version.gate, "judge": "report", "figures": figures, "drift": version.drift}


def _attacks(version: AdapterVersion, folder: Path) -> list[dict[str, Any]]:
    """Every attack that was run; a purge takes the erasure's own files of them, MLflow keeps the figures."""
    figures = {**_tracking.run_metrics(version), **attack_figures(folder)}
    names = sorted(name for name in figures if {f"base_{name}", f"{name}_low"} <= figures.keys())
    names = [name for name in names if name not in _tracking.JUDGED]
    return [
        {"attack": name, "brought_back": figures[name], "low_95": figures[f"{name}_low"]}
        | {"high_95": figures.get(f"{name}_high"), "on_the_base": figures[f"base_{name}"]}
        for name in names
    ]


def _purged(folder: Path) -> dict[str, Any]:
    state, receipts = state_of(folder)
    if state == "not purged":
        return {"state": state}
    removed = [one for one in receipts if one["removed"]]
    kept = [one for one in receipts if not one["removed"]]
    return {"state": state, "removed": len(removed), "kept_for_other_erasures": len(kept), "receipts": receipts}
