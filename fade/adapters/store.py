"""Adapters on disk and in a pipeline.

An adapter is a folder of two files: ``pytorch_lora_weights.safetensors`` (diffusers' LoRA format, so
stock diffusers loads it) and ``card.json``, which binds it to its base, mask and parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fade.errors import AdapterFormatError, ConfigError, listing
from fade.files import read_json, sha256_file, write_json, writing
from fade.method.sparse_lora import lora_layers
from fade.models.sd import StableDiffusion

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
CARD_NAME = "card.json"
FORMAT = "fade-adapter/1"


def save_adapter(folder: Path, tensors: Mapping[str, Tensor], card: Mapping[str, Any]) -> str:
    """Write an adapter; give the SHA-256 of its weights.

    Weights are stored as float16. One metadata key, sorted tensors and sorted JSON: equal adapters
    are equal bytes.

    Args:
        tensors: diffusers' keys (``unet.<module>.lora_A.weight``), scaling already in B.
        card: what the adapter is bound to; ``format`` and ``adapter_sha256`` are added.
    """
    half = {name: tensors[name].to(torch.float16).contiguous().cpu() for name in sorted(tensors)}
    if bad := [name for name, tensor in half.items() if not torch.isfinite(tensor).all()]:
        raise AdapterFormatError(
            f"The adapter holds values that are not finite in {listing(bad)}; it was not saved. "
            "Lower the learning rate."
        )
    with writing(folder) as temporary:
        temporary.mkdir(parents=True)
        save_file(half, temporary / WEIGHTS_NAME, metadata={"format": "pt"})
        digest = sha256_file(temporary / WEIGHTS_NAME)
        write_json(temporary / CARD_NAME, {**card, "format": FORMAT, "adapter_sha256": digest})
    return digest


def load_card(folder: Path) -> dict[str, Any]:
    """The card of an adapter whose weights are the ones the card names.

    Raises:
        AdapterFormatError: a file is missing, or the weights' hash is another one.
    """
    weights = folder / WEIGHTS_NAME
    for path in (weights, folder / CARD_NAME):
        if not path.is_file():
            raise AdapterFormatError(f"No adapter in {folder}: {path.name} is missing.")
    card = read_json(folder / CARD_NAME)
    if card.get("format") != FORMAT:
        raise AdapterFormatError(f"{folder} has the format {card.get('format')!r}; expected {FORMAT!r}.")
    if (found := sha256_file(weights)) != card.get("adapter_sha256"):
        raise AdapterFormatError(
            f"The adapter in {folder} was changed: its hash is {found[:12]}, its card says "
            f"{str(card.get('adapter_sha256'))[:12]}. It is not loaded; fetch it again."
        )
    return card


def apply_adapter(sd: StableDiffusion, folder: Path, *, name: str) -> dict[str, Any]:
    """Load an adapter into the UNet, switched off until ``activate`` names it; others stay as they are.

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
        tensors = load_file(folder / WEIGHTS_NAME)
    except SafetensorError as error:
        raise AdapterFormatError(f"The adapter in {folder} is not a safetensors file: {error}.") from None
    tensors = {key: tensor.float() for key, tensor in tensors.items()}
    sd.unet.load_lora_adapter(dict(tensors), prefix="unet", adapter_name=name)
    _check_all_used(sd, folder, tensors, name)
    activate(sd, sd.active)
    return card


def _check_all_used(sd: StableDiffusion, folder: Path, tensors: Mapping[str, Tensor], name: str) -> None:
    used: dict[str, Tensor] = {}
    for module, layer in lora_layers(sd.unet).items():
        if name in layer.lora_A:
            used[f"unet.{module}.lora_A.weight"] = layer.lora_A[name].weight
            used[f"unet.{module}.lora_B.weight"] = layer.lora_B[name].weight
            if layer.scaling[name] != 1.0:
                raise AdapterFormatError(f"{module} was loaded with scaling {layer.scaling[name]}; expected 1.")
    unused = sorted(key for key in tensors if key not in used or not torch.equal(used[key].float(), tensors[key]))
    if unused:
        raise AdapterFormatError(
            f"The adapter in {folder} was not used to its last tensor: {listing(unused)} found no module of the base."
        )


def activate(sd: StableDiffusion, weights: Mapping[str, float]) -> None:
    """Switch on exactly the named adapters, stacked with their weights; none switches all off.

    Raises:
        ConfigError: a name was not loaded.
    """
    loaded = {name for layer in lora_layers(sd.unet).values() for name in layer.lora_A}
    if unknown := sorted(set(weights) - loaded):
        raise ConfigError(f"No adapter {listing(unknown)} is loaded; loaded are {listing(sorted(loaded)) or 'none'}.")
    sd.active = dict(weights)
    if weights:
        sd.unet.enable_adapters()
        sd.unet.set_adapters(list(weights), list(weights.values()))
    elif loaded:
        sd.unet.disable_adapters()


def restore_base(sd: StableDiffusion) -> None:
    """Take every adapter out: the UNet's modules and bits are the base's again.

    Adapters are never fused into the weights, so nothing has to be subtracted.
    """
    sd.active = {}
    if lora_layers(sd.unet):
        sd.unet.unload_lora()
