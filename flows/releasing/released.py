"""What is live by the signed manifests: read without Prefect, MLflow or torch."""

from __future__ import annotations

from pathlib import Path

from fade.adapters.manifest import MANIFEST_NAME, LiveAdapter, Manifest, read_manifest
from fade.signing import verifying_key

RELEASES, KEYS = Path("data/release"), Path(".fade/keys")


def release_folder(base_sha256: str) -> Path:
    """The release of a base."""
    return RELEASES / base_sha256[:12]


def current_manifest(folder: Path) -> Manifest | None:
    """The manifest of a release folder, checked with this project's key; None if nothing was released there.

    Raises:
        SignatureError: it is there, and it is not ours.
        ConfigError: it is there, and no key to check it with.
    """
    if not (folder / MANIFEST_NAME).exists():
        return None
    return read_manifest(folder, verifying_key(KEYS))


def released() -> dict[Path, Manifest]:
    """Every release folder and its manifest."""
    found = {folder: current_manifest(folder) for folder in sorted(RELEASES.glob("*")) if folder.is_dir()}
    return {folder: manifest for folder, manifest in found.items() if manifest is not None}


def model_of(entry: LiveAdapter) -> str:
    """The registered model of a live adapter."""
    return entry.name.partition("/")[0]


def number_of(entry: LiveAdapter) -> int:
    """The version of a live adapter."""
    return int(entry.name.partition("/")[2])


def live_versions(model: str) -> list[int]:
    """Numbers of a model's versions that are live by the signed manifests, on whatever base."""
    return [
        number_of(entry) for manifest in released().values() for entry in manifest.adapters if model_of(entry) == model
    ]
