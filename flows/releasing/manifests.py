"""Changes of releases that need no look at what is approved: open one, sign it again, step back, take a model out.

``fade release`` (flows/releasing/release.py) publishes through the same functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from fade.adapters.manifest import LiveAdapter, Manifest, Permission, live_folder, permit, publish
from fade.errors import ConfigError, listing
from fade.requests.ledger import Ledger
from fade.signing import signing_key
from flows.account import this_user
from flows.releasing.approval import TAKEN_BACK, named
from flows.releasing.outcomes import GONE, record_outcomes
from flows.releasing.released import KEYS, RELEASES, current_manifest, model_of, number_of, release_folder, released
from tasks.mlflow import tracking
from tasks.mlflow.tracking import MODEL_PREFIX


@contextmanager
def releases_locked() -> Iterator[None]:
    """One program at a time changes releases."""
    RELEASES.mkdir(parents=True, exist_ok=True)
    with FileLock(str(RELEASES / ".lock"), timeout=3600):
        yield


def publish_signed(
    folder: Path, adapters: Sequence[tuple[str, Path, float]], base: str | Path | None, valid_seconds: int
) -> Manifest:
    """Make these adapters (name, folder, weight) a base's release, signed with the project's key."""
    return publish(folder, adapters, base=base, key=signing_key(KEYS), valid_seconds=valid_seconds)


def as_published(folder: Path, entries: Sequence[LiveAdapter]) -> list[tuple[str, Path, float]]:
    """Live adapters as ``publish_signed`` takes them, with the release's own files."""
    return [(entry.name, live_folder(folder, entry), entry.weight) for entry in entries]


def open_release(base: str | Path, base_sha256: str, *, valid_seconds: int = 0) -> Path:
    """A base's release folder; without a manifest there it gets one that erases nothing."""
    folder = release_folder(base_sha256)
    with releases_locked():
        if current_manifest(folder) is None:
            publish_signed(folder, [], base, valid_seconds)
    return folder


def reissue(*, valid_seconds: int, now: Callable[[Manifest], bool]) -> int:
    """Sign again the manifests that ``now`` selects, with unchanged content; gives how many."""
    count = 0
    for folder, manifest in released().items():
        if now(manifest):
            publish_signed(folder, as_published(folder, manifest.adapters), None, valid_seconds)
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
    with releases_locked(), Ledger() as ledger:
        details = {"manifest": manifest.counter, "manifest_sha256": manifest.sha256, "seen": seen}
        permission = permit(folder, manifest, seen=seen, reason=reason, key=signing_key(KEYS))
        ledger.append("release.step_back", actor=actor, reason=reason, details=details)
    return permission


def take_out(model: str, *, actor: str | None = None) -> list[str]:
    """Remove a model's live versions from the releases, whatever MLflow says; gives their names.

    For what MLflow no longer knows: the next look at the registry finds it neither live nor approved.

    Args:
        actor: who takes it out; the account that runs this program if None.
    """
    out: list[str] = []
    with releases_locked(), Ledger() as ledger:
        for folder, manifest in released().items():
            entries = [entry for entry in manifest.adapters if model_of(entry) == model]
            if not entries:
                continue
            for entry in entries:
                details = {"version": number_of(entry), "adapter_sha256": entry.adapter_sha256}
                erasure = model.removeprefix(MODEL_PREFIX)
                ledger.append(TAKEN_BACK, actor=actor or this_user(), erasure_id=erasure, details=details)
            kept = [entry for entry in manifest.adapters if model_of(entry) != model]
            left = publish_signed(folder, as_published(folder, kept), None, manifest.valid_seconds)
            names = [entry.name for entry in entries]
            record_outcomes(ledger, dict.fromkeys(names, GONE), {named(one): one for one in tracking.versions()}, left)
            out += names
    return out
