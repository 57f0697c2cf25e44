"""Stable Diffusion 1.x: load a base, know it by its hash, encode pictures and prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from diffusers.utils import logging as diffusers_logging
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from fade.errors import BaseModelError
from fade.files import sha256_file
from fade.models.conditioning import Conditioning
from fade.models.latents import encode_pictures

PREDICTION_TYPES = ("epsilon", "v_prediction")
_PARTS = ("unet", "vae", "text_encoder")


def base_sha256(folder: Path) -> str:
    """The identity of a base model: SHA-256 over the names and hashes of its weight files.

    Raises:
        BaseModelError: the folder is missing or is no diffusers Stable Diffusion folder.
    """
    if not (folder / "model_index.json").is_file():
        raise BaseModelError(
            f"No base model in {folder}: expected a diffusers folder with model_index.json. "
            "Give the folder of a StableDiffusionPipeline, or build the built-in base with `dvc repro base`."
        )
    files = sorted(path for part in _PARTS for path in (folder / part).glob("*.safetensors"))
    if {path.parent.name for path in files} != set(_PARTS):
        raise BaseModelError(
            f"The base model in {folder} lacks safetensors weights for "
            f"{', '.join(part for part in _PARTS if part not in {path.parent.name for path in files})}."
        )
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.parent.name}/{path.name}:{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def weights_sha256(module: nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of all weights and buffers: equal means equal bits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass
class StableDiffusion:
    """A loaded base: the diffusers pipeline, the hash it was loaded under, the adapters switched on.

    Attributes:
        active: adapter name to weight; kept here because peft reports a disabled adapter as active.
    """

    pipeline: Any
    sha256: str
    folder: Path
    active: dict[str, float] = field(default_factory=dict)

    @property
    def unet(self) -> Any:
        """The denoiser, float32, in evaluation mode."""
        return self.pipeline.unet

    @property
    def device(self) -> torch.device:
        """Where the denoiser lies."""
        return next(iter(self.pipeline.unet.parameters())).device

    @property
    def prediction_type(self) -> str:
        """What the denoiser answers: ``epsilon`` or ``v_prediction``."""
        return str(self.pipeline.scheduler.config.prediction_type)

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """The noise scheduler's cumulative alphas, (T,) float32."""
        levels: Tensor = self.pipeline.scheduler.alphas_cumprod
        return levels

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Text states, (B, L, D) float32 on the CPU; equal prompts are encoded once."""
        unique = list(dict.fromkeys(prompts))
        tokenizer = self.pipeline.tokenizer
        ids = tokenizer(
            unique,
            padding="max_length",
            truncation=True,
            max_length=tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids
        states = self.pipeline.text_encoder(ids.to(self.device)).last_hidden_state.float().cpu()
        at = {prompt: i for i, prompt in enumerate(unique)}
        return Conditioning(states)[[at[prompt] for prompt in prompts]]

    def encode_pictures(self, pictures: NDArray[np.uint8]) -> Tensor:
        """Scaled latents, (N, C, h, w) float32: the posterior's mean, so nothing is drawn."""
        return encode_pictures(self.pipeline.vae, pictures)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Both libraries draw a bar for each file they read; a base is read many times."""
    before = diffusers_logging.is_progress_bar_enabled(), transformers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if before[0]:
            diffusers_logging.enable_progress_bar()
        if before[1]:
            transformers_logging.enable_progress_bar()


def load_base(folder: Path, *, expected_sha256: str | None = None) -> StableDiffusion:
    """Load a diffusers StableDiffusionPipeline folder in float32.

    Raises:
        BaseModelError: missing, damaged, of another hash than expected, or not an SD 1.x.
    """
    found = base_sha256(folder)
    if expected_sha256 is not None and found != expected_sha256:
        raise BaseModelError(
            f"The base model in {folder} is another one: its hash is {found[:12]}, expected {expected_sha256[:12]}. "
            "An erasure holds for one base only; restore that base, or make a new request for this one."
        )
    try:
        with _no_progress_bars():
            pipeline = StableDiffusionPipeline.from_pretrained(
                folder, dtype=torch.float32, safety_checker=None, local_files_only=True
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise BaseModelError(f"The base model in {folder} does not load: {error}. Restore the folder.") from error
    if (predicts := pipeline.scheduler.config.prediction_type) not in PREDICTION_TYPES:
        raise BaseModelError(
            f"The base in {folder} predicts {predicts!r}; supported are {' and '.join(PREDICTION_TYPES)}."
        )
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False).eval()
    # Plain attention is faster than the fused kernel in the backward pass on CPU.
    pipeline.unet.set_attn_processor(AttnProcessor())
    return StableDiffusion(pipeline, found, folder)
