"""The published loop, plainly written: the yardstick for the speed of ours.

Stable Diffusion from a diffusers folder, a dense peft LoRA, float32, one process. Every step runs the autoencoder and
the text encoder on its batch, and the denoiser four times: teacher and student, on the forget and on the retain
examples. Nothing here comes from ``fade`` but what is learnt from (pictures and captions), so that what it computes
can be read in one page and checked against. It is not slow on purpose: no work is done that the loop does not ask for.

    z = VAE(picture), z_t = sqrt(a_t) z + sqrt(1 - a_t) e
    L = forget_weight || student(z_t, t, c) - teacher(z_t, t, c_surrogate) ||^2        z of forget examples
      + retain_weight || student(z_t, t, c) - teacher(z_t, t, c) ||^2                  z of retain examples

Two recipes: ``PUBLISHED``, the authors' own settings, and ``same_as_ours``, those of our default.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray
from peft import LoraConfig
from torch import Tensor

Pictures = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Recipe:
    """Settings of the loop.

    Attributes:
        targets: module names, or their endings, that get a LoRA.
        timestep_power: forget timesteps are floor(T u^power), u ~ U(0, 1); 1 is uniform.
        surrogate_share: forget examples whose picture is one of the surrogate.
        empty_share: retain examples with the empty prompt.
        cosine: the learning rate falls along a cosine to zero at ``steps``; constant otherwise.
    """

    targets: Sequence[str]
    rank: int
    alpha: float
    learning_rate: float
    batch: int
    forget_weight: float
    retain_weight: float
    clip_norm: float
    weight_decay: float = 0.01
    timestep_power: float = 1.0
    surrogate_share: float = 0.0
    empty_share: float = 0.0
    cosine: bool = False
    steps: int = 1550
    seed: int = 42


PUBLISHED = Recipe(
    targets=("to_q", "to_k", "to_v", "to_out.0"),
    rank=16,
    alpha=4,
    learning_rate=6e-4,
    batch=12,
    forget_weight=0.3,
    retain_weight=1.0,
    clip_norm=5.0,
)
"""What the authors' package runs for Stable Diffusion (steps and batch differ between its scripts)."""


@dataclass(frozen=True, slots=True)
class PlainSet:
    """Pictures (N, H, W, 3) with the student's and the teacher's captions."""

    pictures: Pictures
    captions: Sequence[str]
    teacher_captions: Sequence[str]


@dataclass(frozen=True, slots=True)
class Plain:
    """A loop that is ready to run: the pipeline, whose denoiser holds the LoRA, and its trainable tensors."""

    pipeline: Any
    recipe: Recipe
    parameters: list[Tensor]


def prepare(base: Path, recipe: Recipe) -> Plain:
    """Load the base and put the LoRA in."""
    torch.manual_seed(recipe.seed)
    pipeline = StableDiffusionPipeline.from_pretrained(base, dtype=torch.float32, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False).eval()
    pipeline.unet.add_adapter(
        LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules=list(recipe.targets)), adapter_name="plain"
    )
    return Plain(pipeline, recipe, [one for one in pipeline.unet.parameters() if one.requires_grad])


def loop(plain: Plain, forget: PlainSet, surrogate: PlainSet, retain: PlainSet) -> Iterator[float]:
    """Train; yields the loss of each step, endlessly where the learning rate is constant."""
    pipeline, recipe, generator = plain.pipeline, plain.recipe, torch.Generator().manual_seed(plain.recipe.seed)
    unet, levels = pipeline.unet, pipeline.scheduler.alphas_cumprod
    optimizer = torch.optim.AdamW(plain.parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    stand_ins = round(recipe.batch * recipe.surrogate_share)
    step = 0
    while not recipe.cosine or step < recipe.steps:
        if recipe.cosine:
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        step += 1
        drawn = _drawn(forget, recipe.batch - stand_ins, generator) + _drawn(surrogate, stand_ins, generator)
        others = [
            (row[0], "", "") if float(torch.rand((), generator=generator)) < recipe.empty_share else row
            for row in _drawn(retain, recipe.batch, generator)
        ]
        loss: Any = 0.0
        for rows, weight, power in (
            (drawn, recipe.forget_weight, recipe.timestep_power),
            (others, recipe.retain_weight, 1.0),
        ):
            latents = _latents(pipeline, np.stack([picture for picture, _, _ in rows]))
            timesteps = (len(levels) * torch.rand(len(rows), generator=generator) ** power).long()
            noise = torch.randn(latents.shape, generator=generator)
            level = levels[timesteps][:, None, None, None]
            noisy = level.sqrt() * latents + (1 - level).sqrt() * noise
            with torch.no_grad():
                unet.disable_adapters()
                target = unet(noisy, timesteps, _states(pipeline, [told for _, _, told in rows])).sample
                unet.enable_adapters()
            answer = unet(noisy, timesteps, _states(pipeline, [caption for _, caption, _ in rows])).sample
            loss = loss + weight * (answer - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters, recipe.clip_norm)
        optimizer.step()
        yield loss.item()


def _drawn(rows: PlainSet, count: int, generator: torch.Generator) -> list[tuple[Any, str, str]]:
    if not count:
        return []
    chosen = torch.randint(len(rows.pictures), (count,), generator=generator).tolist()
    return [(rows.pictures[i], rows.captions[i], rows.teacher_captions[i]) for i in chosen]


@torch.no_grad()
def _latents(pipeline: Any, pictures: Pictures) -> Tensor:
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents: Tensor = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
    return latents


@torch.no_grad()
def _states(pipeline: Any, captions: Sequence[str]) -> Tensor:
    tokens = pipeline.tokenizer(
        list(captions),
        padding="max_length",
        truncation=True,
        max_length=pipeline.tokenizer.model_max_length,
        return_tensors="pt",
    )
    states: Tensor = pipeline.text_encoder(tokens.input_ids)[0]
    return states
