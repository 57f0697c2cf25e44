"""Who wants a version live, and whether it may be: by what was logged when it was measured.

MLflow's tags, parameters and aliases can be edited by whoever reaches its page, and files by whoever works on this
machine. So a version is held against the ledger's chained log: what the ledger did not register is refused, the gate
judges by the thresholds logged at registration, and a decision or an approval counts under the name it was logged with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fade.adapters.card import CARD_NAME, load_card
from fade.adapters.manifest import LiveAdapter
from fade.config import Gate
from fade.errors import ConfigError, LineageError, RefusedError, listing
from fade.evaluation.attacked import Attacks
from fade.evaluation.gate import verdict
from fade.evaluation.measured import Evaluation
from fade.evaluation.records import parse
from fade.evaluation.verdicts import Verdict
from fade.files import sha256_file
from fade.requests.ledger import Ledger
from fade.requests.records import Entry
from fade.requests.states import State
from fade.spec import Spec, load_spec
from flows.account import this_user
from flows.settings import ERASURES
from tasks.mlflow import tracking, version_page
from tasks.mlflow.registration import (
    DECIDED,
    Registration,
    attacks_of,
    check_reason,
    decision_of,
    registration_of,
    registrations,
    request_sha256,
)
from tasks.mlflow.tracking import DECISION_TAG, MODEL_PREFIX, AdapterVersion

APPROVED, TAKEN_BACK = "approved", "taken_back"
"""Events of the log: a person approved a version, or took it back, by a command."""
UNKNOWN = "unknown: alias set in MLflow"
UNKNOWN_BACK = "unknown: alias removed in MLflow"


@dataclass(frozen=True, slots=True)
class Approved:
    """An approved version that may go live: its checks passed.

    Attributes:
        name: as the manifest calls it, ``erasure-<id>/<version>``.
        gate: what it is judged by: the thresholds that were logged when it was registered.
        folder: its erasure.
        adapter: its registered files.
        decided: the verdict that a person let it pass with, by the log; empty if the gate decided.
    """

    name: str
    adapter_sha256: str
    base_sha256: str
    spec: Spec
    gate: Gate
    folder: Path
    adapter: Path
    decided: str = ""

    @property
    def model(self) -> str:
        """Its registered model."""
        return self.name.partition("/")[0]

    @property
    def concepts(self) -> frozenset[str]:
        """What it erases."""
        return frozenset(pair.concept for pair in self.spec.pairs)


def named(version: AdapterVersion) -> str:
    """``erasure-<id>/<version>``."""
    return f"{version.model}/{version.version}"


def approve(name: str, number: int | None = None, *, because: str = "", actor: str | None = None) -> AdapterVersion:
    """A person approves a version: checked, logged with who and why, then its alias ``approved`` is set.

    Args:
        because: why a person lets a version pass whose gate does not decide; it names nobody.
        actor: who approves; the account that runs this program if None.

    Raises:
        FadeError: it may not go live, and why.
    """
    version, actor = tracking.find_version(name, number), actor or this_user()
    details = {"version": version.version, "adapter_sha256": version.adapter_sha256}
    with Ledger() as ledger:
        row = registration_of(ledger, version)
        if because:
            said = check_reason(because, load_spec(ERASURES / version.erasure))
            gate = judged(ledger, row, version.erasure, tracking.run_file(version, "metrics.json"))
            if gate.for_a_person:
                made = {**details, "verdict": gate.verdict, "metrics_sha256": row.metrics_sha256}
                ledger.append(DECIDED, actor=actor, reason=said, erasure_id=version.erasure, details=made)
                version_page.tag_version(version, {DECISION_TAG: said})
        check_version(version)
        ledger.append(APPROVED, actor=actor, erasure_id=version.erasure, details=details)
    return tracking.approve(version.model, version.version)


def rollback(name: str, to: int | None = None, *, actor: str | None = None) -> AdapterVersion:
    """A person takes an approved version back: logged, then its alias is removed, or moved to version ``to``.

    Raises:
        RegistryError: unknown, or nothing of this model is approved.
        FadeError: ``to`` may not go live.
    """
    model = tracking.find_version(name).model
    if to is not None:
        return approve(model, to, actor=actor)
    approved = [version for version in tracking.versions() if version.model == model and version.live]
    for version in approved:
        details = {"version": version.version, "adapter_sha256": version.adapter_sha256}
        with Ledger() as ledger:
            ledger.append(TAKEN_BACK, actor=actor or this_user(), erasure_id=version.erasure, details=details)
    return tracking.rollback(model)


def note_attacks(folder: Path, found: Attacks) -> Verdict | None:
    """Log figures of attacks on a registered erasure, show them, and judge it anew if its gate asks for attacks.

    Returns:
        What the gate says now; None if it asks for no attacks.

    Raises:
        RegistryError: it is not registered.
        LineageError: the ledger did not register this adapter.
    """
    sha256 = load_card(folder / "adapter")["adapter_sha256"]
    same = [one for one in tracking.versions() if one.erasure == folder.name and one.adapter_sha256 == sha256]
    version = ([one for one in same if tracking.is_registered(one)] or [tracking.find_version(folder.name)])[-1]
    with Ledger() as ledger:
        row = registration_of(ledger, version)
        if row.adapter_sha256 != sha256:
            raise LineageError(f"{folder} holds another adapter than was registered: its attacks are not logged.")
    sheet = folder / "attacks" / "sheet.png"
    version_page.log_attack(version, found, sheet if sheet.is_file() else None)
    if not row.thresholds.attacks:
        return None
    with Ledger() as ledger:
        gate = judged(ledger, row, version.erasure, tracking.run_file(version, "metrics.json"))
    version_page.record_verdict(version, gate.verdict)
    return gate


def who(rows: Sequence[Entry], version: int, *, live: bool) -> str:
    """Who wanted a version live, or out, by the log's rows of its erasure; an alias set in MLflow's page names nobody.

    An approval counts until the version went out, a taking back until it was approved again.
    """
    events = (APPROVED, TAKEN_BACK, "release.rolled_back" if live else "release.live")
    made = [row for row in rows if row.event in events and row.details.get("version") == version]
    if made and made[-1].event == (APPROVED if live else TAKEN_BACK):
        return made[-1].actor
    return UNKNOWN if live else UNKNOWN_BACK


def check_version(version: AdapterVersion) -> Approved:
    """Check that a version may go live, by what was measured and logged and not by its tags.

    Raises:
        FadeError: the ledger did not register it, its gate failed, a file was changed, nobody wants it any more, or its
            erasure is not on this machine.
    """
    if version.fault:
        raise LineageError(f"{version.fault} Run the erasure again.")
    with Ledger() as ledger:
        row = registration_of(ledger, version)
        adapter = tracking.fetch_adapter(version)
        if (card := sha256_file(adapter / CARD_NAME)) != row.card_sha256:
            raise LineageError(
                f"Its card was changed since it was logged: its hash is {card[:12]}, the ledger says "
                f"{row.card_sha256[:12]}. Run the erasure again."
            )
        gate = judged(ledger, row, version.erasure, tracking.run_file(version, "metrics.json"))
        _check_gate(version, gate, decided=decision_of(ledger, row, version.erasure) is not None)
        _check_wanted(ledger, version.erasure)
        return as_approved(ledger, named(version), row, adapter)


def as_approved(ledger: Ledger, name: str, row: Registration, adapter: Path) -> Approved:
    """A registered version whose adapter's files are there, with its erasure's spec as it was registered.

    Raises:
        ConfigError: the erasure is not on this machine.
        LineageError: its spec was changed since it was registered.
    """
    folder = ERASURES / name.partition("/")[0].removeprefix(MODEL_PREFIX)
    if not (folder / "spec.yaml").is_file():
        raise ConfigError(f"The erasure's folder {folder} is not on this machine. Release it where it was made.")
    if request_sha256(folder) != row.request_sha256:
        raise LineageError(
            f"{folder}/spec.yaml was changed since the erasure was registered. Put back the file as it was."
        )
    spec, decision = load_spec(folder), decision_of(ledger, row, folder.name)
    decided = "" if decision is None else str(decision.details["verdict"])
    return Approved(name, row.adapter_sha256, row.base_sha256, spec, row.thresholds, folder, adapter, decided)


def still_live(ledger: Ledger, entry: LiveAdapter, adapter: Path) -> Approved:
    """What a signed manifest says is live: its files are the release's own, what it was judged by is the ledger's.

    Raises:
        LineageError: the ledger did not register it, or its spec was changed.
        ConfigError: its erasure is not on this machine.
    """
    model, _, number = entry.name.partition("/")
    rows = [row for row in registrations(ledger, model.removeprefix(MODEL_PREFIX)) if str(row.version) == number]
    if not rows or rows[-1].adapter_sha256 != entry.adapter_sha256:
        raise LineageError(f"The ledger did not register the adapter {entry.adapter_sha256[:12]} as {entry.name}.")
    return as_approved(ledger, entry.name, rows[-1], adapter)


def judged(ledger: Ledger, row: Registration, erasure: str, content: bytes) -> Verdict:
    """What the gate says of figures, by the thresholds that were logged, with the attacks that were logged since.

    Args:
        content: of ``metrics.json``.

    Raises:
        LineageError: these are not the figures that were logged.
        ConfigError: they are none that an evaluation gives.
    """
    if (found := hashlib.sha256(content).hexdigest()) != row.metrics_sha256:
        raise LineageError(
            f"The run's metrics.json was changed since it was logged: its hash is {found[:12]}, the ledger says "
            f"{row.metrics_sha256[:12]}. Run the erasure again."
        )
    metrics = parse(Evaluation, content, f"metrics.json of {erasure}")
    return verdict(metrics.report, row.thresholds, attacks_of(ledger, row, erasure, metrics))


def _check_gate(version: AdapterVersion, gate: Verdict, *, decided: bool) -> None:
    if gate.for_a_person:
        if decided:
            return  # a person let it pass, with a reason in the log
        # What to do comes first: reasons may be many, and a page has room for so much.
        raise RefusedError(
            f"The gate is {gate.verdict}. Read its report, then approve it with `fade approve ID --because "
            "'your reason'`, which is logged; a reason on its page alone counts for nothing. Why it is "
            f"{gate.verdict}: {'; '.join(gate.reasons)}."
        )
    if not gate.passed:
        said = "" if version.gate != "passed" else " (its tag says that it passed)"
        raise RefusedError(f"The gate failed{said}: {'; '.join(gate.reasons)}.")
    if version.gate != "passed":
        raise RefusedError(f"Its tag says that the gate {version.gate}, its figures that it passed. Register it again.")


def _check_wanted(ledger: Ledger, erasure: str) -> None:
    """Somebody still wants it."""
    requests = ledger.find(erasure_id=erasure)
    stopped = [one for one in requests if one.state in (State.CANCELLED, State.ON_HOLD)]
    if requests and len(stopped) == len(requests):
        said = (f"{one.id} is {'cancelled' if one.state is State.CANCELLED else 'on hold'}" for one in stopped)
        raise RefusedError(
            f"The ledger stops it: request {listing(said)}. Release the hold, or submit a new request for it."
        )
