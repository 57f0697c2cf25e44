"""Flow ``release``: what a person approved in MLflow goes live, what was taken back goes out.

MLflow's alias ``approved`` says what a person wants, the signed manifest what is. ``settle`` brings the
second to the first: it takes out at once what is no longer approved, checks what is new (hash, gate, erasure's
folder), and publishes what is known to hold together with all that is live. What is not known yet it leaves open,
so that no click waits for another one's test; ``reconcile`` measures that too. What may not go live says so on its
version's page (tag ``release``) and stays out. Every base has its own release folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from filelock import FileLock
from prefect import flow

from fade.adapters.manifest import LiveAdapter, Manifest, Permission, live_folder, permit, publish
from fade.config import load_request
from fade.errors import ConfigError, FadeError, LineageError, listing
from fade.requests.ledger import Ledger
from fade.requests.states import TRANSITIONS, State
from fade.signing import signing_key
from flows.approval import Approved, check_version, named
from flows.released import KEYS, RELEASES, current_manifest, release_folder, released
from flows.settings import ERASURES
from flows.together import Board, combination_folder, fitting_together, measure_together, offer_consolidated
from tasks import _tracking
from tasks._tracking import MODEL_PREFIX, AdapterVersion

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

    def after(self, first: Change | None) -> Change:
        """This look and the one before it as one."""
        if first is None:
            return self
        added = dict.fromkeys((*first.added, *self.added))
        removed = {*first.removed, *self.removed} - {*self.live}
        return replace(self, added=tuple(name for name in added if name in self.live), removed=tuple(sorted(removed)))


@dataclass(frozen=True, slots=True)
class Settled:
    """What one look came to for all bases, and what it left open.

    Attributes:
        live: what is live on each base, by the base's hash.
        unknown: combinations that have to be measured before more can be said, one for each base that has one.
        approved: the registry as this look saw it, registered model to approved version.
    """

    changes: list[Change]
    live: dict[str, list[Approved]]
    unknown: list[tuple[Approved, ...]]
    approved: dict[str, int]


@flow(name="release", flow_run_name="release")
def release() -> list[Change]:
    """One look at the registry, for a schedule; ``fade release --watch`` looks every second."""
    return reconcile()


def reconcile(*, valid_seconds: int = 0, consolidate: bool = True, actor: str = REGISTRY) -> list[Change]:
    """Settle, measure what was left open, and settle again until nothing is; ``flows.watch`` does it without waiting.

    Raises:
        As ``settle``.
    """
    changes: dict[str, Change] = {}
    failed: dict[Path, str] = {}
    while True:
        settled = settle(valid_seconds=valid_seconds, consolidate=consolidate, actor=actor, failed=failed)
        changes = {one.base_sha256: one.after(changes.get(one.base_sha256)) for one in settled.changes}
        if not settled.unknown:
            return list(changes.values())
        chosen = settled.unknown[0]
        try:
            measure_together(chosen)
        except FadeError as error:
            failed[combination_folder(chosen)] = str(error)


def settle(
    *,
    valid_seconds: int = 0,
    consolidate: bool = True,
    actor: str = REGISTRY,
    failed: Mapping[Path, str] | None = None,
) -> Settled:
    """Bring every base's release to what is approved now, as far as that is known: nothing is measured here.

    First all that was taken back goes out, on every base, then what may go live goes live. It needs no
    Prefect: a rollback must not wait for it.

    Args:
        valid_seconds: how long runtimes may use the manifests; 0 for without end.
        consolidate: distil what fails together into one adapter, in a process of its own.
        actor: who approved, for the log.
        failed: folders of combinations that could not be measured, and why.

    Raises:
        RegistryError: MLflow cannot be asked. Releases are then as they were, or less.
        SignatureError: a manifest that is there is not ours.
    """
    RELEASES.mkdir(parents=True, exist_ok=True)
    with FileLock(str(RELEASES / ".lock"), timeout=3600):
        everything = _tracking.versions()
        before = {one.base_sha256: one for one in released().values()}
        wanted = {one.base_sha256 for one in everything if one.live}
        for base, manifest in before.items():
            _take_out(base, manifest, everything, valid_seconds)
        settled = Settled([], {}, [], {one.model: one.version for one in everything if one.live})
        for base in sorted({*before, *wanted}):
            board = Board(failed=failed or {})
            was = before[base].adapters if base in before else ()
            change = _settle_base(
                base,
                everything,
                was,
                board,
                valid_seconds=valid_seconds,
                consolidate=consolidate,
                actor=actor,
                live=settled.live.setdefault(base, []),
            )
            settled.changes.append(change)
            if board.unknown:
                settled.unknown.append(board.unknown)
        return settled


def open_release(base: str | Path, base_sha256: str, *, valid_seconds: int = 0) -> Path:
    """A base's release folder; without a manifest there it gets one that erases nothing."""
    folder = release_folder(base_sha256)
    RELEASES.mkdir(parents=True, exist_ok=True)
    with FileLock(str(RELEASES / ".lock"), timeout=3600):
        if current_manifest(folder) is None:
            publish(folder, [], base=base, key=signing_key(KEYS), valid_seconds=valid_seconds)
    return folder


def reissue(*, valid_seconds: int, now: Callable[[Manifest], bool]) -> int:
    """Sign those manifests anew for which ``now`` says so, with what they have; give their number."""
    count = 0
    for folder, manifest in released().items():
        if now(manifest):
            _publish(folder, [_kept(folder, entry) for entry in manifest.adapters], None, valid_seconds)
            count += 1
    return count


def permit_step_back(base: str, *, seen: int, reason: str, actor: str) -> Permission:
    """Sign that runtimes which saw counters up to ``seen`` may take over a base's release as it is now.

    Args:
        base: the base's hash, or its beginning.

    Raises:
        ConfigError: no release, or several, of such a base; or nothing to step back from.
    """
    found = {folder: one for folder, one in released().items() if one.base_sha256.startswith(base)}
    if len(found) != 1:
        raise ConfigError(
            f"{len(found)} releases are of a base {base!r}; expected one. There are: "
            f"{listing(one.base_sha256[:12] for one in released().values()) or 'none'}."
        )
    ((folder, manifest),) = found.items()
    with FileLock(str(RELEASES / ".lock"), timeout=3600), Ledger() as ledger:
        details = {"manifest": manifest.counter, "manifest_sha256": manifest.sha256, "seen": seen}
        permission = permit(folder, manifest, seen=seen, reason=reason, key=signing_key(KEYS))
        ledger.append("release.step_back", actor=actor, reason=reason, details=details)
    return permission


def model_of(entry: LiveAdapter) -> str:
    """The registered model of a live adapter."""
    return entry.name.partition("/")[0]


def _take_out(base: str, manifest: Manifest, everything: Sequence[AdapterVersion], valid_seconds: int) -> None:
    """Publish without what is no longer approved at all.

    An alias that was moved to another version is not taken out here: its concept stays erased until that
    version is live or refused.
    """
    folder = release_folder(base)
    models = {version.model for version in everything if version.live and version.base_sha256 == base}
    kept = [entry for entry in manifest.adapters if model_of(entry) in models]
    if len(kept) < len(manifest.adapters):
        _publish(folder, [_kept(folder, entry) for entry in kept], None, valid_seconds)


def _settle_base(
    base: str,
    everything: Sequence[AdapterVersion],
    was: Sequence[LiveAdapter],
    board: Board,
    *,
    valid_seconds: int,
    consolidate: bool,
    actor: str,
    live: list[Approved],
) -> Change:
    """One base; what is live on it is put into ``live``. ``was``: what was live before anything was taken out."""
    folder = release_folder(base)
    versions = {named(version): version for version in everything if version.base_sha256 == base}
    approved = [version for version in versions.values() if version.live]
    manifest = current_manifest(folder)
    entries = {} if manifest is None else {entry.name: entry for entry in manifest.adapters}
    still, new = [], []
    for version in approved:
        entry = entries.get(named(version))
        try:
            if entry is None:
                new.append(check_version(version))
            else:
                still.append(_still(version, folder, entry))
        except FadeError as error:
            board.refused[named(version)] = _short(error)
    live += fitting_together(still, new, board)
    if [one.name for one in live] != list(entries) or manifest is None:
        source = None if manifest is not None else _base_of(live, approved)
        manifest = _publish(folder, [(one.name, one.adapter, 1.0) for one in live], source, valid_seconds)
    if consolidate and board.waiting and not board.unknown:
        offer_consolidated(still + new, everything, board)
    names = [entry.name for entry in was]
    # A page that says so may be all that is left of it: what took it out died before it wrote that down.
    gone = {*names, *(name for name, version in versions.items() if version.release == LIVE)} - {*manifest.names}
    _say(versions, manifest, gone, board, actor)
    return Change(
        base,
        folder,
        manifest.counter,
        manifest.names,
        added=tuple(name for name in manifest.names if name not in names),
        removed=tuple(sorted(gone)),
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


def _say(names: dict[str, AdapterVersion], manifest: Manifest, gone: set[str], board: Board, actor: str) -> None:
    """Write on every version's page what became of it."""
    said = dict.fromkeys(sorted(gone), GONE)
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
