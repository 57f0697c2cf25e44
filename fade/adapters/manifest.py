"""The release manifest: what must be erased now, signed (ours).

A release is a folder: ``manifest.json`` and ``adapters/<hash>/``, each adapter under the hash of its
card, which names its weights' hash. The manifest names the base (its identity, and the hash of every
file of it), the adapters in order with weight and hashes, and a counter that only grows. It is replaced
by one rename, after the adapters are there, so that a reader finds the old release or the new one, whole.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from filelock import FileLock
from safetensors import SafetensorError

from fade.adapters.card import CARD_NAME, load_card, weights_path
from fade.errors import AdapterFormatError, BaseModelError, ConfigError, SignatureError, listing
from fade.files import read_json, sha256_file, writing
from fade.models.source import deciding_files, find_base, identity_of
from fade.signing import canonical, read_signed, verify, write_signed

if TYPE_CHECKING:  # who only reads what is live does not wait for torch
    from torch import Tensor

MANIFEST_KIND, PERMISSION_KIND = "fade-manifest/1", "fade-rollback-permission/1"
MANIFEST_NAME, PERMISSION_NAME = "manifest.json", "permission.json"


@dataclass(frozen=True, slots=True)
class LiveAdapter:
    """One adapter of a release.

    Attributes:
        name: registered model and version, ``erasure-<id>/<version>``.
        weight: factor on the adapter's change.
        adapter_sha256: of its weights.
        card_sha256: of its card, which binds base, mask and parameters; it also names its folder.
        file: name of the weights' file.
    """

    name: str
    weight: float
    adapter_sha256: str
    card_sha256: str
    file: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What must be erased now.

    Attributes:
        release: name of the line of releases; counters of different lines are not compared.
        counter: 1 for the first release of a line, higher each time: by one, but after a permitted step back.
        issued: UTC time, ISO 8601.
        base_sha256: identity of the base (``fade.models.source.identity``).
        base_files: hash of every file of the base, by its path: configurations and vocabularies decide
            what is drawn as well.
        adapters: in the order in which they are applied.
        previous_sha256: hash of the manifest before; empty for the first.
        valid_seconds: how long after ``issued`` it may be used; 0 for without end. Whoever withholds newer
            manifests from a runtime then wins that much time, and no more.
        sha256: hash of this manifest's file.
    """

    release: str
    counter: int
    issued: str
    base_sha256: str
    base_files: Mapping[str, str]
    adapters: tuple[LiveAdapter, ...]
    previous_sha256: str
    valid_seconds: int = 0
    sha256: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters, in order."""
        return tuple(adapter.name for adapter in self.adapters)

    @property
    def expires(self) -> datetime | None:
        """When it may no longer be used; None for never."""
        if not self.valid_seconds:
            return None
        return datetime.fromisoformat(self.issued) + timedelta(seconds=self.valid_seconds)


@dataclass(frozen=True, slots=True)
class Permission:
    """That runtimes may go back to an older manifest, once; signed.

    Attributes:
        release: name of the line of releases.
        base_sha256: identity of the base.
        from_counter: the highest counter that was in force: what lies between is abandoned.
        to_counter: of the manifest that may be taken over.
        to_sha256: hash of that manifest's file.
        reason: why; names nobody.
        issued: UTC time, ISO 8601.
        sha256: hash of what is signed.
    """

    release: str
    base_sha256: str
    from_counter: int
    to_counter: int
    to_sha256: str
    reason: str
    issued: str
    sha256: str = ""

    def names(self, manifest: Manifest) -> bool:
        """Whether it is for this manifest."""
        wanted = manifest.release, manifest.base_sha256, manifest.counter, manifest.sha256
        return (self.release, self.base_sha256, self.to_counter, self.to_sha256) == wanted


def base_files(source: str | Path) -> dict[str, str]:
    """Path in the base's folder to SHA-256, of every file that decides what is drawn.

    Raises:
        BaseModelError: as ``find_base``.
    """
    return {name: sha256_file(path) for name, path in deciding_files(find_base(source)).items()}


def check_base(source: str | Path, manifest: Manifest) -> None:
    """Check that a base on disk is the manifest's, file by file.

    Raises:
        BaseModelError: another base, or a file that was changed, added or removed; names the first ones.
    """
    try:
        found = base_files(source)
    except BaseModelError as error:
        # A configuration that was changed may look like another kind of model: say which file it is.
        if not Path(source).is_dir():
            raise
        paths = {name: Path(source) / name for name in manifest.base_files}
        found = {name: sha256_file(path) for name, path in paths.items() if path.is_file()}
        if found == manifest.base_files:
            raise
        reason = f" ({error})"
    else:
        reason = ""
    wrong = [
        name for name in sorted({*found, *manifest.base_files}) if found.get(name) != manifest.base_files.get(name)
    ]
    if wrong:
        raise BaseModelError(
            f"The base in {source} is not the one of release {manifest.release} {manifest.counter}: {listing(wrong)} "
            f"changed, missing or added{reason}. Restore the base."
        )
    if (sha256 := identity_of(found)) != manifest.base_sha256:
        raise BaseModelError(
            f"The base in {source} has the hash {sha256[:12]}; the release is for {manifest.base_sha256[:12]}."
        )


def read_manifest(release: Path, key: Ed25519PublicKey) -> Manifest:
    """The manifest of a release, its signature checked.

    Raises:
        SignatureError: missing, damaged, changed, or signed by another key.
    """
    path = release / MANIFEST_NAME
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SignatureError(f"No manifest in {path} ({error.strerror}): nothing says what must be erased.") from None
    return parse_manifest(data, key, origin=str(path))


def parse_manifest(data: bytes, key: Ed25519PublicKey, *, origin: str) -> Manifest:
    """The same of a manifest's bytes."""
    payload = verify(data, MANIFEST_KIND, key, origin=origin)
    try:
        adapters = tuple(LiveAdapter(**adapter) for adapter in payload.pop("adapters"))
        return Manifest(**payload, adapters=adapters, sha256=hashlib.sha256(data).hexdigest())
    except (TypeError, KeyError) as error:
        raise SignatureError(f"{origin} is a manifest of another version of this program: {error}.") from None


def read_adapter(release: Path, entry: LiveAdapter, *, base_sha256: str) -> dict[str, Tensor]:
    """Tensors of a release's adapter; the bytes that are hashed are the bytes that are read.

    Raises:
        AdapterFormatError: missing, changed, or for another base; names the file.
    """
    from safetensors.torch import load

    folder = live_folder(release, entry)
    contents = {}
    for name, expected in ((CARD_NAME, entry.card_sha256), (entry.file, entry.adapter_sha256)):
        path = folder / name
        try:
            contents[name] = path.read_bytes()
        except OSError as error:
            raise AdapterFormatError(
                f"{entry.name}: cannot read {path} ({error.strerror}). Publish it again."
            ) from None
        if (found := hashlib.sha256(contents[name]).hexdigest()) != expected:
            raise AdapterFormatError(
                f"{entry.name}: {path} was changed ({len(contents[name])} bytes): its hash is {found[:12]}, "
                f"the manifest says {expected[:12]}. Publish it again."
            )
    if (base := read_json(folder / CARD_NAME).get("base_sha256")) != base_sha256:
        raise AdapterFormatError(
            f"{entry.name} is for the base {str(base)[:12]}; the release is for {base_sha256[:12]}."
        )
    try:
        return load(contents[entry.file])
    except SafetensorError as error:
        raise AdapterFormatError(f"{entry.name}: {folder / entry.file} is not a safetensors file: {error}.") from None


def publish(
    release: Path,
    adapters: Sequence[tuple[str, Path, float]],
    *,
    base: str | Path | None,
    key: Ed25519PrivateKey,
    name: str = "live",
    valid_seconds: int = 0,
) -> Manifest:
    """Make exactly these adapters the release; give its manifest.

    Args:
        adapters: name, folder and weight of each, in order.
        base: the base they belong to; None for the one of the manifest that is there, whose files need not be read.
        name: the line of releases.
        valid_seconds: how long runtimes may use it; 0 for without end.

    Raises:
        AdapterFormatError: an adapter is damaged or for another base; nothing was published.
        ConfigError: one name twice, a weight that is not finite, or no base for the first manifest.
        SignatureError: the manifest that is there is not ours; nothing was published.
    """
    names = [called for called, _, _ in adapters]
    if len(set(names)) < len(names):
        raise ConfigError(f"An adapter can be live once: got {listing(names)}.")
    if bad := [called for called, _, weight in adapters if not abs(weight) < float("inf")]:
        raise ConfigError(f"The weight of {listing(bad)} is not a finite number.")
    release.mkdir(parents=True, exist_ok=True)
    with FileLock(str(release / ".lock"), timeout=60):
        before = read_manifest(release, key.public_key()) if (release / MANIFEST_NAME).exists() else None
        if before is not None and before.release != name:
            raise ConfigError(f"{release} holds the line {before.release!r}; expected {name!r}. Take another folder.")
        files, sha256 = _base_of(base, before, release)
        entries = [_deposit(release, called, folder, weight, sha256) for called, folder, weight in adapters]
        manifest = Manifest(
            release=name,
            counter=1 + _highest(release, before, key.public_key()),
            issued=datetime.now(UTC).isoformat(timespec="seconds"),
            base_sha256=sha256,
            base_files=files,
            adapters=tuple(entries),
            previous_sha256="" if before is None else before.sha256,
            valid_seconds=valid_seconds,
        )
        payload = asdict(manifest)
        del payload["sha256"]
        write_signed(release / MANIFEST_NAME, payload, MANIFEST_KIND, key)
        return read_manifest(release, key.public_key())


def _base_of(base: str | Path | None, before: Manifest | None, release: Path) -> tuple[Mapping[str, str], str]:
    """Hashes of the base's files, and its identity."""
    if base is not None:
        files = base_files(base)
        return files, identity_of(files)
    if before is None:
        raise ConfigError(f"{release} holds no manifest yet: its first one needs the base.")
    return before.base_files, before.base_sha256


def live_folder(release: Path, entry: LiveAdapter) -> Path:
    """Where a release keeps one of its adapters."""
    return release / "adapters" / entry.card_sha256


def _deposit(release: Path, name: str, folder: Path, weight: float, base_sha256: str) -> LiveAdapter:
    """Copy an adapter into the release unless it is there, whole."""
    card = load_card(folder)
    if card["base_sha256"] != base_sha256:
        raise AdapterFormatError(
            f"{name} belongs to the base {card['base_sha256'][:12]}; the release is for {base_sha256[:12]}."
        )
    source = weights_path(folder, card)
    entry = LiveAdapter(name, float(weight), card["adapter_sha256"], sha256_file(folder / CARD_NAME), source.name)
    target = live_folder(release, entry)
    wanted = {source.name: entry.adapter_sha256, CARD_NAME: entry.card_sha256}
    if any(not (target / part).is_file() or sha256_file(target / part) != sha for part, sha in wanted.items()):
        with writing(target) as temporary:
            temporary.mkdir(parents=True)
            for part in wanted:
                shutil.copyfile(folder / part, temporary / part)
    return entry


def permit(release: Path, manifest: Manifest, *, seen: int, reason: str, key: Ed25519PrivateKey) -> Permission:
    """Sign a permission for runtimes that have seen counters up to ``seen`` to go back to an older manifest, once.

    Taking an adapter back needs none of this: it is a new manifest with fewer adapters. This is for a
    release restored from a backup. What is published after it has a counter above ``seen``.

    Raises:
        ConfigError: nothing was seen above the manifest's own counter, so that there is no step back.
    """
    if seen < manifest.counter:
        raise ConfigError(
            f"The manifest {manifest.counter} is no step back from {seen}: runtimes take it over as it is."
        )
    permission = Permission(
        release=manifest.release,
        base_sha256=manifest.base_sha256,
        from_counter=seen,
        to_counter=manifest.counter,
        to_sha256=manifest.sha256,
        reason=reason,
        issued=datetime.now(UTC).isoformat(),
    )
    payload = asdict(permission)
    del payload["sha256"]
    write_signed(release / PERMISSION_NAME, payload, PERMISSION_KIND, key)
    return replace(permission, sha256=hashlib.sha256(canonical(payload)).hexdigest())


def read_permission(release: Path, key: Ed25519PublicKey) -> Permission | None:
    """The permission in a release's folder; None if there is none.

    Raises:
        SignatureError: there is one, and it is not genuine.
    """
    path = release / PERMISSION_NAME
    if not path.exists():
        return None
    payload = read_signed(path, PERMISSION_KIND, key)
    try:
        return Permission(**payload, sha256=hashlib.sha256(canonical(payload)).hexdigest())
    except TypeError as error:
        raise SignatureError(f"{path} is a permission of another version of this program: {error}.") from None


def _highest(release: Path, before: Manifest | None, key: Ed25519PublicKey) -> int:
    """The highest counter of a line so far, those that were abandoned by a step back among them."""
    if before is None:
        return 0
    permission = read_permission(release, key)
    if permission is None or (permission.release, permission.base_sha256) != (before.release, before.base_sha256):
        return before.counter
    return max(before.counter, permission.from_counter)
