"""Sparse LoRA: low-rank changes confined to a mask, through stock peft, diffusers and torch.

delta_weight = alpha / rank * B A                            masks of whole modules: a plain LoRA
delta_weight = alpha / rank * (m_out * B)(A * m_in)          neuron masks: a LoRA with zero rows and columns
delta_weight = alpha / rank * (B A) * M                      weight masks: a difference on the weight itself
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from fade.errors import MaskMismatchError, NoMatchingModulesError, listing, nearest
from fade.methods.closed_form import LowRank
from fade.methods.fade.masks import Mask
from fade.models.deltas import add_delta, delta_weights, plain_modules
from fade.models.denoiser import Denoiser
from fade.seeding import GLOBAL_GENERATOR, derive_seed, torch_generator

WHOLE_UP_TO = 2**19
"""Entries of a weight up to which summing weights beats a LoRA's branch in training; the ratio of bandwidth to
arithmetic of present processors, not of one model."""


def lora_layers(network: nn.Module) -> dict[str, LoraLayer]:
    """Module name to its LoRA layer."""
    return {name: module for name, module in network.named_modules() if isinstance(module, LoraLayer)}


def add_sparse_lora(network: Any, mask: Mask, *, rank: int, alpha: float, seed: int, name: str) -> list[Tensor]:
    """Put a trainable adapter inside the mask; give its tensors.

    B = 0 at first, so the student starts as the teacher. What the mask leaves out is zero and receives
    no gradient, hence stays zero.

    Raises:
        NoMatchingModulesError: the mask names a module the network has not.
        MaskMismatchError: a part of the mask does not have the shape of its weight.
    """
    known = plain_modules(network)
    if unknown := [module for module in mask.modules if module not in known]:
        raise NoMatchingModulesError(
            f"target modules match no layer: got {listing(unknown)}. {nearest(unknown[0], known)}"
        )
    _check_shapes(mask, {module: known[module].weight for module in mask.modules})
    if mask.granularity == "weight":
        return _add_masked_low_rank(network, mask, rank=rank, alpha=alpha, seed=seed, name=name)
    with GLOBAL_GENERATOR, torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "lora"))
        network.add_adapter(
            LoraConfig(r=rank, lora_alpha=alpha, target_modules=exactly(mask.modules, known), init_lora_weights=True),
            adapter_name=name,
        )
    hold_in_float32(network, name)
    layers = lora_layers(network)
    if (placed := set(layers)) != set(mask.modules):
        raise NoMatchingModulesError(
            f"peft adapted other modules than the mask names: {listing(sorted(placed ^ set(mask.modules)))}."
        )
    for module in mask.rows:
        _confine(layers[module].lora_B[name].weight, mask.rows[module], 0)
        if module in mask.columns:
            _confine(layers[module].lora_A[name].weight, mask.columns[module], 1)
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def exactly(modules: Iterable[str], known: Iterable[str]) -> list[str] | str:
    """Modules as peft takes them: by name, or as one expression where a name is the ending of another module's.

    FLUX.1 has a ``proj_out`` and one in each of its single blocks; by that name peft would take all of them.
    """
    named = sorted(modules)
    endings = tuple(f".{name}" for name in named)
    if any(name.endswith(endings) for name in set(known) - set(named)):
        return "|".join(re.escape(name) for name in named)
    return named


def begin_with(network: nn.Module, name: str, changes: Mapping[str, LowRank]) -> None:
    """Let an adapter begin with given changes: the first rows of A and columns of B are theirs, the others as drawn.

    Raises:
        MaskMismatchError: a change is of higher rank than the adapter, or its module is not in it.
    """
    layers = lora_layers(network)
    for module, change in changes.items():
        count = len(change.A)
        if module not in layers or count > layers[module].r[name]:
            raise MaskMismatchError(
                f"The change of {module} is of rank {count}; the adapter holds "
                f"{'nothing' if module not in layers else f'rank {layers[module].r[name]}'} there."
            )
        with torch.no_grad():
            layers[module].lora_A[name].weight[:count] = change.A
            layers[module].lora_B[name].weight[:, :count] = change.B / layers[module].scaling[name]


def hold_in_float32(network: nn.Module, name: str) -> None:
    """An adapter's own tensors in float32: peft gives them the base's type, and bfloat16 would round what is learnt."""
    for layer in lora_layers(network).values():
        if name in layer.lora_A:
            layer.lora_A[name].float()
            layer.lora_B[name].float()


def _check_shapes(mask: Mask, weights: dict[str, Tensor]) -> None:
    for module, weight in weights.items():
        for part, expected in (
            (mask.rows.get(module), weight.shape[:1]),
            (mask.columns.get(module), weight.shape[1:2]),
            (mask.weights.get(module), weight.shape),
        ):
            if part is not None and part.shape != expected:
                raise MaskMismatchError(
                    f"The mask of {module} is {tuple(part.shape)}; its weight asks for {tuple(expected)}. "
                    "A mask fits the base it was made from; run the saliency step on this one."
                )


def _confine(parameter: Tensor, kept: Tensor, dim: int) -> None:
    """Zero what is not kept along a dimension, now and in every gradient."""
    shape = [1] * parameter.dim()
    shape[dim] = -1
    factor = kept.to(parameter.device, parameter.dtype).view(shape)
    with torch.no_grad():
        parameter.mul_(factor)
    parameter.register_hook(lambda gradient: gradient * factor)


class MaskedLowRank(nn.Module):
    """scaling (B A) * M, of a weight's shape; gradients reach A and B through the mask alone."""

    def __init__(self, mask: Tensor, *, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        outputs, inputs = mask.shape[0], mask[0].numel()
        # As peft draws A: Kaiming uniform with a = sqrt(5), which is U(-1, 1) / sqrt(inputs).
        self.lora_A = nn.Parameter((2 * torch.rand(rank, inputs, generator=generator) - 1) / math.sqrt(inputs))
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank))
        self.scaling = alpha / rank
        self.mask: Tensor
        self.register_buffer("mask", mask, persistent=False)

    def forward(self) -> Tensor:
        """The difference, dense; zero off the mask."""
        product = (self.lora_B @ self.lora_A).view(self.mask.shape)
        return product * self.mask * self.scaling


def _add_masked_low_rank(network: Any, mask: Mask, *, rank: int, alpha: float, seed: int, name: str) -> list[Tensor]:
    generator = torch_generator(seed, "masked low rank")
    parts = {
        module: MaskedLowRank(mask.weights[module], rank=rank, alpha=alpha, generator=generator)
        for module in mask.modules
    }
    add_delta(network, name, parts)
    for delta in delta_weights(network).values():
        delta.activate({name: 1.0})
    return [parameter for part in parts.values() for parameter in part.parameters()]


@contextmanager
def computed_whole(network: nn.Module) -> Iterator[None]:
    """Inside, small modules compute with W + the sum of their adapters' scaled B A itself   (ours).

    A LoRA's branch reads and writes the module's whole input and output several times more, forward and
    backward, for little arithmetic; the sum of the weights costs a product of the weight's own size. Up to
    ``WHOLE_UP_TO`` entries the sum is faster (measured, see ``benchmarks/step.py``); larger modules keep
    their branch. Both are the same function, up to rounding. Which adapters are on, and how strongly, is read
    at every forward; modules that get their first adapter inside are not among them.
    """
    changed = [layer for layer in lora_layers(network).values() if layer.get_base_layer().weight.numel() <= WHOLE_UP_TO]
    for layer in changed:
        layer.forward = partial(_whole, layer)
    try:
        yield
    finally:
        for layer in changed:
            del layer.forward


def _whole(layer: Any, value: Tensor) -> Tensor:
    base, on = layer.get_base_layer(), [name for name in layer.active_adapters if name in layer.lora_A]
    if layer._disable_adapters or not on:
        answer: Tensor = base(value)
        return answer
    # The sum in float32: in bfloat16 a small change would be rounded away twice.
    with torch.autocast(value.device.type, enabled=False):
        weight = base.weight.flatten(1).float()
        for name in on:
            left, right = (factor[name].weight.flatten(1) for factor in (layer.lora_B, layer.lora_A))
            # One pass over the weight, forward and backward, where a product, a scaling and a sum take three.
            weight = torch.addmm(weight, left, right, alpha=layer.scaling[name])
        weight = weight.view_as(base.weight).to(base.weight.dtype)
    if isinstance(base, nn.Conv2d):
        answer = base._conv_forward(value, weight, base.bias)
    else:
        answer = functional.linear(value, weight, base.bias)
    return answer


@contextmanager
def adapters_disabled(network: nn.Module) -> Iterator[None]:
    """The teacher: the same network with every adapter off. Restores what was on; nests."""
    layers = list(lora_layers(network).values())
    deltas = list(delta_weights(network).values())
    before = [layer._disable_adapters for layer in layers], [delta.disabled for delta in deltas]
    try:
        for layer in layers:
            layer._disable_adapters = True
        for delta in deltas:
            delta.disabled = True
        yield
    finally:
        for layer, disabled in zip(layers, before[0], strict=True):
            layer._disable_adapters = disabled
        for delta, disabled in zip(deltas, before[1], strict=True):
            delta.disabled = disabled


def adapter_tensors(denoiser: Denoiser, name: str) -> dict[str, Tensor]:
    """The adapter as it is stored: the scaling, alpha / rank, is already in it.

    LoRA: diffusers' keys ``<component>.<module>.lora_A.weight`` and ``.lora_B.weight``; scaling 1 wherever they
    are loaded, also by tools that lose alpha. Differences: ``<component>.<module>.positions`` (flat, int32, ascending)
    and ``<component>.<module>.values``: of a weight mask one value for each of its weights, else what is not zero.
    """
    network, component = denoiser.network, denoiser.component
    tensors: dict[str, Tensor] = {}
    for module, layer in lora_layers(network).items():
        if name in layer.lora_A:
            tensors[f"{component}.{module}.lora_A.weight"] = layer.lora_A[name].weight.detach().clone()
            tensors[f"{component}.{module}.lora_B.weight"] = layer.lora_B[name].weight.detach() * layer.scaling[name]
    for module, delta in delta_weights(network).items():
        if name in delta.parts:
            flat = delta.parts[name]().detach().reshape(-1)
            mask = getattr(delta.parts[name], "mask", None)
            # Without a mask, what float16 holds: what is 0 there changes nothing.
            positions = (flat.to(torch.float16) if mask is None else mask.view(-1)).nonzero().squeeze(1)
            if mask is not None or len(positions):
                tensors[f"{component}.{module}.positions"] = positions.to(torch.int32)
                tensors[f"{component}.{module}.values"] = flat[positions]
    return tensors


def check_inside_mask(network: nn.Module, mask: Mask, name: str) -> None:
    """Check after training that nothing outside the mask has moved.

    Raises:
        MaskMismatchError: names the first module where something has.
    """
    layers, deltas = lora_layers(network), delta_weights(network)
    placed = {module for module, layer in layers.items() if name in layer.lora_A}
    placed |= {module for module, delta in deltas.items() if name in delta.parts}
    if outside := sorted(placed - set(mask.modules)):
        raise MaskMismatchError(f"The adapter changes modules outside its mask: {listing(outside)}.")
    for module in placed:
        allowed: Tensor | None = None
        if module in mask.weights:
            allowed, change = mask.weights[module], deltas[module].parts[name]()
        else:
            change = layers[module].get_delta_weight(name)
            if module in mask.rows:
                columns = mask.columns.get(module, torch.ones(change.shape[1], dtype=torch.bool))
                allowed = mask.rows[module][:, None] & columns[None, :]
                allowed = allowed.view(*allowed.shape, *[1] * (change.dim() - 2)).expand(change.shape)
        if allowed is not None and bool(change.detach().cpu()[~allowed].any()):
            raise MaskMismatchError(f"Training moved weights of {module} that its mask leaves out.")
