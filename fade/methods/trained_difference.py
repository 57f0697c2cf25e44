"""What every baseline is given, and the difference of weights it trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fade.errors import NoMatchingModulesError
from fade.models.deltas import FixedDelta, add_delta, delta_weights, plain_modules
from fade.models.denoiser import Denoiser, Part
from fade.models.paths import NoisePath
from fade.models.told import Told

NAME = "baseline"


@dataclass(frozen=True, slots=True)
class Material:
    """The same splits that our method learns from, encoded once.

    Attributes:
        forget: latents of the concept's pictures, (N, C, h, w); ``concept`` and ``surrogate`` their captions,
            which differ in the concept's name alone, N rows each.
        anchor: latents of the surrogate's pictures, with captions that name the concept (``anchor_concept``)
            and the surrogate (``anchor_surrogate``).
        retain: latents of other pictures, with their captions.
        empty: the empty prompt, one row.
    """

    forget: Tensor
    concept: Told
    surrogate: Told
    anchor: Tensor
    anchor_concept: Told
    anchor_surrogate: Told
    retain: Tensor
    retain_prompts: Told
    empty: Told


@dataclass(frozen=True, slots=True)
class BaselineStep:
    """One step: its number (from 1) and its losses; ``retain_loss`` is 0 where a method has none."""

    step: int
    forget_loss: float
    retain_loss: float = 0.0


class _Trained(nn.Module):
    """A dense difference, zero at first."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.change = nn.Parameter(torch.zeros_like(weight, dtype=torch.float32))

    def forward(self) -> Tensor:
        """The difference."""
        return self.change


def modules_of(denoiser: Denoiser, part: Part, *, without: bool = False) -> list[str]:
    """Names of the Linear and Conv2d modules of a part of the network, or of all but it, sorted.

    Raises:
        NoMatchingModulesError: there is none.
    """
    inside = denoiser.modules(part)
    found = [name for name in denoiser.modules() if name not in inside] if without else inside
    if not found:
        raise NoMatchingModulesError(
            f"The denoiser has no module {'outside' if without else 'in'} its {part}: this method cannot be used on a "
            "base of this family."
        )
    return found


def trained_difference(network: nn.Module, modules: Iterable[str]) -> dict[str, nn.Parameter]:
    """Hang a trainable difference, zero at first, on modules' weights; give its tensors by module.

    Biases and norms stay as they are: an adapter holds weights of Linear and Conv2d modules alone.
    """
    known = plain_modules(network)
    parts = {name: _Trained(known[name].weight) for name in modules}
    add_delta(network, NAME, parts)
    _switch_on(network)
    return {name: part.change for name, part in parts.items()}


def solved_difference(network: nn.Module, changes: Mapping[str, Tensor]) -> None:
    """Hang a given difference on modules' weights."""
    every = {
        name: FixedDelta(torch.arange(change.numel()), change.flatten().float(), change.shape)
        for name, change in changes.items()
    }
    add_delta(network, NAME, every)
    _switch_on(network)


def _switch_on(network: nn.Module) -> None:
    for delta in delta_weights(network).values():
        delta.activate({NAME: 1.0})


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """The base's own weights, whatever differences hang on them; restores what was on."""
    deltas = list(delta_weights(network).values())
    before = [delta.disabled for delta in deltas]
    try:
        for delta in deltas:
            delta.disabled = True
        yield
    finally:
        for delta, disabled in zip(deltas, before, strict=True):
            delta.disabled = disabled


def difference_tensors(denoiser: Denoiser) -> dict[str, Tensor]:
    """The difference as an adapter stores it: flat positions and values of what is not zero, by module."""
    tensors: dict[str, Tensor] = {}
    for module, delta in delta_weights(denoiser.network).items():
        if NAME in delta.parts:
            flat = delta.parts[NAME]().detach().cpu().flatten()
            # Stored as float16: what is zero there changes nothing.
            positions = flat.to(torch.float16).nonzero().squeeze(1)
            if len(positions):
                tensors[f"{denoiser.component}.{module}.positions"] = positions.to(torch.int32)
                tensors[f"{denoiser.component}.{module}.values"] = flat[positions]
    return tensors


def noised(
    latents: Tensor, path: NoisePath, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """z_t, t ~ U{0..T-1} and the noise, for each row of z_0."""
    timesteps = torch.randint(path.steps, (len(latents),), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    noisy = path.noised(latents, noise, timesteps)
    return noisy.to(device), timesteps.to(device), noise.to(device)


def drawn(count: int, batch: int, generator: torch.Generator) -> Tensor:
    """Rows of a batch, with replacement."""
    return torch.randint(count, (batch,), generator=generator)


def adam(parameters: Sequence[Tensor], learning_rate: float) -> Any:
    """Adam without decay: decay would pull the weight's change, not the weight, to zero."""
    return torch.optim.Adam(parameters, lr=learning_rate)
