"""Stable Diffusion 1.x and 2.x: encode pictures and prompts, decode latents."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from numpy.typing import NDArray
from torch import Tensor, nn

from fade.errors import DataError
from fade.models.denoiser import Denoiser
from fade.models.latents import encode_pictures
from fade.models.paths import DiffusionPath
from fade.models.supported import picture_size, side
from fade.models.told import Told

logger = logging.getLogger(__name__)
_SOLVERS = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler}


class UNet(Denoiser):
    """Stable Diffusion's network: text enters through the keys and values of its cross-attention."""

    component = "unet"
    patterns = {  # noqa: RUF012
        "attention": re.compile(r"\.(to_q|to_k|to_v|to_out\.0)$"),
        "cross_attention": re.compile(r"\.attn2\.(to_k|to_v)$"),
        "text_attention": re.compile(r"\.attn2\."),
    }

    def predict(self, noisy: Tensor, t: Tensor, told: Told) -> Tensor:
        """Noise or velocity. Sizes, which SDXL is told, stay float32: bfloat16 rounds them."""
        dtype, added = self.dtype, None
        if told.others:
            added = {"text_embeds": told.others["pooled"].to(dtype), "time_ids": told.others["sizes"]}
        answer: Tensor = self.network(noisy.to(dtype), t, told.states.to(dtype), added_cond_kwargs=added).sample
        return answer


def weights_sha256(module: nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of all weights and buffers: equal means equal bits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def token_ids(pipeline: Any, prompts: Sequence[str], *, encoder: str = "") -> Tensor:
    """Token ids (B, L), padded and cut as the stock pipelines do; a token of several vectors becomes all of them.

    What lies beyond the text encoder's length is not read, and a warning says so.

    Args:
        encoder: the ending of the tokenizer's and the text encoder's names in the pipeline.
    """
    tokenizer, text_encoder = (getattr(pipeline, f"{name}{encoder}") for name in ("tokenizer", "text_encoder"))
    length = read_length(tokenizer, text_encoder.config)
    told = [pipeline.maybe_convert_prompt(prompt, tokenizer) for prompt in prompts]
    # Cut and padded here: a fast tokenizer would keep in itself how, and threads share it.
    rows: list[list[int]] = tokenizer(told, verbose=False).input_ids
    if (longest := max(map(len, rows), default=0)) > length:
        logger.warning(
            "%d of %d prompts are longer than the %d tokens that the text encoder reads: up to %d are not read",
            *(sum(len(row) > length for row in rows), len(rows), length, longest - length),
        )
    cut = [row if len(row) <= length else [*row[: length - 1], row[-1]] for row in rows]
    return torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in cut])


def read_length(tokenizer: Any, text_encoder: Any) -> int:
    """How many tokens of a prompt are read, its begin and end among them.

    Args:
        text_encoder: its configuration. A tokenizer that was saved without a length would say 10 ** 30.
    """
    return min(int(tokenizer.model_max_length), int(text_encoder.max_position_embeddings))


@dataclass
class StableDiffusion:
    """A loaded base: the diffusers pipeline, the hash it was loaded under, the adapters switched on.

    Attributes:
        folder: where it was loaded from: a folder, or a single file.
        active: adapter name to weight; kept here because peft reports a disabled adapter as active.
    """

    denoiser_type: ClassVar[type[UNet]] = UNet
    pipeline: Any
    sha256: str
    folder: Path
    active: dict[str, float] = field(default_factory=dict)

    @property
    def network(self) -> Any:
        """The denoiser's module, in evaluation mode, its weights as ``load_base`` was asked to hold them."""
        return self.pipeline.unet

    @cached_property
    def denoiser(self) -> UNet:
        """What a method changes and asks."""
        config, scheduler = self.network.config, self.pipeline.scheduler
        edge = side(config.sample_size) or 0
        path = DiffusionPath(scheduler.alphas_cumprod, str(scheduler.config.prediction_type))
        return UNet(self.network, path, (config.in_channels, edge, edge))

    @property
    def device(self) -> torch.device:
        """Where the denoiser lies."""
        return self.denoiser.device

    @staticmethod
    def noise_schedule(scheduler: Any) -> tuple[object, Tensor | None]:
        """What two schedulers must agree in to lead along one path: what is predicted, and the noise's levels."""
        return scheduler.config.get("prediction_type"), getattr(scheduler, "alphas_cumprod", None)

    def solver(self, name: str, steps: int) -> Any:
        """``ddim`` or ``dpm++``, of the base's own noise schedule."""
        scheduler = _SOLVERS[name].from_config(self.pipeline.scheduler.config)
        scheduler.set_timesteps(steps)
        return scheduler

    @property
    def picture_size(self) -> int:
        """Height and width of a picture, in pixels."""
        return picture_size(self.network.config, self.pipeline.vae.config)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Told:
        """Text states, (B, L, D) float32 on the CPU; equal prompts are encoded once."""
        unique = list(dict.fromkeys(prompts))
        ids = token_ids(self.pipeline, unique)
        states = self.pipeline.text_encoder(ids.to(self.device)).last_hidden_state.float().cpu()
        at = {prompt: i for i, prompt in enumerate(unique)}
        return Told(states)[[at[prompt] for prompt in prompts]]

    def unconditional(self) -> Told:
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
