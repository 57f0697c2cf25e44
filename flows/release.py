"""Flow ``release``: what a person approved in MLflow goes live, what was taken back goes out.

MLflow's alias ``approved`` says what a person wants, the signed manifest what is. ``reconcile`` brings the
second to the first: it takes out at once what is no longer approved, checks what is new (hash, gate, erasure's
folder), tests it together with all that is live, and publishes. What may not go live says so on its version's
page (tag ``release``) and stays out. Every base has its own release folder.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock
from prefect import flow

from fade.adapters.manifest import MANIFEST_NAME, LiveAdapter, Manifest, live_folder, publish, read_manifest
from fade.adapters.store import load_card
from fade.config import Request, load_request
from fade.errors import ConfigError, FadeError, LineageError, RefusedError, listing
from fade.evaluation.gate import strictest
from fade.files import read_json, sha256_file
from fade.lineage import module_closure
from fade.requests.ledger import Ledger
from fade.requests.states import TRANSITIONS, State
from fade.signing import signing_key
from fade.steps.combine import combine
from fade.steps.evaluate import judge_gate
from flows.erase import ERASURES
from tasks import _tracking
from tasks._tracking import MODEL_PREFIX, AdapterVersion

RELEASES, KEYS, COMBINATIONS = Path("data/release"), Path(".fade/keys"), Path("data/combinations")
LIVE, GONE = "live", "rolled back"
REGISTRY = "an alias in the registry"
"""Who acted, where MLflow does not say who set an alias."""
_LONGEST = 500
"""Characters of a tag's reason."""


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


@dataclass(frozen=True, slots=True)
class Change:
    """What one look at the registry came to, for one base.

    Attributes:
        live: names in the manifest, in order.
        added: of those, what is new.
        removed: names that were taken out.
        refused: name to the reason why it stays out.
        waiting: name to what it waits for.
    """

    base_sha256: str
    folder: Path
    counter: int
    live: tuple[str, ...]
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)
    waiting: dict[str, str] = field(default_factory=dict)


def named(version: AdapterVersion) -> str:
    """``erasure-<id>/<version>``."""
    return f"{version.model}/{version.version}"


def release_folder(base_sha256: str) -> Path:
    """The release of a base."""
    return RELEASES / base_sha256[:12]


def current_manifest(folder: Path) -> Manifest | None:
    """The manifest of a release folder, checked with this project's key; None if nothing was released there.

    Raises:
        SignatureError: it is there, and it is not ours.
    """
    if not (folder / MANIFEST_NAME).exists():
        return None
    return read_manifest(folder, signing_key(KEYS).public_key())


def released() -> dict[Path, Manifest]:
    """Every release folder and its manifest."""
    found = {folder: current_manifest(folder) for folder in sorted(RELEASES.glob("*")) if folder.is_dir()}
    return {folder: manifest for folder, manifest in found.items() if manifest is not None}


@flow(name="release", flow_run_name="release")
def release() -> list[Change]:
    """One look at the registry, for a schedule; ``fade release --watch`` looks every second."""
    return reconcile()


def reconcile(
    *,
    valid_seconds: int = 0,
    consolidate: bool = True,
    between: Callable[[], None] | None = None,
    actor: str = REGISTRY,
) -> list[Change]:
    """Bring every base's release to what is approved now. Needs no Prefect: a rollback must not wait for it.

    Args:
        valid_seconds: how long runtimes may use the manifests; 0 for without end.
        consolidate: distil what fails together into one adapter, in a process of its own.
        between: called while a combination is tested, batch by batch.
        actor: who approved, for the log.

    Raises:
        RegistryError: MLflow cannot be asked. Releases are then as they were, or less.
        SignatureError: a manifest that is there is not ours.
    """
    RELEASES.mkdir(parents=True, exist_ok=True)
    with FileLock(str(RELEASES / ".lock"), timeout=3600):
        everything = _tracking.versions()
        bases = {one.base_sha256 for one in released().values()} | {one.base_sha256 for one in everything if one.live}
        options: Any = {"valid_seconds": valid_seconds, "consolidate": consolidate, "between": between, "actor": actor}
        return [_release_base(base, everything, **options) for base in sorted(bases)]


def open_release(base: str | Path, base_sha256: str, *, valid_seconds: int = 0) -> Path:
    """A base's release folder; without a manifest there it gets one that erases nothing."""
    folder = release_folder(base_sha256)
    RELEASES.mkdir(parents=True, exist_ok=True)
    with FileLock(str(RELEASES / ".lock"), timeout=3600):
        if current_manifest(folder) is None:
            publish(folder, [], base=base, key=signing_key(KEYS), valid_seconds=valid_seconds)
    return folder


def withdraw(approved: dict[str, int], *, valid_seconds: int = 0) -> list[str]:
    """Publish at once without what is no longer approved at all; give its names.

    An alias that was moved to another version is not taken out here: its concept stays erased until that
    version is live or refused.
    """
    gone = []
    for folder, manifest in released().items():
        kept = [entry for entry in manifest.adapters if model_of(entry) in approved]
        if len(kept) < len(manifest.adapters):
            _publish(folder, [_kept(folder, entry) for entry in kept], None, valid_seconds)
            gone += [entry.name for entry in manifest.adapters if entry not in kept]
    return gone


def reissue(*, valid_seconds: int, now: Callable[[Manifest], bool]) -> int:
    """Sign those manifests anew for which ``now`` says so, with what they have; give their number."""
    count = 0
    for folder, manifest in released().items():
        if now(manifest):
            _publish(folder, [_kept(folder, entry) for entry in manifest.adapters], None, valid_seconds)
            count += 1
    return count


def model_of(entry: LiveAdapter) -> str:
    """The registered model of a live adapter."""
    return entry.name.partition("/")[0]


def check_version(version: AdapterVersion) -> Approved:
    """Check that a version may go live, by what was measured and not by its tags.

    Raises:
        FadeError: its gate failed, a file was changed, or its erasure is not on this machine.
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
    _check_gate(version, request, folder)
    return Approved(version, request, folder, adapter)


def _check_gate(version: AdapterVersion, request: Request, folder: Path) -> None:
    """The gate, judged anew from the figures of the run; a tag can be edited by anyone who sees the page."""
    content = _tracking.run_file(version, "metrics.json")
    try:
        metrics = json.loads(content)
        report = metrics["judges"]["report"]
        if request.gate.attacks:
            report = {**report, "attacks": _tracking.run_metrics(version)}
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
    if gate.get("verdict") == _tracking.BORDERLINE and version.decision:
        return  # a person let it pass, with a reason on its page
    if not gate["passed"]:
        said = "" if version.gate != "passed" else " (its tag says that it passed)"
        raise RefusedError(f"The gate failed{said}: {'; '.join(gate['reasons'])}.")
    if version.gate != "passed":
        raise RefusedError(f"Its tag says that the gate {version.gate}, its figures that it passed. Register it again.")


@dataclass(slots=True)
class _Board:
    """What is said on the versions' pages at the end."""

    refused: dict[str, str] = field(default_factory=dict)
    waiting: dict[str, str] = field(default_factory=dict)


def _release_base(
    base: str,
    everything: Sequence[AdapterVersion],
    *,
    valid_seconds: int,
    consolidate: bool,
    between: Callable[[], None] | None,
    actor: str,
) -> Change:
    folder, board = release_folder(base), _Board()
    approved = [version for version in everything if version.live and version.base_sha256 == base]
    before = current_manifest(folder)
    names = {named(version): version for version in everything}
    was = () if before is None else before.adapters
    models = {version.model for version in approved}
    # First out, before anything else can fail or take time.
    if before is not None and any(model_of(entry) not in models for entry in was):
        kept = [entry for entry in was if model_of(entry) in models]
        before = _publish(folder, [_kept(folder, entry) for entry in kept], None, valid_seconds)
        was_now = before.adapters
    else:
        was_now = was
    live, new = [], []
    for version in approved:
        entry = next((entry for entry in was_now if entry.name == named(version)), None)
        try:
            if entry is None:
                new.append(check_version(version))
            else:
                live.append(_still(version, folder, entry))
        except FadeError as error:
            board.refused[named(version)] = _short(error)
    chosen = _together(live, new, board, between)
    if [one.name for one in chosen] != [entry.name for entry in was_now] or before is None:
        source = None if before is not None else _base_of(chosen, approved)
        before = _publish(folder, [(one.name, one.adapter, 1.0) for one in chosen], source, valid_seconds)
    if consolidate and board.waiting:
        _consolidate(live + new, everything, board)
    _say(names, before, [entry.name for entry in was], board, actor)
    return Change(
        base,
        folder,
        before.counter,
        before.names,
        added=tuple(name for name in before.names if name not in [entry.name for entry in was]),
        removed=tuple(entry.name for entry in was if entry.name not in before.names),
        refused=board.refused,
        waiting=board.waiting,
    )


def _still(version: AdapterVersion, folder: Path, entry: LiveAdapter) -> Approved:
    """What is live already: its files are the release's own, under the hashes of the signed manifest."""
    erasure = ERASURES / version.model.removeprefix(MODEL_PREFIX)
    if entry.adapter_sha256 != version.adapter_sha256:
        raise LineageError("Its tag names another adapter than the one that is live: the tag was changed.")
    return Approved(version, load_request(erasure), erasure, live_folder(folder, entry))


def _together(
    live: Sequence[Approved], new: Sequence[Approved], board: _Board, between: Callable[[], None] | None
) -> list[Approved]:
    """What goes live; what a wider adapter takes over waits, and says so."""
    chosen = _fitting(live, new, board, between)
    for one in (*live, *new):
        if one not in chosen and one.name not in board.waiting:
            board.waiting[one.name] = _clash(one, chosen)
    return chosen


def _fitting(
    live: Sequence[Approved], new: Sequence[Approved], board: _Board, between: Callable[[], None] | None
) -> list[Approved]:
    """Everything if it holds together, else as much as holds, one after the other."""
    chosen = list(live)
    fitting: list[Approved] = []
    for one in new:
        if clash := _clash(one, [*chosen, *fitting]):
            board.waiting[one.name] = clash
        else:
            fitting.append(one)
    if fitting:
        everything = _joined(chosen, fitting)
        if _holds(everything, between) is None:
            return everything
    for one in fitting:
        trial = _joined(chosen, [one])
        reason = _holds(trial, between)
        if reason is None:
            chosen = trial
        else:
            board.waiting[one.name] = f"together with what is live, {reason}"
    return chosen


def _joined(live: Sequence[Approved], new: Sequence[Approved]) -> list[Approved]:
    """Live adapters, less those whose model or whose concepts a new one takes over, and the new ones."""
    kept = [
        one
        for one in live
        if not any(one.version.model == other.version.model or one.concepts < other.concepts for other in new)
    ]
    return [*kept, *[one for one in new if not any(one.concepts < other.concepts for other in new)]]


def _clash(one: Approved, others: Sequence[Approved]) -> str:
    """Why two adapters cannot be live together: a concept is erased once."""
    for other in others:
        if one.version.model == other.version.model or one.concepts.isdisjoint(other.concepts):
            continue
        if one.concepts < other.concepts:
            return f"all that it erases is erased by {other.name}, which is approved too"
        if not other.concepts < one.concepts:
            return f"it erases something that {other.name} erases too; roll that one back first"
    return ""


def _holds(chosen: Sequence[Approved], between: Callable[[], None] | None) -> str | None:
    """None if these adapters pass the gate together, else the reason."""
    if len(chosen) < 2:
        return None  # alone, it has been judged
    try:
        gate = judge_together(chosen, between=between)
    except ConfigError as error:
        return f"it cannot be tested: {error}"
    return None if gate["passed"] else f"it fails the gate: {'; '.join(gate['reasons'])}"


def combination_folder(chosen: Sequence[Approved]) -> Path:
    """Named by everything that decides the result: adapters, base, protocol, judges and code."""
    first = chosen[0].request
    made_by = {
        "adapters": sorted(one.version.adapter_sha256 for one in chosen),
        "base": first.base_sha256,
        "settings": first.evaluate.model_dump(mode="json"),
        "judges": [sha256_file(path) for path in sorted(Path(first.judges).glob("*.safetensors"))],
        "code": [sha256_file(path) for path in module_closure("fade.steps.combine")],
    }
    digest = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()
    return COMBINATIONS / f"r{digest[:15]}"


def judge_together(chosen: Sequence[Approved], *, between: Callable[[], None] | None = None) -> dict[str, Any]:
    """The gate's verdict on adapters that are live together; what was measured once is not measured again.

    Raises:
        ConfigError: they differ in what they are judged by.
    """
    folder = combination_folder(chosen)
    if not (folder / "metrics.json").is_file():
        ordered = sorted(chosen, key=lambda one: one.version.adapter_sha256)
        for _ in combine([one.folder for one in ordered], folder, adapters=[one.adapter for one in ordered]):
            if between is not None:
                between()
    report = read_json(folder / "metrics.json")["judges"]["report"]
    return judge_gate(report, strictest([one.request.gate for one in chosen]))


def _consolidate(chosen: Sequence[Approved], everything: Sequence[AdapterVersion], board: _Board) -> None:
    """Where adapters fail together: name the one adapter for all of it, or begin to distil it."""
    failing = [name for name, reason in board.waiting.items() if "fails the gate" in reason]
    if not failing:
        return
    wanted = frozenset().union(*(one.concepts for one in chosen))
    found = [one for one in everything if one.base_sha256 == chosen[0].version.base_sha256 and _erases(one) == wanted]
    if not found:
        start_consolidation([one.folder.name for one in chosen])
        said = "one adapter for all of it is being distilled"
    elif found[-1].gate == "passed":
        said = f"approve {named(found[-1])}, which erases all of it at once"
    else:
        said = f"{named(found[-1])}, which erases all of it at once, failed its gate too"
    for name in failing:
        board.waiting[name] += f"; {said}"


def _erases(version: AdapterVersion) -> frozenset[str]:
    folder = ERASURES / version.model.removeprefix(MODEL_PREFIX)
    if not (folder / "request.yaml").is_file():
        return frozenset()
    return frozenset(pair.concept for pair in load_request(folder).pairs)


_consolidations: dict[frozenset[str], subprocess.Popen[bytes]] = {}


def start_consolidation(erasures: Sequence[str]) -> subprocess.Popen[bytes]:
    """Distil several erasures into one adapter in a process of its own, unless this program did so before."""
    key = frozenset(erasures)
    if key not in _consolidations:
        with Path(".fade/consolidate.log").open("ab") as log:
            command = [sys.executable, "-m", "flows.cli", "consolidate", *sorted(key)]
            _consolidations[key] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    return _consolidations[key]


def wait_for_consolidations() -> None:
    """Wait until all that was begun has ended."""
    for process in _consolidations.values():
        process.wait()


def _kept(folder: Path, entry: LiveAdapter) -> tuple[str, Path, float]:
    return entry.name, live_folder(folder, entry), entry.weight


def _publish(
    folder: Path, adapters: Sequence[tuple[str, Path, float]], base: str | None, valid_seconds: int
) -> Manifest:
    return publish(folder, adapters, base=base, key=signing_key(KEYS), valid_seconds=valid_seconds)


def _base_of(chosen: Sequence[Approved], approved: Sequence[AdapterVersion]) -> str:
    for one in chosen:
        return one.request.base
    for version in approved:
        folder = ERASURES / version.model.removeprefix(MODEL_PREFIX)
        if (folder / "request.yaml").is_file():
            return load_request(folder).base
    raise ConfigError(f"Nothing tells where the base of {listing(map(named, approved))} lies: no erasure is here.")


def _short(error: object) -> str:
    said = " ".join(str(error).split())
    return said if len(said) <= _LONGEST else said[: _LONGEST - 3] + "..."


def _say(names: dict[str, AdapterVersion], manifest: Manifest, was: Sequence[str], board: _Board, actor: str) -> None:
    """Write on every version's page what became of it."""
    said = {name: GONE for name in was if name not in manifest.names}
    said |= dict.fromkeys(manifest.names, LIVE)
    said |= {name: f"waiting: {_short(reason)}" for name, reason in board.waiting.items()}
    said |= {name: f"refused: {reason}" for name, reason in board.refused.items()}
    changed = [(names[name], what) for name, what in said.items() if name in names and names[name].release != what]
    # An approval that was refused and then withdrawn leaves nothing to be said.
    changed += [
        (version, GONE)
        for name, version in names.items()
        if name not in said and not version.live and version.release.startswith(("refused", "waiting"))
    ]
    if not changed:
        return
    # First the log, then the page: what died in between is logged again, not forgotten.
    with Ledger() as ledger:
        for version, what in changed:
            _log(ledger, version, what, manifest, actor)
            _tracking.say_release(version, what)


def _log(ledger: Ledger, version: AdapterVersion, what: str, manifest: Manifest, actor: str) -> None:
    """A row of the log, and the requests behind the erasure brought to their state."""
    kind, _, reason = what.partition(": ")
    erasure = version.model.removeprefix(MODEL_PREFIX)
    details = {
        "version": version.version,
        "adapter_sha256": version.adapter_sha256,
        "manifest": manifest.counter,
        "manifest_sha256": manifest.sha256,
    }
    event = f"release.{kind.replace(' ', '_')}"
    ledger.append(event, actor=actor, reason=reason, erasure_id=erasure, details=details)
    after = {LIVE: State.LIVE, GONE: State.ROLLED_BACK}.get(what)
    for record in ledger.find(erasure_id=erasure) if after else []:
        if after in TRANSITIONS[record.state]:
            ledger.transition(record.id, after, actor=actor, reason=f"release {manifest.counter}")
