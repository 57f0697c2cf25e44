"""Adapters that belong to a request, not to the network (ours).

The network's modules stay the base's. Each of them looks up, at every forward, the set of adapters of the
request it computes for, and adds their change; outside a request it refuses. So a new set takes over
between two requests without a lock, a request in flight keeps the set it began with, several requests
with different sets may run at once, and taking everything out leaves the base's bits: they never moved.

A set holds, for each module, the sum of its adapters, whatever their number: low-rank factors joined
along the rank (B_1 A_1 + B_2 A_2 = [B_1 B_2] [A_1; A_2], exactly), or, where that would be larger than
the weight itself or an adapter is a sparse difference, the changed weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fade.errors import AdapterFormatError, RefusedError, listing
from fade.models.deltas import plain_modules
from fade.models.denoiser import Denoiser


@dataclass(frozen=True, slots=True)
class Factors:
    """A module's change as one low-rank product: ``down`` (R, in, ...) and ``up`` (out, R)."""

    down: Tensor
    up: Tensor


@dataclass(frozen=True, slots=True)
class Changed:
    """A module's whole changed weight."""

    weight: Tensor


@dataclass(frozen=True, eq=False)
class AdapterSet:
    """What a request computes with.

    Attributes:
        overlay: whose network it is for: a request of one runtime opens no other one's network.
        changes: module name to its change; empty is the base alone.
    """

    overlay: Overlay
    changes: Mapping[str, Factors | Changed]


_request: ContextVar[AdapterSet | None] = ContextVar("fade_request", default=None)


@contextmanager
def using(adapters: AdapterSet) -> Iterator[None]:
    """Compute with these adapters in this thread or task; nests."""
    token = _request.set(adapters)
    try:
        yield
    finally:
        _request.reset(token)


class Overlay:
    """A denoiser whose modules ask the request for its adapters; outside a request they refuse to compute.

    Args:
        denoiser: its network's parameters, buffers and module tree are left as they are.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        network = denoiser.network
        self.network, self._component = network, denoiser.component
        self._modules: dict[str, Any] = dict(plain_modules(network))
        # Not by hooks, which `network.forward()` passes by; on every module, as `type(network).forward` passes by one.
        network.forward = self._only_in_requests(network.forward)
        for name, module in self._modules.items():
            module.forward = self._with_changes(name, module)

    def prepare(self, adapters: Sequence[tuple[str, float, Mapping[str, Tensor]]]) -> AdapterSet:
        """Join adapters into one set, in order; requests in flight are not touched.

        Args:
            adapters: name (for messages), weight, tensors as ``store.save_adapter`` writes them.

        Raises:
            AdapterFormatError: a tensor finds no module, does not fit it, is not finite, or lacks its other half.
        """
        factors: dict[str, list[Factors]] = {}
        dense: dict[str, Tensor] = {}
        for name, weight, tensors in adapters:
            for module, part in self._parts(name, tensors).items():
                if isinstance(part, Factors):
                    factors.setdefault(module, []).append(Factors(part.down, weight * part.up))
                else:
                    dense[module] = weight * part + dense[module] if module in dense else weight * part
        changes = {
            module: _joined(self._modules[module], factors.get(module, []), dense.get(module))
            for module in sorted({*factors, *dense})
        }
        return AdapterSet(self, changes)

    def remove(self) -> None:
        """Take the overlay off: the network is the plain base again."""
        for module in (self.network, *self._modules.values()):
            vars(module).pop("forward", None)

    def _changes(self) -> Mapping[str, Factors | Changed]:
        """What the request in this thread changes.

        Raises:
            RefusedError: none is open for this network.
        """
        adapters = _request.get()
        if adapters is None or adapters.overlay is not self:
            raise RefusedError(
                "This denoiser belongs to a runtime and computes only for its requests: call the runtime instead of "
                "the pipeline, or use `with runtime.serving():`."
            )
        return adapters.changes

    def _only_in_requests(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(plain)
        def forward(*arguments: Any, **options: Any) -> Any:
            self._changes()
            return plain(*arguments, **options)

        return forward

    def _with_changes(self, name: str, module: Any) -> Callable[[Tensor], Tensor]:
        """The module's forward; without a change it computes what it always did."""
        plain = module.forward

        @functools.wraps(plain)
        def forward(value: Tensor) -> Tensor:
            change = self._changes().get(name)
            if change is None:
                unchanged: Tensor = plain(value)
                return unchanged
            if isinstance(change, Changed):
                return _apply(module, value, change.weight, module.bias)
            return plain(value) + _low_rank(module, value, change)

        return forward

    def _parts(self, adapter: str, tensors: Mapping[str, Tensor]) -> dict[str, Factors | Tensor]:
        """Module to its factors or its dense difference, each tensor used and checked."""
        if bad := sorted(k for k, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()):
            raise AdapterFormatError(f"{adapter} holds values that are not finite in {listing(bad)}.")
        rest = dict(tensors)
        parts: dict[str, Factors | Tensor] = {}
        for name, module in self._modules.items():
            shape = module.weight.shape
            key = f"{self._component}.{name}"
            down, up = rest.pop(f"{key}.lora_A.weight", None), rest.pop(f"{key}.lora_B.weight", None)
            positions, values = rest.pop(f"{key}.positions", None), rest.pop(f"{key}.values", None)
            if (down is None) != (up is None) or (positions is None) != (values is None):
                raise AdapterFormatError(f"{adapter} is damaged: {name} lacks one half of its tensors.")
            if down is not None and up is not None:
                up = up.flatten(1)
                if down.shape[1:] != shape[1:] or up.shape != (shape[0], down.shape[0]):
                    raise AdapterFormatError(
                        f"{adapter} does not fit {name}: factors {tuple(up.shape)} and {tuple(down.shape)} for a "
                        f"weight of {tuple(shape)}."
                    )
                parts[name] = Factors(down.to(module.weight), up.to(module.weight))
            elif positions is not None and values is not None:
                parts[name] = _dense(adapter, name, positions, values, module.weight)
        if rest:
            raise AdapterFormatError(
                f"{adapter} was not used to its last tensor: {listing(sorted(rest))} found no module of the base."
            )
        return parts


def _dense(adapter: str, module: str, positions: Tensor, values: Tensor, weight: Tensor) -> Tensor:
    if positions.shape != values.shape or positions.dim() != 1:
        raise AdapterFormatError(
            f"{adapter} is damaged: {module} has {len(positions)} positions, {len(values)} values."
        )
    if len(positions) and not 0 <= int(positions.min()) <= int(positions.max()) < weight.numel():
        raise AdapterFormatError(f"{adapter} is damaged: positions outside the weight of {module}.")
    flat = torch.zeros(weight.numel(), dtype=weight.dtype, device=weight.device)
    flat[positions.long().to(weight.device)] = values.to(weight)
    return flat.view(weight.shape)


@torch.no_grad()
def _joined(module: Any, factors: Sequence[Factors], dense: Tensor | None) -> Factors | Changed:
    """The sum of a module's changes, in the smaller form."""
    size = sum(part.down.numel() + part.up.numel() for part in factors)
    if dense is None and size < module.weight.numel():
        return Factors(torch.cat([part.down for part in factors]), torch.cat([part.up for part in factors], dim=1))
    weight = module.weight.detach().clone()
    if dense is not None:
        weight += dense
    for part in factors:
        weight += (part.up @ part.down.flatten(1)).view_as(weight)
    return Changed(weight)


def _apply(module: Any, value: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The module's own operation with another weight."""
    if isinstance(module, nn.Conv2d):
        answer: Tensor = module._conv_forward(value, weight.to(value.device), bias)
        return answer
    return functional.linear(value, weight.to(value.device), bias)


def _low_rank(module: Any, value: Tensor, change: Factors) -> Tensor:
    reduced = _apply(module, value, change.down, None)
    up = change.up.to(value.device)
    if isinstance(module, nn.Conv2d):
        return functional.conv2d(reduced, up[:, :, None, None])
    return functional.linear(reduced, up)
