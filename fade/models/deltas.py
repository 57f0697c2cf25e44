"""Differences added to weights: switched on and off, stacked, and taken out without a trace.

A weight-level mask leaves a change that is not of low rank, so no LoRA layer holds it. It is held as a
torch parametrization of the weight itself: the module's forward stays as it is, and the base's tensor is
kept untouched inside, so that taking the change out gives back its very bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fade.errors import NoMatchingModulesError, listing, nearest


class FixedDelta(nn.Module):
    """A stored sparse difference: values at flat positions of a weight, zero elsewhere."""

    def __init__(self, positions: Tensor, values: Tensor, shape: torch.Size) -> None:
        super().__init__()
        self.positions: Tensor
        self.values: Tensor
        self.register_buffer("positions", positions, persistent=False)
        self.register_buffer("values", values, persistent=False)
        self.shape = shape

    def forward(self) -> Tensor:
        """The difference, dense."""
        flat = torch.zeros(self.shape.numel(), dtype=self.values.dtype, device=self.values.device)
        flat[self.positions] = self.values
        return flat.view(self.shape)


class DeltaWeight(nn.Module):
    """W + sum of w_i D_i over the active differences; W itself, bit for bit, when none is active."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict()
        self.active: dict[str, float] = {}
        self.disabled = False
        self._kept: Tensor | None = None

    def activate(self, weights: Mapping[str, float]) -> None:
        """Which differences count, and how much; those of other modules are passed over."""
        self.active = {name: weight for name, weight in weights.items() if name in self.parts}
        self._kept = None

    def forward(self, weight: Tensor) -> Tensor:
        """The weight the module computes with."""
        if self.disabled or not self.active:
            return weight
        # A difference that is being trained changes between calls: only fixed ones are summed once.
        trained = any(parameter.requires_grad for parameter in self.parts.parameters())
        if self._kept is None or trained:
            total = weight
            for name, factor in self.active.items():
                total = total + factor * self.parts[name]().to(weight.dtype)
            if trained:
                return total
            self._kept = total.detach()
        return self._kept


def plain_modules(network: nn.Module) -> dict[str, Any]:
    """Name to module for every Linear and Conv2d of the base, looking through LoRA wrappers.

    Not among them: convolutions in groups, whose rows read different inputs, so that no pair of factors changes them.
    """
    return {
        name.removesuffix(".base_layer"): module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and getattr(module, "groups", 1) == 1
        and ".lora_" not in name
        and ".parametrizations." not in name
    }


def delta_weights(network: nn.Module) -> dict[str, DeltaWeight]:
    """Module name to its difference, where it has one."""
    found = {}
    for name, module in plain_modules(network).items():
        if parametrize.is_parametrized(module, "weight"):
            found[name] = module.parametrizations["weight"][0]
    return found


def add_delta(network: nn.Module, name: str, parts: Mapping[str, nn.Module]) -> None:
    """Hang differences called ``name`` on the named modules' weights, where these lie, switched off.

    Args:
        parts: module name to a module whose forward gives the difference, of the weight's shape.

    Raises:
        NoMatchingModulesError: the network has no such module; nothing was added.
    """
    modules = plain_modules(network)
    if unknown := [key for key in parts if key not in modules]:
        raise NoMatchingModulesError(
            f"target modules match no layer: got {listing(unknown)}. {nearest(unknown[0], modules)}"
        )
    for key, part in parts.items():
        module = modules[key]
        if not parametrize.is_parametrized(module, "weight"):
            parametrize.register_parametrization(module, "weight", DeltaWeight())
        module.parametrizations["weight"][0].parts[name] = part.to(module.weight.device)


def remove_deltas(network: nn.Module) -> None:
    """Take every difference out: the weights are the base's own tensors again."""
    for module in plain_modules(network).values():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
