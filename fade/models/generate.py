"""Generate pictures in batches: one solver loop with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from numpy.typing import NDArray
from torch import Tensor

from fade.models.conditioning import Conditioning, denoise, joined_conditioning
from fade.models.diffusion import autocast
from fade.models.family import Base

Solver = Literal["ddim", "dpm++"]
_SOLVERS = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler}


def first_latents(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Each picture's first noise, from a generator of its own seed (as UnlearnCanvas re-seeds per image)."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def sample_latents(
    sd: Base,
    conditioning: Conditioning,
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    solver: Solver,
    precision: str = "fp32",
) -> Tensor:
    """Scaled latents (B, C, h, w) float32 for text states and seeds of equal number, adapters as they are.

    Deterministic: no solver draws noise after the first latents.
    """
    scheduler = _SOLVERS[solver].from_config(sd.noise_scheduler.config)
    scheduler.set_timesteps(steps)
    latents = first_latents(seeds, sd.latent_shape).to(sd.device)
    both = joined_conditioning(sd.unconditional().expand(len(conditioning)), conditioning).to(sd.device)
    with autocast(precision, sd.device.type):
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(torch.cat([latents, latents]), timestep)
            answer = denoise(sd.unet, scaled, timestep.to(sd.device), both)
            without, with_prompt = answer.float().chunk(2)
            latents = scheduler.step(without + guidance * (with_prompt - without), timestep, latents).prev_sample
    return latents


@torch.no_grad()
def generate_from(
    sd: Base,
    conditioning: Conditioning,
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    solver: Solver,
    precision: str = "fp32",
) -> NDArray[np.uint8]:
    """The same as pictures, (B, H, W, 3) uint8."""
    latents = sample_latents(
        sd, conditioning, seeds, steps=steps, guidance=guidance, solver=solver, precision=precision
    )
    with autocast(precision, sd.device.type):
        decoded = sd.decode(latents)
    pixels = (decoded.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    return np.ascontiguousarray(pixels.permute(0, 2, 3, 1).cpu().numpy())


def generate_batch(
    sd: Base,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    solver: Solver,
    precision: str = "fp32",
) -> NDArray[np.uint8]:
    """The same for prompts."""
    return generate_from(
        sd, sd.encode_prompts(prompts), seeds, steps=steps, guidance=guidance, solver=solver, precision=precision
    )


def generate(
    sd: Base,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    batch: int,
    steps: int,
    guidance: float,
    solver: Solver,
    precision: str = "fp32",
) -> Iterator[NDArray[np.uint8]]:
    """The same in batches, in order."""
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        yield generate_batch(
            sd, prompts[part], seeds[part], steps=steps, guidance=guidance, solver=solver, precision=precision
        )
