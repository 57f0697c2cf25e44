"""What a person approved in MLflow goes live, what was taken back goes out.

MLflow's alias ``approved`` says what a person wants, the signed manifest what is. ``settle`` brings the
second to the first: it takes out at once what is no longer approved, checks what is new (the ledger's registration,
hash, gate, erasure's folder), and publishes what is known to hold together with all that is live. What is not known
yet it leaves open, so that no click waits for another one's test; ``reconcile`` measures that too. What may not go
live says so on its version's page (tag ``release``) and stays out. Every base has its own release folder.

What is live stays so until a person takes back the alias of a version that exists: a registered model that was
deleted, a version made anew, an alias moved to what may not go live, an edited tag leave it in, and are said.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fade.adapters.manifest import LiveAdapter, Manifest, live_folder
from fade.errors import FadeError
from fade.requests.ledger import Ledger
from flows.erasing.together import Board, combination_folder, fitting_together, measure_together, offer_consolidated
from flows.releasing.approval import Approved, check_version, named, still_live
from flows.releasing.manifests import as_published, publish_signed, releases_locked
from flows.releasing.outcomes import GONE, LIVE, ReleaseOutcome, last_outcomes, record_outcomes, shortened
from flows.releasing.released import current_manifest, model_of, release_folder, released
from tasks.mlflow import tracking
from tasks.mlflow.tracking import AdapterVersion, is_registered


@dataclass(frozen=True, slots=True)
class Change:
    """The result of one check of the registry, for one base.

    Attributes:
        live: names in the manifest, in order.
        added: of those, what is new.
        removed: names that were taken out.
        refused: reason by version name, of those that stay out.
        waiting: what each version waits for, by name.
        kept: by name, what is wrong in MLflow or on this machine with a version that stays live.
    """

    base_sha256: str
    folder: Path
    counter: int
    live: tuple[str, ...]
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)
    waiting: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def after(self, first: Change | None) -> Change:
        """This check and the one before it, combined."""
        if first is None:
            return self
        added = dict.fromkeys((*first.added, *self.added))
        removed = {*first.removed, *self.removed} - {*self.live}
        return replace(self, added=tuple(name for name in added if name in self.live), removed=tuple(sorted(removed)))


@dataclass(frozen=True, slots=True)
class Settled:
    """The result of one check for all bases, and what it left open.

    Attributes:
        live: what is live on each base, by the base's hash.
        unknown: combinations that have to be measured before more can be said, one for each base that has one.
        approved: the registry as this look saw it, registered model to approved version.
    """

    changes: list[Change]
    live: dict[str, list[Approved]]
    unknown: list[tuple[Approved, ...]]
    approved: dict[str, int]


def reconcile(*, valid_seconds: int = 0, consolidate: bool = True) -> list[Change]:
    """Settle, measure what was left open, and settle again until nothing is; ``watch`` does it without waiting.

    Raises:
        As ``settle``.
    """
    changes: dict[str, Change] = {}
    failed: dict[Path, str] = {}
    while True:
        settled = settle(valid_seconds=valid_seconds, consolidate=consolidate, failed=failed)
        changes = {one.base_sha256: one.after(changes.get(one.base_sha256)) for one in settled.changes}
        if not settled.unknown:
            return list(changes.values())
        chosen = settled.unknown[0]
        try:
            measure_together(chosen)
        except FadeError as error:
            failed[combination_folder(chosen)] = str(error)


def settle(*, valid_seconds: int = 0, consolidate: bool = True, failed: Mapping[Path, str] | None = None) -> Settled:
    """Bring every base's release to what is approved now, as far as that is known: nothing is measured here.

    First all that was taken back goes out, on every base, then what may go live goes live. It needs no
    Prefect: a rollback must not wait for it.

    Args:
        valid_seconds: how long runtimes may use the manifests; 0 for without end.
        consolidate: distil what fails together into one adapter, in a process of its own.
        failed: folders of combinations that could not be measured, and why.

    Raises:
        RegistryError: MLflow cannot be asked. Releases are then as they were, or less.
        SignatureError: a manifest that is there is not ours.
    """
    with releases_locked(), Ledger() as ledger:
        before = {one.base_sha256: one for one in released().values()}
        registry = _read_registry(ledger, before.values())
        wanted = {_base_of(one) for one in registry.versions.values() if one.live}
        for base, manifest in before.items():
            _take_out(base, manifest, registry, valid_seconds)
        approved = {one.model: one.version for one in registry.versions.values() if one.live}
        settled = Settled([], {}, [], approved)
        for base in sorted({*before, *wanted}):
            board = Board(failed=failed or {})
            was = before[base].adapters if base in before else ()
            change = _settle_base(
                base,
                registry,
                was,
                board,
                valid_seconds=valid_seconds,
                consolidate=consolidate,
                live=settled.live.setdefault(base, []),
                ledger=ledger,
            )
            settled.changes.append(change)
            if board.unknown:
                settled.unknown.append(board.unknown)
        return settled


@dataclass(frozen=True, slots=True)
class _Registry:
    """MLflow at the time of one check, and the latest logged outcome of every version.

    Attributes:
        versions: by the name a manifest gives them.
        said: the same names to the last row of the log on their release.
        live: names in the manifests as they were before this look.
    """

    versions: dict[str, AdapterVersion]
    models: set[str]
    said: dict[str, ReleaseOutcome]
    live: frozenset[str]

    def is_withdrawn(self, entry: LiveAdapter) -> bool:
        """Whether a person withdrew the approval: the live version exists, and no version of its model is approved."""
        version = self.versions.get(entry.name)
        if version is None or self.was_recreated(version):
            return False
        return not any(one.live for one in self.versions.values() if one.model == version.model)

    def was_recreated(self, version: AdapterVersion) -> bool:
        """Whether the model was deleted and made again, so that only the version's name is that of the live one."""
        said = self.said.get(named(version))
        return said is not None and bool(said.run_id) and said.run_id != version.run_id

    def fault_of(self, entry: LiveAdapter, base: str) -> str:
        """What is wrong in MLflow with a live adapter; empty if nothing is."""
        version = self.versions.get(entry.name)
        if model_of(entry) not in self.models:
            return "its registered model is gone from MLflow"
        if version is None:
            return "its version is gone from MLflow"
        if (version.adapter_sha256, _base_of(version)) != (entry.adapter_sha256, base):
            return "its tags in MLflow name another adapter or base than the one that is live"
        if self.was_recreated(version) and not (version.live and is_registered(version)):
            return "its version in MLflow was made anew, and nobody approved that one"
        return ""


def _read_registry(ledger: Ledger, manifests: Iterable[Manifest]) -> _Registry:
    everything = {named(one): one for one in tracking.versions()}
    live = frozenset(name for manifest in manifests for name in manifest.names)
    return _Registry(everything, tracking.models(), last_outcomes(ledger), live)


def _base_of(version: AdapterVersion) -> str:
    """Hash of a version's base; empty if its tags cannot be read."""
    return "" if version.fault else version.base_sha256


def _take_out(base: str, manifest: Manifest, registry: _Registry, valid_seconds: int) -> None:
    """Publish the release without the versions whose approval was withdrawn.

    An alias that was moved to another version takes nothing out here: its concept stays erased until that
    version is live.
    """
    folder = release_folder(base)
    kept = [entry for entry in manifest.adapters if not registry.is_withdrawn(entry)]
    if len(kept) < len(manifest.adapters):
        publish_signed(folder, as_published(folder, kept), None, valid_seconds)


def _settle_base(
    base: str,
    registry: _Registry,
    was: Sequence[LiveAdapter],
    board: Board,
    *,
    valid_seconds: int,
    consolidate: bool,
    live: list[Approved],
    ledger: Ledger,
) -> Change:
    """One base; what is live on it is put into ``live``. ``was``: what was live before anything was taken out."""
    folder = release_folder(base)
    manifest = current_manifest(folder)
    entries = () if manifest is None else manifest.adapters
    still, kept = _what_is_live(ledger, folder, entries)
    there = {entry.name for entry in entries}
    approved = [one for one in registry.versions.values() if one.live and _base_of(one) == base]
    new = _what_is_new([one for one in approved if named(one) not in registry.live], board)
    if kept and new:
        said = "; ".join(f"{name} is live and cannot be tested: {reason}" for name, reason in kept.items())
        board.waiting |= {one.name: said for one in new}
        new = []
    live += fitting_together(still, new, board)
    wanted = [entry for entry in entries if entry.name in kept or entry.name in {one.name for one in live}]
    added = [one for one in live if one.name not in there]
    if added or len(wanted) < len(entries):
        adapters = as_published(folder, wanted) + [(one.name, one.adapter, 1.0) for one in added]
        source = live[0].spec.base if manifest is None else None
        manifest = publish_signed(folder, adapters, source, valid_seconds)
    if consolidate and not board.unknown and any("fails the gate" in reason for reason in board.waiting.values()):
        offer_consolidated(still + new, [one for one in registry.versions.values() if is_registered(one)], board)
    names = () if manifest is None else manifest.names
    kept |= {entry.name: odd for entry in entries if entry.name in names and (odd := registry.fault_of(entry, base))}
    kept |= _unreplaced(names, board)
    gone = _gone(base, registry, {entry.name for entry in was}, names)
    said_now = dict.fromkeys(sorted(gone), GONE) | dict.fromkeys(names, LIVE)
    said_now |= {name: f"kept: {shortened(reason)}" for name, reason in kept.items()}
    said_now |= {name: f"waiting: {shortened(reason)}" for name, reason in board.waiting.items()}
    said_now |= {name: f"refused: {reason}" for name, reason in board.refused.items()}
    record_outcomes(ledger, said_now, registry.versions, manifest, together=board.together, base=base)
    return Change(
        base,
        folder,
        0 if manifest is None else manifest.counter,
        names,
        added=tuple(one.name for one in added if one.name in names and one.name not in {entry.name for entry in was}),
        removed=tuple(sorted({entry.name for entry in was} - {*names})),
        refused=board.refused,
        waiting=board.waiting,
        kept=kept,
    )


def _what_is_live(
    ledger: Ledger, folder: Path, entries: Sequence[LiveAdapter]
) -> tuple[list[Approved], dict[str, str]]:
    """Live adapters whose records are in order, and by name what is wrong with the others, which stay live."""
    still, kept = [], {}
    for entry in entries:
        try:
            still.append(still_live(ledger, entry, live_folder(folder, entry)))
        except FadeError as error:
            kept[entry.name] = shortened(error)
    return still, kept


def _what_is_new(approved: Sequence[AdapterVersion], board: Board) -> list[Approved]:
    new = []
    for version in approved:
        try:
            new.append(check_version(version))
        except FadeError as error:
            board.refused[named(version)] = shortened(error)
    return new


def _unreplaced(names: Sequence[str], board: Board) -> dict[str, str]:
    """What stays live because the version that its alias was moved to is refused."""
    refused = {name.partition("/")[0]: name for name in board.refused}
    return {
        name: f"{refused[name.partition('/')[0]]}, which is to take its place, is refused"
        for name in names
        if name.partition("/")[0] in refused
    }


def _gone(base: str, registry: _Registry, was: set[str], names: Sequence[str]) -> set[str]:
    """Versions that are live or waiting in the log alone, also because of a crash before it was written."""
    on_base = {name: one for name, one in registry.said.items() if one.base_sha256 == base}
    left = {name for name, one in on_base.items() if one.kind in ("live", "kept")}
    # An approval that was refused and then withdrawn leaves nothing to be said.
    open_ = {name for name, one in on_base.items() if one.kind in ("refused", "waiting")}
    left |= {name for name in open_ if name not in registry.versions or not registry.versions[name].live}
    return (was | left) - {*names}
