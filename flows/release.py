"""Flow ``release``: what a person approved in MLflow goes live, what was taken back goes out.

MLflow's alias ``approved`` says what a person wants, the signed manifest what is. ``reconcile`` brings the
second to the first: it takes out at once what is no longer approved, checks what is new (hash, gate, erasure's
folder), tests it together with all that is live, and publishes. What may not go live says so on its version's
page (tag ``release``) and stays out. Every base has its own release folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock
from prefect import flow

from fade.adapters.manifest import MANIFEST_NAME, LiveAdapter, Manifest, live_folder, publish, read_manifest
from fade.config import load_request
from fade.errors import ConfigError, FadeError, LineageError, listing
from fade.requests.ledger import Ledger
from fade.requests.states import TRANSITIONS, State
from fade.signing import signing_key
from flows.approval import Approved, check_version, named
from flows.settings import ERASURES
from flows.together import Board, fitting_together, offer_consolidated
from tasks import _tracking
from tasks._tracking import MODEL_PREFIX, AdapterVersion

RELEASES, KEYS = Path("data/release"), Path(".fade/keys")
LIVE, GONE = "live", "rolled back"
REGISTRY = "an alias in the registry"
"""Who acted, where MLflow does not say who set an alias."""
_LONGEST = 500
"""Characters of a tag's reason."""


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


def _release_base(
    base: str,
    everything: Sequence[AdapterVersion],
    *,
    valid_seconds: int,
    consolidate: bool,
    between: Callable[[], None] | None,
    actor: str,
) -> Change:
    folder, board = release_folder(base), Board()
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
    chosen = fitting_together(live, new, board, between)
    if [one.name for one in chosen] != [entry.name for entry in was_now] or before is None:
        source = None if before is not None else _base_of(chosen, approved)
        before = _publish(folder, [(one.name, one.adapter, 1.0) for one in chosen], source, valid_seconds)
    if consolidate and board.waiting:
        offer_consolidated(live + new, everything, board)
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


def _say(names: dict[str, AdapterVersion], manifest: Manifest, was: Sequence[str], board: Board, actor: str) -> None:
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
    for name, what in board.together.items():
        _tracking.say_together(names[name], what)
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
