"""What the published methods share: the difference of weights they leave, and how they draw and train."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fade.errors import NoMatchingModulesError
from fade.methods.fade.masks import Mask
from fade.methods.fade.sparse_lora import add_sparse_lora
from fade.methods.method import STUDENT
from fade.models.deltas import FixedDelta, add_delta, delta_weights, plain_modules
from fade.models.denoiser import Denoiser, Part
from fade.models.paths import NoisePath


@dataclass(frozen=True, slots=True)
class Losses:
    """One step: its number, from 1, and its losses; ``retain_loss`` is 0 where a method has none."""

    step: int
    forget_loss: float
    retain_loss: float = 0.0

    @property
    def at_hand(self) -> bool:
        """They were read already."""
        return True

    def figures(self) -> dict[str, Any]:
        """A row of the curve."""
        return asdict(self)


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
    add_delta(network, STUDENT, parts)
    _switch_on(network)
    return {name: part.change for name, part in parts.items()}


def solved_difference(network: nn.Module, changes: Mapping[str, Tensor]) -> None:
    """Hang a given difference on modules' weights."""
    every = {
        name: FixedDelta(torch.arange(change.numel()), change.flatten().float(), change.shape)
        for name, change in changes.items()
    }
    add_delta(network, STUDENT, every)
    _switch_on(network)


def trained_low_rank(network: nn.Module, modules: Iterable[str], *, rank: int, seed: int) -> list[Tensor]:
    """Put a trainable LoRA, zero at first, on modules; give its tensors."""
    named = tuple(sorted(modules))
    mask = Mask("none", named, len(named), len(named))
    return add_sparse_lora(network, mask, rank=rank, alpha=float(rank), seed=seed, name=STUDENT)


def _switch_on(network: nn.Module) -> None:
    for delta in delta_weights(network).values():
        delta.activate({STUDENT: 1.0})


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


def descended(
    changes: Iterable[Tensor],
    losses: Callable[[], tuple[Tensor, Tensor | None]],
    *,
    steps: int,
    learning_rate: float,
    weight: float = 1.0,
) -> Iterator[Losses]:
    """Train differences; yields each step when it has been taken.

    Adam goes without decay, which would pull the weight's change, not the weight, to zero.

    Args:
        changes: tensors of what ``trained_difference`` or ``trained_low_rank`` gave.
        losses: draws a batch at each call; gives the loss of what to forget, and of what to retain or None.
        weight: of the second beside the first.
    """
    optimizer = torch.optim.Adam(list(changes), lr=learning_rate)
    for step in range(1, steps + 1):
        forget, kept = losses()
        optimizer.zero_grad(set_to_none=True)
        (forget if kept is None else forget + weight * kept).backward()
        optimizer.step()
        yield Losses(step, float(forget.detach()), 0.0 if kept is None else float(kept.detach()))
