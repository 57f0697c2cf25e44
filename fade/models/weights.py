"""Which of a base's files hold its weights: one rule for its identity, for loading it and for serving it.

A part's folder may hold its weights several times: the main ones, and variants beside them (``fp16``, ``non_ema``).
The main ones count; a variant counts where there is nothing else. Weights in shards are those that their index names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fade.errors import BaseModelError, ConfigError, listing
from fade.files import read_json
from fade.models.supported import SCALED

PICKLES = (".ckpt", ".bin", ".pt", ".pth")
_MARKS = ("v_pred", "ztsnr")


@dataclass(frozen=True, slots=True)
class PartWeights:
    """The weights of one part of a base.

    Attributes:
        part: its folder's name.
        files: what is read, sorted.
        index: the file that names the shards; None for a single file.
        variant: which; None for the main weights.
        unread: variants that lie beside them and do not count.
    """

    part: str
    files: tuple[Path, ...]
    index: Path | None
    variant: str | None
    unread: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Header:
    """What the beginning of a safetensors file says: each tensor's shape, and the metadata."""

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Names and shapes of a file's tensors; no tensor is read.

    Raises:
        BaseModelError: it is no whole safetensors file.
    """
    try:
        with safe_open(path, framework="numpy") as stored:
            shapes = {key: tuple(stored.get_slice(key).get_shape()) for key in stored.keys()}  # noqa: SIM118
            return Header(shapes, dict(stored.metadata() or {}))
    except (SafetensorError, OSError) as error:
        raise BaseModelError(
            f"The weights in {path} do not load: it is not a safetensors file, or not whole ({error}). Fetch it again."
        ) from None


def marks(header: Header) -> dict[str, str]:
    """What a file says of itself besides its weights: names of tensors that are marks, and of metadata, to values."""
    named = [name for name in header.shapes if name in _MARKS or name.startswith("edm_") or name.endswith(SCALED)]
    return header.metadata | dict.fromkeys(named, "")


def find_weights(folder: Path) -> PartWeights | str:
    """The weights of one part that count, or what is wrong as ``lacks ...`` or ``holds ...``."""
    part = folder.name
    stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
    names = sorted(path.name for path in folder.glob("*")) if folder.is_dir() else []
    variant = r"(?:\.(?P<variant>\w+))?"
    singles = _by_variant(rf"{stem}{variant}\.safetensors", names)
    # The second is how older versions of diffusers named it.
    indexes = _by_variant(rf"{stem}\.safetensors\.index{variant}\.json", names)
    indexes |= _by_variant(rf"{stem}\.safetensors\.(?P<variant>\w+)\.index\.json", names)
    known = sorted({*singles, *indexes}, key=lambda name: (name is not None, name))
    if not known:
        return _none(part, stem, names)
    if known[0] is not None and len(known) > 1:
        return (
            f"holds the variants {listing(known)} of {part} and no main weights, so that nothing says which: keep one"
        )
    chosen, unread = known[0], tuple(str(name) for name in known[1:])
    if chosen in singles and chosen in indexes:
        return f"holds {part} twice, in {singles[chosen]} and in the shards of {indexes[chosen]}: remove one"
    index = folder / indexes[chosen] if chosen in indexes else None
    files = (folder / singles[chosen],) if index is None else _shards(index)
    return files if isinstance(files, str) else PartWeights(part, files, index, chosen, unread)


def _by_variant(pattern: str, names: list[str]) -> dict[str | None, str]:
    return {match["variant"]: name for name in names if (match := re.fullmatch(pattern, name))}


def _none(part: str, stem: str, names: list[str]) -> str:
    """Why a part has no weights, in words."""
    if shards := [name for name in names if re.fullmatch(rf"{stem}.*-\d+-of-\d+.*\.safetensors", name)]:
        return f"lacks the index ({stem}.safetensors.index.json) of the shards of {part}: {listing(shards, 2)}"
    said = f"lacks safetensors weights for {part}"
    if pickles := [name for name in names if Path(name).suffix in PICKLES]:
        return f"{said} ({listing(pickles)} can run code and is not read)"
    if others := [name for name in names if name.endswith(".safetensors")]:
        return f"{said} ({listing(others)} has not the name {stem}.safetensors, so nothing loads it)"
    return said


def _shards(index: Path) -> tuple[Path, ...] | str:
    """The files that an index names, or what is wrong with it."""
    try:
        named: Any = read_json(index).get("weight_map")
    except ConfigError as error:
        return f"holds a damaged index ({error})"
    files = set(named.values()) if isinstance(named, dict) else set()
    if not files or not all(isinstance(name, str) and Path(name).name == name for name in files):
        return f"holds an index that names no files beside it ({index.parent.name}/{index.name})"
    if bad := [name for name in files if not name.endswith(".safetensors")]:
        return f"holds an index that names no safetensors ({listing(sorted(bad))})"
    if missing := [f"{index.parent.name}/{name}" for name in sorted(files) if not (index.parent / name).is_file()]:
        return f"lacks {listing(missing)}, which {index.name} names"
    return tuple(index.parent / name for name in sorted(files))
