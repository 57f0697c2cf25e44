"""Adapters for other tools, and other tools' adapters for this library. Safetensors only, never pickle.

diffusers   a folder: ``pytorch_lora_weights.safetensors`` with its LoRA configuration as metadata
peft        a folder: ``adapter_config.json`` and ``adapter_model.safetensors``
kohya       a file: ``lora_unet_<module>.lora_down.weight``, ``.lora_up.weight``, ``.alpha`` (fade/adapters/kohya.py)
difference  a file: ``<component>.<module>.weight``, the dense difference, float32
merged      a diffusers folder: a copy of the base with the difference added to its denoiser

The first three hold a LoRA alone. A file has one metadata key: safetensors writes two in a random order, and
equal exports are to be equal bytes.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import diffusers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fade.adapters.card import CARD_NAME, WEIGHTS_NAME, load_card, weights_path
from fade.adapters.foreign import (
    ALPHA,
    LORA_A,
    LORA_B,
    from_kohya,
    named,
    read_metadata,
    refuse_others,
    refuse_whole_weights,
    scaling_of,
)
from fade.adapters.kohya import as_kohya
from fade.errors import AdapterFormatError, ConfigError, listing
from fade.files import read_json, write_json, writing
from fade.models.base import Base
from fade.models.deltas import FixedDelta, plain_modules
from fade.models.source import find_base, identity

Layout = Literal["diffusers", "peft", "kohya", "difference", "merged"]
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_A, _B = LORA_A, LORA_B
# Weights of other formats beside the merged ones would be the base's: who loads them has nothing erased.
_STALE = shutil.ignore_patterns(".*", "*.bin", "*.bin.index*.json", "*.ckpt", "*.pt", "*.pth", "*.msgpack", "*.onnx*")


def export_adapter(folder: Path, out: Path, *, layout: Layout, base: Path | None = None, strength: float = 1.0) -> Path:
    """Write an adapter so that tools which do not know this library can use it; give ``out``.

    Args:
        out: the file (kohya, difference; ``.safetensors``) or folder to write; after an error it is as it was.
        base: the folder of the adapter's base, whose weights' shapes ``merged`` and every export of a
            weight-level mask's adapter need.
        strength: factor on the difference; a LoRA's tensors are as stored at 1, in float32 at any other.

    Raises:
        AdapterFormatError: the adapter is damaged, belongs to another base, or does not fit the layout.
        ConfigError: the layout or ``strength`` is wrong, ``base`` is missing, or ``out`` is taken.
        BaseModelError: ``base`` is no base model.
    """
    if layout not in get_args(Layout):
        raise ConfigError(f"Unknown layout {layout!r}: expected one of {', '.join(get_args(Layout))}.")
    if not math.isfinite(strength):
        raise ConfigError(f"strength must be a finite number: got {strength}.")
    single = layout in ("kohya", "difference")
    if single and out.suffix != ".safetensors":
        raise ConfigError(f"The layout {layout!r} is one file: give a name that ends in .safetensors, got {out}.")
    # A folder is replaced whole: other people's files in it would be lost.
    if (out.is_dir() and (single or any(out.iterdir()))) or (out.is_file() and not single):
        raise ConfigError(f"{out} exists; give a new name, or remove it first.")
    card = load_card(folder)
    tensors, sparse = _read(weights_path(folder, card)), card.get("type") == "delta"
    _check_layout_holds(layout, sparse=sparse, folder=folder)
    check_layout_loads(layout, str(card.get("pipeline", "")))
    if base is not None:
        base = _base_folder(base, card["base_sha256"], adapter=folder)
    if base is None and (layout == "merged" or sparse):
        raise ConfigError(f"{layout!r} of this adapter needs the shapes of its base's weights: give the base's folder.")
    with writing(out) as temporary:
        if layout == "merged" and base is not None:
            _write_merged(temporary, tensors, base, strength)
        elif layout == "difference":
            _write_difference(temporary, tensors, base, strength)
        else:
            _write_lora(temporary, tensors, layout, strength, pipeline=str(card.get("pipeline", "")))
    return out


def _check_layout_holds(layout: Layout, *, sparse: bool, folder: Path) -> None:
    if sparse and layout in ("diffusers", "peft", "kohya"):
        raise AdapterFormatError(
            f"The adapter in {folder} is from a weight-level mask: its difference is not of low rank, so {layout!r} "
            "cannot hold it. Export it as 'difference' or 'merged'."
        )


def check_layout_loads(layout: Layout, pipeline: str) -> None:
    """Refuse a LoRA file for a pipeline that has no loader of such files.

    Args:
        pipeline: its class in diffusers; the empty name is of none that is known.

    Raises:
        AdapterFormatError: it has none; says what to take instead.
    """
    kind = getattr(diffusers, pipeline, None)
    if layout == "diffusers" and kind is not None and not hasattr(kind, "load_lora_weights"):
        raise AdapterFormatError(
            f"A {pipeline} loads no LoRA files: diffusers has no loader for it. Export the adapter as 'merged', which "
            "it loads as a whole, as 'difference', to be added to its weights, or as 'peft', which "
            "`PeftModel.from_pretrained` puts into its transformer."
        )


def _base_folder(base: Path, wanted: str, *, adapter: Path) -> Path:
    source = find_base(base)
    if (found := identity(source)) != wanted:
        raise AdapterFormatError(f"The adapter in {adapter} belongs to the base {wanted[:12]}; {base} is {found[:12]}.")
    if source.path.is_file() or source.beside is not None:
        raise ConfigError(f"An export reads its base in diffusers layout, and {base} is a file: save it as a folder.")
    return source.path


def import_adapter(source: Path, base: Base, *, layout: Layout | None = None) -> dict[str, Tensor]:
    """Read another tool's adapter as this library's tensors; ``save_adapter`` makes an adapter of them.

    Alpha is honoured wherever a layout states it (kohya's ``.alpha``; peft's configuration, which diffusers keeps as
    metadata: ``lora_alpha``, ``alpha_pattern``, ``use_rslora``) and multiplied into B. ``stock.check_stored`` compares
    what the network answers with what was read and with what was stored of it.

    Args:
        source: a folder (diffusers, peft) or a ``.safetensors`` file (diffusers, kohya, difference).
        base: the base it is for; every tensor must find its module there.
        layout: what ``source`` is; None detects it.

    Returns:
        LoRA: ``<component>.<module>.lora_A.weight``, (r, in) or (r, in, h, w), and ``.lora_B.weight``, (out, r) or
        (out, r, 1, 1), float32, scaling 1. Difference: ``<component>.<module>.positions``, (n,) int32, flat, of what is
        not zero, and ``.values``, (n,) float32.

    Raises:
        AdapterFormatError: not safetensors, damaged, of an unknown layout, a kind that is not taken (DoRA, LoHa,
            LoKr, text encoders, fp8 and more, by its name), whole weights, or a tensor finds no use.
        ConfigError: the peft folder lacks its configuration.
    """
    layout = layout or _detect(source)
    if layout == "merged":
        raise AdapterFormatError(f"{source} is a whole model, no adapter: load it as a base instead.")
    if source.name == PEFT_WEIGHTS:
        source = source.parent
    if layout == "peft" and not source.is_dir():
        raise AdapterFormatError(
            f"{source} has peft's names, and what it is scaled by stands in {PEFT_CONFIG}: give the folder that holds "
            f"both, with the weights as {PEFT_WEIGHTS}."
        )
    path = source / (PEFT_WEIGHTS if layout == "peft" else WEIGHTS_NAME) if source.is_dir() else source
    tensors, config = _read(path), {}
    refuse_others(tensors, base.denoiser.component, source)
    if layout in ("diffusers", "peft"):
        config = read_json(source / PEFT_CONFIG) if layout == "peft" else read_metadata(path, base.denoiser.component)
    component, modules = base.denoiser.component, plain_modules(base.network)
    if layout == "kohya" and component != "unet":
        tensors, layout = from_kohya(type(base.pipeline), tensors, source), "diffusers"
    found = named(tensors, layout, modules, component=component, config=base.network.config, source=source)
    if layout == "difference":
        refuse_whole_weights(found, modules, source)
    result: dict[str, Tensor] = {}
    for module, parts in sorted(found.items()):
        fitted = _fitted(module, parts, modules[module].weight.shape, config)
        result |= {f"{component}.{module}{ending}": tensor for ending, tensor in fitted.items()}
    return result


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".safetensors" or not path.is_file():
        raise AdapterFormatError(f"No safetensors file {path}: only that format is read, as it cannot run code.")
    try:
        if tensors := load_file(path):
            return tensors
    except SafetensorError as error:
        raise AdapterFormatError(f"{path} is not a safetensors file: {error}.") from None
    raise AdapterFormatError(f"{path} holds no tensor.")


def _component(tensors: Mapping[str, Tensor]) -> str:
    """The name in the pipeline of the network that an adapter changes: every key begins with it."""
    return next(iter(tensors)).partition(".")[0]


def modules_changed(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the modules that an adapter's tensors, as this library stores them, are of, sorted."""
    return sorted({re.sub(r"\.(positions|values|lora_[AB]\.weight)$", "", key.partition(".")[2]) for key in tensors})


def _write_lora(path: Path, tensors: Mapping[str, Tensor], layout: Layout, strength: float, *, pipeline: str) -> None:
    """Alpha is the rank everywhere, so the scaling is 1, also for tools that lose alpha."""
    component = _component(tensors)
    ranks = {module: len(tensors[f"{component}.{module}{_A}"]) for module in modules_changed(tensors)}
    rank = max(ranks.values())
    # peft reads the keys as expressions that may match in the middle of a name; ^ and escapes make them exact.
    others = {f"^{re.escape(module)}": value for module, value in ranks.items() if value != rank}
    config: dict[str, Any] = {"r": rank, "lora_alpha": rank, "rank_pattern": others, "alpha_pattern": others}
    config["target_modules"] = _targets(component, sorted(ranks))
    if strength != 1:  # Into B, and not rounded to float16 again, where it could also overflow.
        tensors = {key: tensor.float() * (strength if key.endswith(_B) else 1) for key, tensor in tensors.items()}
    if layout == "kohya":
        factors = {name: (tensors[f"{component}.{name}{_A}"], tensors[f"{component}.{name}{_B}"]) for name in ranks}
        save_file(as_kohya(factors, pipeline=pipeline, component=component), path, metadata={"format": "pt"})
        return
    path.mkdir(parents=True)
    if layout == "diffusers":
        text = json.dumps({f"{component}.{key}": value for key, value in config.items()}, sort_keys=True)
        save_file(dict(tensors), path / WEIGHTS_NAME, metadata={"lora_adapter_metadata": text})
    else:
        write_json(path / PEFT_CONFIG, {**config, "peft_type": "LORA", "bias": "none", "inference_mode": True})
        renamed = {f"base_model.model.{key.partition('.')[2]}": tensor for key, tensor in tensors.items()}
        save_file(renamed, path / PEFT_WEIGHTS, metadata={"format": "pt"})


def _targets(component: str, modules: list[str]) -> list[str] | str:
    """Modules as peft takes them. In a transformer a name without a dot may be the ending of another module's.

    So FLUX.1's ``proj_out`` is, of one in each single block: by that name peft would take all of them.
    """
    if component != "unet" and any("." not in module for module in modules):
        return "|".join(re.escape(module) for module in modules)
    return modules


def _dense(tensors: Mapping[str, Tensor], module: str, shape: torch.Size | None, strength: float) -> Tensor:
    """A module's difference, dense, float32; ``shape`` is its weight's, unknown only to a LoRA."""
    component = _component(tensors)
    if f"{component}.{module}{_A}" in tensors:
        a, b = tensors[f"{component}.{module}{_A}"].float(), tensors[f"{component}.{module}{_B}"].float()
        dense = (b.flatten(1) @ a.flatten(1)).view(len(b), *a.shape[1:])
        _check_shape(dense.shape, shape or dense.shape, module)
    else:
        positions, values = tensors[f"{component}.{module}.positions"], tensors[f"{component}.{module}.values"]
        if shape is None or (len(positions) and not 0 <= positions.min() <= positions.max() < shape.numel()):
            raise AdapterFormatError(f"The adapter does not fit its base: positions outside the weight of {module}.")
        dense = FixedDelta(positions.long(), values.float(), shape)()
    return dense * strength


def _write_difference(path: Path, tensors: Mapping[str, Tensor], base: Path | None, strength: float) -> None:
    shapes: dict[str, torch.Size] = {}
    for file in sorted((base / _component(tensors)).glob("*.safetensors")) if base else ():
        with safe_open(file, framework="pt") as stored:
            shapes |= {key: torch.Size(stored.get_slice(key).get_shape()) for key in stored.keys()}  # noqa: SIM118
    dense = {
        module: _dense(tensors, module, shapes.get(f"{module}.weight"), strength) for module in modules_changed(tensors)
    }
    if not (
        changed := {
            f"{_component(tensors)}.{module}.weight": tensor for module, tensor in dense.items() if tensor.any()
        }
    ):
        raise AdapterFormatError("The adapter changes nothing: there is no difference to export.")
    save_file(changed, path, metadata={"format": "pt"})


def _write_merged(path: Path, tensors: Mapping[str, Tensor], base: Path, strength: float) -> None:
    """Files are changed one by one, so shards and variants stay as they are."""
    # Safetensors beside the folders are whole models in one file.
    single = {file.name for file in base.glob("*.safetensors")}
    shutil.copytree(base, path, ignore=lambda at, names: _STALE(at, names) | (single if Path(at) == base else set()))
    waiting = set(modules_changed(tensors))
    for file in sorted((path / _component(tensors)).glob("*.safetensors")):
        weights = load_file(file)
        here = [module for module in modules_changed(tensors) if f"{module}.weight" in weights]
        for module in here:
            old = weights[f"{module}.weight"]
            weights[f"{module}.weight"] = (old.float() + _dense(tensors, module, old.shape, strength)).to(old.dtype)
        save_file(weights, file, metadata={"format": "pt"})
        waiting -= set(here)
    if waiting:
        raise AdapterFormatError(f"The base in {base} has no {listing(sorted(waiting))}: nothing was merged.")


def _detect(source: Path) -> Layout:
    if source.is_dir():
        if (source / CARD_NAME).is_file():
            raise AdapterFormatError(f"{source} is an adapter of this library already: load it as it is.")
        marks: dict[str, Layout] = {PEFT_CONFIG: "peft", WEIGHTS_NAME: "diffusers", "model_index.json": "merged"}
        for name, layout in marks.items():
            if (source / name).is_file():
                return layout
        raise AdapterFormatError(f"No adapter in {source}: expected {PEFT_CONFIG} or {WEIGHTS_NAME} there.")
    keys = " ".join(_read(source))
    if "base_model." in keys or "lora_unet_" in keys:
        return "peft" if "base_model." in keys else "kohya"
    return "diffusers" if ".lora" in keys or "_lora." in keys else "difference"


def _fitted(module: str, parts: dict[str, Tensor], shape: torch.Size, config: dict[str, Any]) -> dict[str, Tensor]:
    """A and scaling * B, or positions and values, by the ending of their names; checked against the weight's shape."""
    if ".weight" in parts:
        _check_shape(parts[".weight"].shape, shape, module)
        flat = parts[".weight"].float().reshape(-1)
        positions = flat.nonzero().squeeze(1)
        return {".positions": positions.to(torch.int32), ".values": flat[positions]}
    if _A not in parts or _B not in parts:
        raise AdapterFormatError(f"{module} lacks a half of its pair: got {listing(sorted(parts))}.")
    a, b = parts[_A].float(), parts[_B].float()
    rank = a.shape[:1].numel()
    _check_shape(a.shape, (rank, *shape[1:]), f"{module}, A,")
    _check_shape(b.shape, (shape[0], rank, *[1] * (len(shape) - 2)), f"{module}, B,")
    return {_A: a, _B: b * scaling_of(parts.get(ALPHA), rank, module, config)}


def _check_shape(got: Sequence[int], expected: Sequence[int], module: str) -> None:
    if tuple(got) != tuple(expected):
        raise AdapterFormatError(f"{module} is {tuple(got)}; the base's weight asks for {tuple(expected)}.")
