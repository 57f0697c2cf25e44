"""Saliency: where in the network the concept lives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fade.errors import DataError
from fade.method.examples import Examples
from fade.models.diffusion import add_noise
from fade.seeding import torch_generator

CONTRAST_EPSILON = 1e-8


@dataclass(frozen=True, slots=True)
class NoisyGroup:
    """A group of examples with their draws: (G, ...) each."""

    examples: Examples
    timesteps: Tensor
    noise: Tensor


def noisy_groups(
    examples: Examples, *, groups: int, group_size: int, timestep_count: int, seed: int
) -> list[NoisyGroup]:
    """Draw groups of examples, uniform timesteps and noise.

    A group is part of the definition of saliency (the absolute value is taken per group); how many
    examples go through the network at once is not.

    Raises:
        DataError: there are no examples.
    """
    if len(examples) == 0:
        raise DataError("Saliency needs at least one example: got none. Check the forget and retain sets.")
    generator = torch_generator(seed, "saliency")
    drawn = []
    for _ in range(groups):
        rows = torch.randint(len(examples), (group_size,), generator=generator)
        chosen = examples[rows]
        timesteps = torch.randint(timestep_count, (group_size,), generator=generator)
        drawn.append(NoisyGroup(chosen, timesteps, torch.randn(chosen.latents.shape, generator=generator)))
    return drawn


def salient_parameters(unet: nn.Module) -> dict[str, Tensor]:
    """Module name to weight, for every Linear and Conv2d: what a mask may choose from."""
    return {name: module.weight for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}


def accumulate_saliency(
    unet: nn.Module, groups: list[NoisyGroup], *, alphas_cumprod: Tensor, against: str = "noise"
) -> dict[str, Tensor]:
    """Mean absolute gradient of a loss over groups of examples.

    S_p = mean over groups of | d L / d p |

        against="noise":   L = || e(z_t, t, c) - e ||^2, the denoising loss          (FADE, stage 1)
        against="teacher": L = || e(z_t, t, c) - e(z_t, t, c_target) ||^2, the distillation loss at its
                           start, where student and teacher are the same network     (ours)

    Weights, gradients and training flags are left as found.

    Returns:
        Module name to a tensor of its weight's shape, float32, non-negative.
    """
    weights = salient_parameters(unet)
    flags = {name: weight.requires_grad for name, weight in weights.items()}
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        for group in groups:
            gradients = torch.autograd.grad(
                _loss(unet, group, alphas_cumprod, against), list(weights.values()), allow_unused=True
            )
            for name, gradient in zip(weights, gradients, strict=True):
                if gradient is not None:
                    total[name] += gradient.abs() / len(groups)
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(flags[name])
    return total


def _loss(unet: nn.Module, group: NoisyGroup, alphas_cumprod: Tensor, against: str) -> Tensor:
    noisy = add_noise(group.examples.latents, group.noise, group.timesteps, alphas_cumprod)
    target = group.noise
    if against == "teacher":
        with torch.no_grad():
            target = unet(noisy, group.timesteps, group.examples.target_embeds).sample
    predicted = unet(noisy, group.timesteps, group.examples.prompt_embeds).sample
    return (predicted - target).square().mean()


def contrast(forget: dict[str, Tensor], retain: dict[str, Tensor]) -> dict[str, Tensor]:
    """S_forget / (S_retain + eps): what the concept needs and the rest does not   (ours)."""
    return {name: forget[name] / (retain[name] + CONTRAST_EPSILON) for name in forget}


def module_scores(saliency: dict[str, Tensor]) -> Iterator[tuple[str, float, int]]:
    """Module name, mean of its weight's saliency (FADE's module score), number of weights."""
    for name, values in saliency.items():
        yield name, float(values.double().mean()), values.numel()
