"""Step ``foreign``: another tool's adapter, laid beside the spec, as an adapter of this library.

Takes the place of saliency, mask and distillation: what comes after judges it like any other.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fade.adapters.card import WEIGHTS_NAME
from fade.adapters.exports import PEFT_CONFIG, PEFT_WEIGHTS, import_adapter, modules_changed
from fade.adapters.stock import check_stored
from fade.adapters.store import save_adapter
from fade.errors import AdapterFormatError, LineageError
from fade.files import sha256_file, writing
from fade.models.base import Base
from fade.models.family import load_base
from fade.spec import load_spec

FOREIGN = "foreign"
"""Folder of the files as they came."""


def foreign_files(source: Path) -> list[Path]:
    """The files of an adapter, a file itself or a folder's, sorted by name.

    Raises:
        AdapterFormatError: there is none.
    """
    if source.is_file():
        return [source]
    found = [source / name for name in (PEFT_CONFIG, PEFT_WEIGHTS, WEIGHTS_NAME) if (source / name).is_file()]
    if not found:
        missing = "" if source.exists() else ", which is not there"
        raise AdapterFormatError(
            f"No adapter in {source}{missing}: expected a .safetensors file, or a folder with {PEFT_WEIGHTS} and "
            f"{PEFT_CONFIG} or with {WEIGHTS_NAME}."
        )
    return sorted(found)


def foreign_sha256(source: Path) -> str:
    """One hash of an adapter's files, whatever they are called above their own names."""
    digest = hashlib.sha256()
    for path in foreign_files(source):
        name = path.name if source.is_dir() else f"adapter{path.suffix}"
        digest.update(f"{name}:{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def lay_foreign(source: Path, folder: Path) -> None:
    """Copy an adapter's files beside the spec, so that the erasure does not depend on where they came from."""
    with writing(folder / FOREIGN) as temporary:
        temporary.mkdir(parents=True)
        for path in foreign_files(source):
            shutil.copyfile(path, temporary / (path.name if source.is_dir() else f"adapter{path.suffix}"))


def convert_foreign(folder: Path) -> str:
    """Write ``adapter/`` from ``foreign/``; give the hash of its weights.

    Raises:
        AdapterFormatError: the file is damaged, of an unknown layout, or a tensor finds no module of the base.
        LineageError: the files are not those of the spec.
    """
    spec = load_spec(folder)
    source = _laid(folder)
    if (found := foreign_sha256(source)) != spec.imported:
        raise LineageError(
            f"{folder / FOREIGN} was changed: its hash is {found[:12]}, the spec names "
            f"{str(spec.imported)[:12]}. Import the adapter again."
        )
    sd = load_base(spec.base, expected_sha256=spec.base_sha256, weights=spec.weights)
    card = {"erasure": spec.id, "kind": spec.kind, "imported_sha256": spec.imported, "steps": 0}
    return take_in(source, sd, folder / "adapter", card)


def take_in(source: Path, base: Base, folder: Path, card: Mapping[str, Any]) -> str:
    """Write another tool's adapter as one of this library, compare what the network answers; give its weights' hash.

    Raises:
        AdapterFormatError: as ``import_adapter`` and ``check_stored``; nothing was left there.
    """
    tensors = import_adapter(source, base)
    bound: dict[str, Any] = {"base_sha256": base.sha256, "pipeline": type(base.pipeline).__name__}
    bound["modules"] = len(modules_changed(tensors))
    sha256 = save_adapter(folder, tensors, {**card, **bound})
    try:
        check_stored(base, tensors, folder)
    except AdapterFormatError:
        shutil.rmtree(folder)
        raise
    return sha256


def _laid(folder: Path) -> Path:
    files = sorted((folder / FOREIGN).glob("*"))
    if not files:
        raise AdapterFormatError(f"{folder / FOREIGN} holds no adapter. Import it again.")
    return files[0] if [path.stem for path in files] == ["adapter"] else folder / FOREIGN
