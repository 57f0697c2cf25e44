"""Targeting: at which timesteps, and on which pictures, the concept is overwritten.

The paper's second version says "target only the crucial timesteps for a given concept" and gives no
definition. A distribution over timesteps is a vector of T probabilities here, however it came about.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fade.errors import ConfigError
from fade.methods.fade.examples import Examples
from fade.models.denoiser import Denoiser
from fade.seeding import torch_generator

Pictures = Literal["forget", "surrogate", "mixed", "generated"]


def power_law(total: int, power: float) -> Tensor:
    """P(t) of t = floor(T u^power), u ~ U(0, 1): uniform for power 1, towards high noise below   (ours).

    Raises:
        ConfigError: the power is not positive.
    """
    if power <= 0:
        raise ConfigError(f"timestep_power must be positive: got {power}. 1 is uniform, less draws noisier.")
    edges = (torch.arange(total + 1, dtype=torch.float64) / total) ** (1 / power)
    return edges.diff()


@torch.no_grad()
def teacher_disagreement(
    denoiser: Denoiser, examples: Examples, *, points: int, group_size: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """How far the teacher's answers to the concept's and the surrogate's captions lie apart   (ours).

    D(t) = root mean square of e(z_t, t, c) - e(z_t, t, c_surrogate) over a group of pictures, measured
    once at ``points`` timesteps spread evenly. The network's adapters must be off.

    Returns:
        timesteps (points,) and D (points,), float64.
    """
    generator = torch_generator(seed, "disagreement")
    device, total = denoiser.device, denoiser.path.steps
    at = ((torch.arange(points) + 0.5) * total / points).long()
    found = []
    for timestep in at:
        chosen = examples.drawn(group_size, generator)
        noise = torch.randn(chosen.latents.shape, generator=generator)
        part, timesteps = chosen.to(device), timestep.expand(group_size).to(device)
        noisy = denoiser.path.noised(part.latents, noise.to(device), timesteps)
        apart = denoiser.predict(noisy, timesteps, part.prompts) - denoiser.predict(noisy, timesteps, part.targets)
        found.append(float(apart.float().square().mean().sqrt()))
    return at.numpy().astype(np.float64), np.asarray(found)


def in_proportion(timesteps: np.ndarray, disagreement: np.ndarray, total: int) -> Tensor:
    """P(t) in proportion to the disagreement, linear between the measured timesteps.

    Raises:
        ConfigError: the teacher answers both captions alike at every timestep.
    """
    if not disagreement.any():
        raise ConfigError(
            "The base answers the concept's and the surrogate's captions alike at every timestep: there is nothing "
            "to overwrite. Choose another surrogate, or check that the base knows the concept."
        )
    spread = np.interp(np.arange(total), timesteps, disagreement)
    return torch.from_numpy(spread / spread.sum())


def draw_timesteps(probabilities: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` timesteps from a distribution over 0..T-1, by its inverse."""
    edges = probabilities.cumsum(0)
    draws = torch.rand(count, generator=generator, dtype=torch.float64) * edges[-1]
    return torch.searchsorted(edges, draws, right=True).clamp(max=len(probabilities) - 1)
