"""Masks: the part of the network that may change, at four granularities.

module   whole modules (FADE, stage 1)
neuron   output rows and input columns of modules: dW = (m_out * B)(A * m_in), still an exact LoRA   (ours)
weight   single weights: dW = (B A) * M, no longer of low rank (FADE, stage 1)
none     every module, whatever its saliency: the control without a mask

Exactly max(1, round(density n)) entries are kept. Equal saliency, zeros included, is kept in the order of
module names and positions, so a mask is a function of the saliency alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fade.errors import ConfigError, MaskMismatchError
from fade.files import read_json, sha256_file, write_json, writing

Granularity = Literal["none", "module", "neuron", "weight"]
ROWS, COLUMNS = "rows", "columns"
BITS_NAME = "mask.safetensors"


@dataclass(frozen=True, slots=True)
class Mask:
    """What may change.

    Attributes:
        modules: names of the modules that may change at all, sorted.
        kept, of: entries kept, and entries there were (modules, rows and columns, or weights).
        rows, columns: granularity ``neuron``: module name to bool (out,) and (in,). Granularity ``module``: rows of
            the modules that hold several projections, where not all of these were kept.
        weights: granularity ``weight``: module name to bool of the weight's shape.
    """

    granularity: Granularity
    modules: tuple[str, ...]
    kept: int
    of: int
    rows: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)


def make_mask(
    saliency: Mapping[str, Tensor], density: float, *, granularity: Granularity, within: re.Pattern[str] | None = None
) -> Mask:
    """Keep the most salient share.

    Args:
        saliency: as ``accumulate_saliency`` gives it at this granularity.
        density: share kept, in (0, 1]; ignored without a mask (``none``).
        within: names of the modules a mask may choose from (``fade.models.denoiser.Denoiser.patterns``); all if None.

    Raises:
        ConfigError: density is outside (0, 1], or the granularity is unknown.
        MaskMismatchError: there is nothing to choose from, or a saliency is not a number.
    """
    if granularity not in get_args(Granularity):
        raise ConfigError(f"Unknown granularity {granularity!r}: expected one of {', '.join(get_args(Granularity))}.")
    if not 0 < density <= 1:
        raise ConfigError(f"density must be in (0, 1]: got {density}. Set `mask.density` in params.yaml.")
    scores = {key: saliency[key] for key in sorted(saliency) if within is None or within.search(key.partition(":")[0])}
    if not scores:
        raise MaskMismatchError(
            f"A mask needs something to choose from: got no module whose name fits {getattr(within, 'pattern', None)}."
        )
    if bad := [key for key, values in scores.items() if not torch.isfinite(values).all()]:
        raise MaskMismatchError(f"The saliency of {bad[0]} is not a number. Check the pictures and the base.")
    if granularity == "none":
        modules = tuple(sorted({key.partition(":")[0] for key in scores}))
        return Mask("none", modules, len(modules), len(modules))
    if granularity == "neuron":
        return _neuron_mask(scores, density)
    kept = keep_most(scores, density)
    if granularity == "module":
        return _module_mask(kept)
    modules = tuple(key for key in kept if kept[key].any())
    counts = sum(int(part.sum()) for part in kept.values()), sum(part.numel() for part in kept.values())
    return Mask(granularity, modules, *counts, weights={key: kept[key] for key in modules})


def ranges(module: str, rows: Sequence[int]) -> list[str]:
    """Keys of a module's projections: ``<module>:<from>-<to>``, of as many rows each."""
    ends = list(accumulate(rows))
    return [f"{module}:{end - count}-{end}" for end, count in zip(ends, rows, strict=True)]


def rows_of(key: str) -> slice | None:
    """The rows that such a key names; None of other keys."""
    found = re.fullmatch(r"(\d+)-(\d+)", key.partition(":")[2])
    return slice(int(found[1]), int(found[2])) if found else None


def _module_mask(kept: Mapping[str, Tensor]) -> Mask:
    """Whole modules; of those that hold several projections, the rows of the projections that were kept."""
    modules = tuple(sorted({key.partition(":")[0] for key, chosen in kept.items() if chosen}))
    rows = {}
    for module in modules:
        parts = {key: part for key in kept if key.startswith(f"{module}:") and (part := rows_of(key))}
        if not all(kept[key] for key in parts):
            rows[module] = torch.zeros(max(part.stop for part in parts.values()), dtype=torch.bool)
            for key, part in parts.items():
                rows[module][part] = bool(kept[key])
    return Mask("module", modules, sum(map(bool, kept.values())), len(kept), rows=rows)


def narrowed(mask: Mask, modules: Iterable[str]) -> Mask:
    """The same mask, of some of its modules."""
    names = tuple(modules)
    rows, columns, weights = (
        {name: part for name, part in parts.items() if name in names}
        for parts in (mask.rows, mask.columns, mask.weights)
    )
    return replace(mask, modules=names, rows=rows, columns=columns, weights=weights)


def keep_most(scores: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
    """Bool of each tensor's shape: True for exactly max(1, round(density n)) largest entries of all."""
    flat = torch.cat([values.reshape(-1) for values in scores.values()])
    count = max(1, round(density * flat.numel()))
    # The count-th largest value; entries equal to it are kept in order until the count is full.
    threshold = torch.from_numpy(np.partition(flat.numpy(), flat.numel() - count))[flat.numel() - count]
    above, equal = flat > threshold, flat == threshold
    kept = above | (equal & (equal.cumsum(0) <= count - above.sum()))
    parts = kept.split([values.numel() for values in scores.values()])
    return {key: part.view(values.shape) for (key, values), part in zip(scores.items(), parts, strict=True)}


def _neuron_mask(scores: Mapping[str, Tensor], density: float) -> Mask:
    """The most salient rows of all modules, and the most salient columns of all modules."""
    chosen = {}
    for side in (ROWS, COLUMNS):
        part = {key.removesuffix(f":{side}"): v for key, v in scores.items() if key.endswith(f":{side}")}
        if not part:
            raise MaskMismatchError(f"A neuron mask needs saliency of {side}: got none. Run the saliency step again.")
        chosen[side] = keep_most(part, density)
    modules = tuple(sorted(m for m in chosen[ROWS] if chosen[ROWS][m].any() and chosen[COLUMNS][m].any()))
    if not modules:
        raise MaskMismatchError(
            f"No module keeps both a row and a column at density {density}: nothing could change. Raise `mask.density`."
        )
    every = [part for side in chosen.values() for part in side.values()]
    return Mask(
        "neuron",
        modules,
        sum(int(part.sum()) for part in every),
        sum(part.numel() for part in every),
        rows={name: chosen[ROWS][name] for name in modules},
        columns={name: chosen[COLUMNS][name] for name in modules},
    )


def save_mask(folder: Path, mask: Mask) -> None:
    """Write ``mask.json`` and, below whole modules, ``mask.safetensors`` (bits packed, eight a byte)."""
    with writing(folder) as temporary:
        temporary.mkdir(parents=True)
        shapes, packed = {}, {}
        for kind in (ROWS, COLUMNS, "weights"):
            for name, part in getattr(mask, kind).items():
                shapes[f"{name}:{kind}"] = list(part.shape)
                packed[f"{name}:{kind}"] = torch.from_numpy(np.packbits(part.numpy().reshape(-1)))
        content: dict[str, Any] = {
            "granularity": mask.granularity,
            "modules": list(mask.modules),
            "kept": mask.kept,
            "of": mask.of,
        }
        if packed:
            save_file(packed, temporary / BITS_NAME, metadata={"format": "pt"})
            # Whoever knows the hash of mask.json, as an adapter's card does, knows the bits too.
            content["bits_sha256"] = sha256_file(temporary / BITS_NAME)
        write_json(temporary / "mask.json", {**content, "density": mask.kept / mask.of, "shapes": shapes})


def load_mask(folder: Path, *, sha256: str | None = None) -> Mask:
    """Read a mask.

    Args:
        sha256: of ``mask.json``, as an adapter's card names it; any mask is read if None.

    Raises:
        MaskMismatchError: missing, damaged, another one than that, or its bits are not the ones that were written.
    """
    path, bits = folder / "mask.json", folder / BITS_NAME
    if not path.is_file() or (sha256 is not None and sha256_file(path) != sha256):
        got = sha256_file(path)[:12] if path.is_file() else "nothing"
        raise MaskMismatchError(
            f"The mask in {path} is not the adapter's: got {got}, expected {(sha256 or 'a mask')[:12]}. "
            "Run the erasure again."
        )
    content = read_json(path)
    if content["shapes"] and (not bits.is_file() or sha256_file(bits) != content["bits_sha256"]):
        raise MaskMismatchError(f"The mask in {folder} was changed: {BITS_NAME} is another one. Run its step again.")
    parts: dict[str, dict[str, Tensor]] = {ROWS: {}, COLUMNS: {}, "weights": {}}
    packed = load_file(bits) if content["shapes"] else {}
    for key, stored in packed.items():
        name, _, kind = key.rpartition(":")
        shape = content["shapes"][key]
        flat = np.unpackbits(stored.numpy(), count=int(np.prod(shape)))
        parts[kind][name] = torch.from_numpy(flat.astype(bool)).view(*shape)
    return Mask(
        content["granularity"], tuple(content["modules"]), content["kept"], content["of"],
        rows=parts[ROWS], columns=parts[COLUMNS], weights=parts["weights"],
    )  # fmt: skip
