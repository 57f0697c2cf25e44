"""Adapters on disk and in a pipeline.

An adapter is a folder of two files: its weights, and ``card.json``, which binds them to base, mask and
parameters. The weights are ``pytorch_lora_weights.safetensors`` (diffusers' LoRA format, so stock
diffusers loads it) or, from a weight-level mask, ``weight_delta.safetensors`` (positions and values of a
sparse difference, which no LoRA format holds).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fade.adapters.card import CARD_NAME, DELTA_NAME, FORMAT, WEIGHTS_NAME, load_card, weights_path
from fade.errors import AdapterFormatError, ConfigError, listing
from fade.files import sha256_file, write_json, writing
from fade.methods.fade.sparse_lora import hold_in_float32, lora_layers
from fade.models.base import Base
from fade.models.deltas import FixedDelta, add_delta, delta_weights, plain_modules, remove_deltas
from fade.seeding import GLOBAL_GENERATOR

_MOST_LOST = 1e-3


def save_adapter(folder: Path, tensors: Mapping[str, Tensor], card: Mapping[str, Any]) -> str:
    """Write an adapter; give the SHA-256 of its weights.

    Weights are stored as float16, or as float32 where float16 would lose more than 0.1 % of some tensor: a small
    alpha beside a high rank makes such small factors. One metadata key, sorted tensors and sorted JSON: equal
    adapters are equal bytes.

    Args:
        tensors: diffusers' keys (``<component>.<module>.lora_A.weight``), scaling already in B.
        card: what the adapter is bound to; ``type`` (``lora`` or ``delta``), ``format`` and
            ``adapter_sha256`` are added.
    """
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    held = torch.float32 if any(_lost(tensor) > _MOST_LOST for tensor in floats.values()) else torch.float16
    stored = {
        name: (tensors[name].to(held) if name in floats else tensors[name]).contiguous().cpu()
        for name in sorted(tensors)
    }
    if bad := [name for name, tensor in stored.items() if not torch.isfinite(tensor).all()]:
        raise AdapterFormatError(
            f"The adapter holds values that are not finite in {listing(bad)}; it was not saved. "
            "Lower the learning rate."
        )
    kind = "delta" if any(name.endswith(".positions") for name in stored) else "lora"
    with writing(folder) as temporary:
        temporary.mkdir(parents=True)
        path = temporary / (DELTA_NAME if kind == "delta" else WEIGHTS_NAME)
        save_file(stored, path, metadata={"format": "pt"})
        digest = sha256_file(path)
        write_json(temporary / CARD_NAME, {**card, "type": kind, "format": FORMAT, "adapter_sha256": digest})
    return digest


def _lost(tensor: Tensor) -> float:
    """What float16 loses of a tensor, in parts of its norm; what overflows is not lost but not finite."""
    exact, norm = tensor.float(), torch.linalg.vector_norm(tensor.float())
    lost = torch.linalg.vector_norm(exact - tensor.to(torch.float16).float()) / norm
    return float(lost) if torch.isfinite(lost) else 0.0


def apply_adapter(sd: Base, folder: Path, *, name: str) -> dict[str, Any]:
    """Load an adapter into the denoiser, switched off until ``activate`` names it; others stay as they are.

    Raises:
        AdapterFormatError: damaged, for another base, or a tensor of it found no module.
    """
    card = load_card(folder)
    if card["base_sha256"] != sd.sha256:
        raise AdapterFormatError(
            f"The adapter in {folder} belongs to the base {card['base_sha256'][:12]}; the one loaded is "
            f"{sd.sha256[:12]}. Load that base, or erase the concept on this one."
        )
    try:
        tensors = load_file(weights_path(folder, card))
    except SafetensorError as error:
        raise AdapterFormatError(f"The adapter in {folder} is not a safetensors file: {error}.") from None
    put_in(sd, tensors, name=name, origin=str(folder))
    return card


def put_in(base: Base, tensors: Mapping[str, Tensor], *, name: str, origin: str) -> None:
    """Hang an adapter's tensors on the denoiser, switched off until ``activate`` names it.

    Args:
        origin: where they are from, for error messages.

    Raises:
        AdapterFormatError: a tensor found no module, or does not fit it.
    """
    if any(key.endswith(".positions") for key in tensors):
        _add_fixed_deltas(base, tensors, name=name, origin=origin)
    else:
        floats = {key: tensor.float() for key, tensor in tensors.items()}
        with GLOBAL_GENERATOR:  # peft draws a beginning before it takes what is given
            base.network.load_lora_adapter(dict(floats), prefix=base.denoiser.component, adapter_name=name)
        _unround(base, floats, name)
        _check_all_used(base, origin, floats, name)
    activate(base, base.active)


def _add_fixed_deltas(sd: Base, tensors: Mapping[str, Tensor], *, name: str, origin: str) -> None:
    known = plain_modules(sd.network)
    modules = sorted({key.removeprefix(f"{sd.denoiser.component}.").rpartition(".")[0] for key in tensors})
    if unknown := [module for module in modules if module not in known]:
        raise AdapterFormatError(
            f"The adapter in {origin} was not used to its last tensor: {listing(unknown)} found no module of the base."
        )
    parts = {}
    for module in modules:
        positions, values = (
            tensors.get(f"{sd.denoiser.component}.{module}.positions"),
            tensors.get(f"{sd.denoiser.component}.{module}.values"),
        )
        shape = known[module].weight.shape
        if positions is None or values is None or len(positions) != len(values):
            raise AdapterFormatError(f"The adapter in {origin} is damaged: {module} lacks positions or values.")
        if len(positions) and not 0 <= int(positions.min()) <= int(positions.max()) < shape.numel():
            raise AdapterFormatError(f"The adapter in {origin} is damaged: positions outside the weight of {module}.")
        parts[module] = FixedDelta(positions.long(), values.float(), shape)
    add_delta(sd.network, name, parts)


def _unround(sd: Base, tensors: Mapping[str, Tensor], name: str) -> None:
    """On a base held in bfloat16 the tensors were rounded while they were loaded: put in what was stored."""
    if next(sd.network.parameters()).dtype == torch.float32:
        return
    hold_in_float32(sd.network, name)
    for module, layer in lora_layers(sd.network).items():
        for part, tensor in (
            (f"{sd.denoiser.component}.{module}.lora_{letter}.weight", getattr(layer, f"lora_{letter}"))
            for letter in "AB"
        ):
            if part in tensors and name in tensor:
                tensor[name].weight.data.copy_(tensors[part])


def _check_all_used(sd: Base, origin: str, tensors: Mapping[str, Tensor], name: str) -> None:
    used: dict[str, Tensor] = {}
    for module, layer in lora_layers(sd.network).items():
        if name in layer.lora_A:
            used[f"{sd.denoiser.component}.{module}.lora_A.weight"] = layer.lora_A[name].weight
            used[f"{sd.denoiser.component}.{module}.lora_B.weight"] = layer.lora_B[name].weight
            if layer.scaling[name] != 1.0:
                raise AdapterFormatError(f"{module} was loaded with scaling {layer.scaling[name]}; expected 1.")
    unused = sorted(key for key in tensors if key not in used or not torch.equal(used[key].float(), tensors[key]))
    if unused:
        raise AdapterFormatError(
            f"The adapter in {origin} was not used to its last tensor: {listing(unused)} found no module of the base."
        )


def activate(base: Base, weights: Mapping[str, float]) -> None:
    """Switch on exactly the named adapters, stacked with their weights; none switches all off.

    Raises:
        ConfigError: a name was not loaded.
    """
    layers, deltas = lora_layers(base.network), delta_weights(base.network)
    low_rank = {name for layer in layers.values() for name in layer.lora_A}
    loaded = low_rank | {name for delta in deltas.values() for name in delta.parts}
    if unknown := sorted(set(weights) - loaded):
        raise ConfigError(f"No adapter {listing(unknown)} is loaded; loaded are {listing(sorted(loaded)) or 'none'}.")
    base.active = dict(weights)
    for delta in deltas.values():
        delta.activate(weights)
    if on := {name: weight for name, weight in weights.items() if name in low_rank}:
        base.network.enable_adapters()
        base.network.set_adapters(list(on), list(on.values()))
    elif low_rank:
        base.network.disable_adapters()


def restore_base(sd: Base) -> None:
    """Take every adapter out: the denoiser's modules and bits are the base's again.

    Adapters are never fused into the weights, so nothing has to be subtracted.
    """
    sd.active = {}
    remove_deltas(sd.network)
    if lora_layers(sd.network):
        sd.network.unload_lora()
