"""Stable Diffusion 1.x and 2.x: encode pictures and prompts, decode latents."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fade.errors import DataError
from fade.models.conditioning import Conditioning
from fade.models.latents import encode_pictures
from fade.models.source import picture_size


def weights_sha256(module: nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of all weights and buffers: equal means equal bits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def token_ids(tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """Token ids (B, L), padded and cut as the stock pipelines do."""
    ids: Tensor = tokenizer(
        list(prompts),
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    ).input_ids
    return ids


@dataclass
class StableDiffusion:
    """A loaded base: the diffusers pipeline, the hash it was loaded under, the adapters switched on.

    Attributes:
        folder: where it was loaded from: a folder, or a single file.
        active: adapter name to weight; kept here because peft reports a disabled adapter as active.
    """

    pipeline: Any
    sha256: str
    folder: Path
    active: dict[str, float] = field(default_factory=dict)

    @property
    def unet(self) -> Any:
        """The denoiser, in evaluation mode, its weights as ``load_base`` was asked to hold them."""
        return self.pipeline.unet

    @property
    def device(self) -> torch.device:
        """Where the denoiser lies."""
        return next(iter(self.pipeline.unet.parameters())).device

    @property
    def noise_scheduler(self) -> Any:
        """The base's own; solvers are made from its configuration."""
        return self.pipeline.scheduler

    @property
    def prediction_type(self) -> str:
        """What the denoiser answers: ``epsilon`` or ``v_prediction``."""
        return str(self.pipeline.scheduler.config.prediction_type)

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """The noise scheduler's cumulative alphas, (T,) float32."""
        levels: Tensor = self.pipeline.scheduler.alphas_cumprod
        return levels

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one picture's latents."""
        config = self.unet.config
        return config.in_channels, config.sample_size, config.sample_size

    @property
    def picture_size(self) -> int:
        """Height and width of a picture, in pixels."""
        return picture_size(self.unet.config, self.pipeline.vae.config)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Text states, (B, L, D) float32 on the CPU; equal prompts are encoded once."""
        unique = list(dict.fromkeys(prompts))
        ids = token_ids(self.pipeline.tokenizer, unique)
        states = self.pipeline.text_encoder(ids.to(self.device)).last_hidden_state.float().cpu()
        at = {prompt: i for i, prompt in enumerate(unique)}
        return Conditioning(states)[[at[prompt] for prompt in prompts]]

    def unconditional(self) -> Conditioning:
        """What guidance leads away from, one row: the states of the empty prompt."""
        return self.encode_prompts([""])

    def encode_pictures(self, pictures: NDArray[np.uint8]) -> Tensor:
        """Scaled latents, (N, C, h, w) float32: the posterior's mean, so nothing is drawn.

        Raises:
            DataError: the pictures are not of the size that the base draws.
        """
        if pictures.shape[1:3] != (self.picture_size, self.picture_size):
            raise DataError(
                f"The pictures are {pictures.shape[1]} x {pictures.shape[2]}; the base in {self.folder} draws "
                f"{self.picture_size} x {self.picture_size}. Resize them to that, or take another base."
            )
        return encode_pictures(self.pipeline.vae, pictures)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures of scaled latents, (B, 3, H, W) float32, about -1..1."""
        vae = self.pipeline.vae
        decoded: Tensor = vae.decode((latents / vae.config.scaling_factor).to(vae.device, vae.dtype)).sample
        return decoded.float()
