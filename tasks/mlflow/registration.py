"""What the ledger logged of a registered version: the only source for what may go live and for evidence.

MLflow's tags, parameters and files can be edited by whoever may write to it, and files on a disk by whoever works
there. So an adapter's hash, its figures' hash, the thresholds it was judged by, its settings, the code and the base are
hashed into the ledger's chain when it is registered, and later figures and decisions when they are made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fade.adapters.card import CARD_NAME, load_card
from fade.config import Gate, Settings
from fade.errors import ConfigError, LineageError
from fade.evaluation.attacked import Attacks
from fade.evaluation.measured import Evaluation
from fade.evaluation.records import load, parse
from fade.files import read_yaml, sha256_file
from fade.lineage import git_state, library_versions
from fade.requests.ledger import Ledger
from fade.requests.records import Entry
from fade.spec import Spec, load_spec

if TYPE_CHECKING:
    from tasks.mlflow.tracking import AdapterVersion

REGISTERED, ATTACKED, REJUDGED, DECIDED = "registered", "attacked", "judged", "gate_decision"
"""Events of the log: a version, figures of attacks run later, what its gate says since, why a person let it pass."""
_EVERYTHING = 2**31
_WHICH = ("version", "run_id", "adapter_sha256", "card_sha256", "metrics_sha256", "request_sha256")


@dataclass(frozen=True, slots=True)
class Registration:
    """A row of the log, as a version was registered.

    Attributes:
        run_id: MLflow's run of it.
        request_sha256: of ``spec.yaml`` without the gate's thresholds, which stand in ``gate``.
        metrics_sha256: of ``metrics.json``, which holds every figure and the gate's verdict.
        verdict: of the gate when it was registered.
        code: commit, whether it holds all the code, and versions of libraries.
        parameters: settings of each step.
        data_md5: DVC's hash of each output.
    """

    version: int
    run_id: str
    adapter_sha256: str
    card_sha256: str
    base_sha256: str
    kind: str
    request_sha256: str
    metrics_sha256: str
    gate: dict[str, Any]
    verdict: str
    code: dict[str, str]
    parameters: dict[str, Any]
    data_md5: dict[str, str]

    @property
    def thresholds(self) -> Gate:
        """What it was judged by, and is judged by for ever."""
        return Gate(**self.gate)


def log_registration(version: AdapterVersion, folder: Path, spec: Spec, *, data_md5: Mapping[str, str]) -> bool:
    """Write a version into the ledger's log, once; gives whether it was written now.

    Raises:
        LineageError: the adapter in the folder is another one than the version's.
    """
    card = load_card(folder / "adapter")
    if card["adapter_sha256"] != version.adapter_sha256:
        raise LineageError(f"{folder} holds another adapter than {version.model} version {version.version}.")
    metrics = folder / "evaluation" / "metrics.json"
    state = git_state()
    row = Registration(
        version=version.version,
        run_id=version.run_id,
        adapter_sha256=version.adapter_sha256,
        card_sha256=sha256_file(folder / "adapter" / CARD_NAME),
        base_sha256=spec.base_sha256,
        kind=kind_of(spec),
        request_sha256=request_sha256(folder),
        metrics_sha256=sha256_file(metrics),
        gate=spec.gate.model_dump(mode="json"),
        verdict=load(Evaluation, metrics).gate.verdict,
        code={
            "commit": state["commit"],
            "commit_holds_all_the_code": str(state["dirty"] == "false").lower(),
            **{f"library.{name}": number for name, number in library_versions().items()},
        },
        parameters=parameters_of(spec),
        data_md5=dict(data_md5),
    )
    with Ledger() as ledger:
        same = [one for one in registrations(ledger, folder.name) if _which(one) == _which(row)]
        if not same:
            details = {field.name: getattr(row, field.name) for field in fields(row)}
            ledger.append(REGISTERED, actor="fade", erasure_id=folder.name, details=details)
    return not same


def _which(row: Registration) -> tuple[Any, ...]:
    return tuple(getattr(row, name) for name in _WHICH)


def kind_of(spec: Spec) -> str:
    """What is erased, as a tag may say it: ``person``, ``object``, ``style``, or several of them."""
    kinds = dict.fromkeys("person" if pair.person else pair.kind for pair in spec.pairs)
    return ", ".join(kinds)


def parameters_of(spec: Spec) -> dict[str, Any]:
    """Settings of each step; they name nobody."""
    settings = {name: getattr(spec, name) for name in Settings.model_fields}
    return {
        name: value.model_dump(mode="json") if hasattr(value, "model_dump") else value
        for name, value in settings.items()
    }


def as_param(value: Any) -> str:
    """A setting as a run's parameter: one spelling, whatever the order its parts were kept in."""
    return json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else str(value)


def request_sha256(folder: Path) -> str:
    """Hash of an erasure's request as its file says it, without the gate's thresholds."""
    content = {key: value for key, value in read_yaml(folder / "spec.yaml").items() if key != "gate"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def check_request(folder: Path) -> None:
    """Refuse to go on with an erasure whose request was edited after it was registered.

    Raises:
        LineageError: says what was changed.
    """
    with Ledger() as ledger:
        found = registrations(ledger, folder.name)
    if not found:
        return
    if found[-1].request_sha256 != request_sha256(folder):
        raise LineageError(
            f"{folder}/spec.yaml was changed since the erasure was registered. Make a new request for what you want."
        )
    if found[-1].thresholds != load_spec(folder).gate:
        raise LineageError(
            f"The gate in {folder}/spec.yaml was changed since the erasure was registered: it is judged by the "
            "thresholds that it was asked with. Make a new request for others."
        )


def rows_of(ledger: Ledger, erasure: str) -> list[Entry]:
    """All rows of an erasure, oldest first."""
    return ledger.history(erasure_id=erasure, limit=_EVERYTHING)


def registrations(ledger: Ledger, erasure: str) -> list[Registration]:
    """What the ledger registered of an erasure, oldest first; a row that does not say all of it is none."""
    names = {field.name for field in fields(Registration)}
    rows = [row.details for row in rows_of(ledger, erasure) if row.event == REGISTERED]
    return [Registration(**details) for details in rows if names == details.keys()]


def registration_of(ledger: Ledger, version: AdapterVersion) -> Registration:
    """The row of a version.

    Raises:
        LineageError: the ledger did not register it, or registered something else as it; says which.
    """
    rows = [row for row in registrations(ledger, version.erasure) if row.version == version.version]
    if not rows:
        raise LineageError(
            f"The ledger did not register {version.model} version {version.version}: nothing says what it is and what "
            "was measured. If it is your own, run the erasure again; if not, somebody else made it: delete it."
        )
    row = rows[-1]
    for name, said, found in (
        ("the adapter", row.adapter_sha256, version.adapter_sha256),
        ("the base", row.base_sha256, version.base_sha256),
        ("the run", row.run_id, version.run_id),
    ):
        if said != found:
            raise LineageError(
                f"The ledger logged {name} {said[:12]} as {version.model} version {version.version}, the registry has "
                f"{found[:12]}. Run the erasure again."
            )
    return row


def attacks_of(ledger: Ledger, row: Registration, erasure: str, metrics: Evaluation) -> Attacks:
    """A version's attacks: those in its hashed figures, and those logged when they were run later.

    What was measured before registration is not measured away afterwards.
    """
    found = Attacks({})
    for entry in rows_of(ledger, erasure):
        if entry.event == ATTACKED and entry.details.get("adapter_sha256") == row.adapter_sha256:
            found |= parse(Attacks, json.dumps(entry.details["figures"]), f"the ledger's row {entry.seq}")
    return found | metrics.attacks


def decision_of(ledger: Ledger, row: Registration, erasure: str) -> Entry | None:
    """The last decision of a person to let a version pass; what MLflow's page says of one counts for nothing."""
    made = [
        entry
        for entry in rows_of(ledger, erasure)
        if entry.event == DECIDED
        and entry.details.get("version") == row.version
        and entry.details.get("adapter_sha256") == row.adapter_sha256
        and entry.details.get("metrics_sha256") == row.metrics_sha256
    ]
    return made[-1] if made else None


def check_reason(reason: str, spec: Spec) -> str:
    """A person's reason, if it can stand in the log for ever.

    Raises:
        ConfigError: it is empty, or names what is erased.
    """
    said = " ".join(reason.split())
    if not said:
        raise ConfigError("A decision needs a reason: say what you saw and why it passes.")
    names = [name for pair in spec.pairs for name in pair.names if pair.person]
    if any(name.casefold() in said.casefold() for name in names):
        raise ConfigError("The reason names somebody, and the log can never be changed: say it without the name.")
    return said
