"""Whether an approved version may go live, by what was measured and logged; tags can be edited by anyone."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from fade.adapters.card import load_card
from fade.config import Request, load_request
from fade.errors import ConfigError, LineageError, RefusedError, listing
from fade.files import read_json
from fade.requests.ledger import Ledger
from fade.requests.states import State
from fade.steps.evaluate import judge_gate
from flows.settings import ERASURES
from tasks import _tracking
from tasks._tracking import MODEL_PREFIX, AdapterVersion
from tasks.erasure import REGISTERED


@dataclass(frozen=True, slots=True)
class Approved:
    """An approved version that may go live: its checks passed.

    Attributes:
        folder: its erasure.
        adapter: its registered files.
    """

    version: AdapterVersion
    request: Request
    folder: Path
    adapter: Path

    @property
    def name(self) -> str:
        """As the manifest calls it."""
        return named(self.version)

    @property
    def concepts(self) -> frozenset[str]:
        """What it erases."""
        return frozenset(pair.concept for pair in self.request.pairs)


def named(version: AdapterVersion) -> str:
    """``erasure-<id>/<version>``."""
    return f"{version.model}/{version.version}"


def check_version(version: AdapterVersion) -> Approved:
    """Check that a version may go live, by what was measured and logged and not by its tags.

    Raises:
        FadeError: its gate failed, a file was changed, nobody wants it any more, or its erasure is not on this machine.
    """
    adapter = _tracking.fetch_adapter(version)
    folder = ERASURES / version.model.removeprefix(MODEL_PREFIX)
    if not (folder / "request.yaml").is_file():
        raise ConfigError(f"The erasure's folder {folder} is not on this machine. Release it where it was made.")
    request = load_request(folder)
    card = load_card(adapter)
    if not card["base_sha256"] == version.base_sha256 == request.base_sha256:
        raise LineageError(
            f"Its tag names the base {version.base_sha256[:12]}, its card {card['base_sha256'][:12]}, its request "
            f"{request.base_sha256[:12]}. Run the erasure again."
        )
    metrics = _tracking.run_file(version, "metrics.json")
    _check_gate(version, request, folder, metrics)
    _check_ledger(version, folder.name, metrics)
    return Approved(version, request, folder, adapter)


def _check_gate(version: AdapterVersion, request: Request, folder: Path, content: bytes) -> None:
    """The gate, judged anew from the figures of the run; a tag can be edited by anyone who sees the page."""
    try:
        metrics = json.loads(content)
        report = metrics["judges"]["report"]
        if request.gate.attacks:
            # Those that were run before registration are in the file whose hash was logged: they win.
            report = {**report, "attacks": {**_tracking.run_metrics(version), **metrics.get("attacks", {})}}
        gate = judge_gate(report, request.gate)
        measured = metrics["adapter_sha256"]
    except (ValueError, KeyError, TypeError):
        raise LineageError("The run's metrics.json was changed: it is no evaluation. Run the erasure again.") from None
    if measured != version.adapter_sha256:
        raise LineageError(
            f"The run's metrics.json is of the adapter {measured[:12]}, not {version.adapter_sha256[:12]}."
        )
    local = folder / "evaluation" / "metrics.json"
    if local.is_file() and read_json(local)["adapter_sha256"] == measured and local.read_bytes() != content:
        raise LineageError(f"The run's metrics.json is not the one in {local.parent}: one of them was changed.")
    if gate["verdict"] in _tracking.TO_DECIDE and version.decision:
        return  # a person let it pass, with a reason on its page
    if not gate["passed"]:
        said = "" if version.gate != "passed" else " (its tag says that it passed)"
        raise RefusedError(f"The gate failed{said}: {'; '.join(gate['reasons'])}.")
    if version.gate != "passed":
        raise RefusedError(f"Its tag says that the gate {version.gate}, its figures that it passed. Register it again.")


def _check_ledger(version: AdapterVersion, erasure: str, metrics: bytes) -> None:
    """Somebody still wants it, and its figures are the ones that were logged when it was registered."""
    with Ledger() as ledger:
        requests = ledger.find(erasure_id=erasure)
        logged = [row.details for row in ledger.history(erasure_id=erasure) if row.event == REGISTERED]
    stopped = [one for one in requests if one.state in (State.CANCELLED, State.ON_HOLD)]
    if requests and len(stopped) == len(requests):
        said = (f"{one.id} is {'cancelled' if one.state is State.CANCELLED else 'on hold'}" for one in stopped)
        raise RefusedError(
            f"The ledger stops it: request {listing(said)}. Release the hold, or submit a new request for it."
        )
    rows = [row for row in logged if row["version"] == version.version]
    if not rows:
        return  # made before registrations were logged, or another project's
    if rows[-1]["adapter_sha256"] != version.adapter_sha256:
        raise LineageError(
            f"The ledger logged the adapter {rows[-1]['adapter_sha256'][:12]} as this version, the registry has "
            f"{version.adapter_sha256[:12]}. Run the erasure again."
        )
    if (found := hashlib.sha256(metrics).hexdigest()) != rows[-1]["metrics_sha256"]:
        raise LineageError(
            f"The run's metrics.json was changed since it was logged: its hash is {found[:12]}, the ledger says "
            f"{rows[-1]['metrics_sha256'][:12]}. Run the erasure again."
        )
