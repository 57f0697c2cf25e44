"""Sparse LoRA: low-rank changes confined to the masked modules, through stock peft and diffusers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fade.errors import NoMatchingModulesError, listing, nearest
from fade.seeding import derive_seed


def lora_layers(unet: nn.Module) -> dict[str, LoraLayer]:
    """Module name to its LoRA layer."""
    return {name: module for name, module in unet.named_modules() if isinstance(module, LoraLayer)}


def add_sparse_lora(
    unet: Any, modules: Sequence[str], *, rank: int, alpha: float, seed: int, name: str
) -> list[Tensor]:
    """Put a LoRA on exactly the named modules; give its trainable tensors.

    delta_weight = alpha / rank * B A, with B = 0 at first, so the student starts as the teacher.

    Raises:
        NoMatchingModulesError: a name is no Linear or Conv2d of the network.
    """
    known = {key for key, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    if unknown := [module for module in modules if module not in known]:
        raise NoMatchingModulesError(
            f"target modules match no layer: got {listing(unknown)}. {nearest(unknown[0], known)}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "lora"))
        unet.add_adapter(
            LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(modules), init_lora_weights=True),
            adapter_name=name,
        )
    if (placed := set(lora_layers(unet))) != set(modules):
        raise NoMatchingModulesError(
            f"peft adapted other modules than the mask names: {listing(sorted(placed ^ set(modules)))}."
        )
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


@contextmanager
def adapters_disabled(unet: nn.Module) -> Iterator[None]:
    """The teacher: the same network with every adapter off. Restores what was on; nests."""
    layers = lora_layers(unet)
    before = {name: layer._disable_adapters for name, layer in layers.items()}
    try:
        for layer in layers.values():
            layer._disable_adapters = True
        yield
    finally:
        for name, layer in layers.items():
            layer._disable_adapters = before[name]


def adapter_tensors(unet: nn.Module, name: str) -> dict[str, Tensor]:
    """The adapter as diffusers' LoRA keys, with alpha / rank multiplied into B.

    The scaling of what is stored is therefore 1 wherever it is loaded, also by tools that lose alpha.
    """
    tensors: dict[str, Tensor] = {}
    for module, layer in lora_layers(unet).items():
        if name not in layer.lora_A:
            continue
        tensors[f"unet.{module}.lora_A.weight"] = layer.lora_A[name].weight.detach().clone()
        tensors[f"unet.{module}.lora_B.weight"] = layer.lora_B[name].weight.detach() * layer.scaling[name]
    return tensors
