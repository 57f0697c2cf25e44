"""Stable Diffusion 1.x and 2.x: a U-Net told by one CLIP."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from fade.models.base import Config, Configs
from fade.models.denoiser import Denoiser
from fade.models.diffusion import Diffusion, of_scheduler
from fade.models.supported import autoencoder_factor, side
from fade.models.told import Told

logger = logging.getLogger(__name__)
# Plain attention is faster than the fused kernel in the backward pass on CPU, but holds all pairs of positions.
_PLAIN_ATTENTION_UP_TO = 32 * 32
_SOLVERS = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler}


class UNet(Denoiser):
    """Stable Diffusion's network: text enters through the keys and values of its cross-attention."""

    component = "unet"
    patterns: ClassVar[Mapping[str, re.Pattern[str]]] = {
        "attention": re.compile(r"\.(to_q|to_k|to_v|to_out\.0)$"),
        "cross_attention": re.compile(r"\.attn2\.(to_k|to_v)$"),
        "text_sites": re.compile(r"\.attn2\.(to_k|to_v)$"),
        "text_attention": re.compile(r"\.attn2\."),
    }

    def predict(self, noisy: Tensor, t: Tensor, told: Told) -> Tensor:
        """Noise or velocity. Sizes, which SDXL is told, stay float32: bfloat16 rounds them."""
        dtype, added = self.dtype, None
        if told.others:
            added = {"text_embeds": told.others["pooled"].to(dtype), "time_ids": told.others["sizes"]}
        answer: Tensor = self.network(noisy.to(dtype), t, told.states.to(dtype), added_cond_kwargs=added).sample
        return answer


def token_ids(pipeline: Any, prompts: Sequence[str], *, encoder: str = "") -> Tensor:
    """Token ids (B, L), padded and cut as the stock pipelines do; a token of several vectors becomes all of them.

    What lies beyond the text encoder's length is not read, and a warning says so.

    Args:
        encoder: the ending of the tokenizer's and the text encoder's names in the pipeline.
    """
    tokenizer, text_encoder = (getattr(pipeline, f"{name}{encoder}") for name in ("tokenizer", "text_encoder"))
    length = read_length(tokenizer, text_encoder.config)
    told, added = list(prompts), tokenizer.added_tokens_encoder
    if any(f"{token}_1" in added for token in added):  # else all stay as they are, and to find that out takes long
        told = [pipeline.maybe_convert_prompt(prompt, tokenizer) for prompt in told]
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


class StableDiffusion(Diffusion):
    """Stable Diffusion 1.x and 2.x."""

    title = "Stable Diffusion 1.x and 2.x"
    parts: ClassVar[Mapping[str, str]] = {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
    }
    tokenizers: ClassVar[Mapping[str, str]] = {"tokenizer": "text_encoder"}
    denoiser_type = UNet
    left_out: ClassVar[Mapping[str, Any]] = {
        **{"safety_checker": None, "requires_safety_checker": False},
        **{"feature_extractor": None, "image_encoder": None},
    }

    @classmethod
    def unsupported(cls, config: Configs, scheduler: str) -> list[str]:
        """Inpainting, depth, guidance told, shapes that are no squares, and schedules that are no diffusion's."""
        return [*_of_networks(config("unet"), config("vae")), *of_scheduler(scheduler, config("scheduler"))]

    @cached_property
    def denoiser(self) -> UNet:
        """The U-Net on its scheduler's path."""
        config = self.network.config
        edge = side(config.sample_size) or 0
        return UNet(self.network, self.path, (config.in_channels, edge, edge))

    def solver(self, name: str, steps: int) -> Any:
        """DDIM or DPM-Solver++, of the base's own noise schedule."""
        scheduler = _SOLVERS[name].from_config(self.pipeline.scheduler.config)
        scheduler.set_timesteps(steps)
        return scheduler

    def prepare(self) -> None:
        """Elsewhere one number is expected of the latents' side, and a pair of equal ones says the same."""
        network = self.network
        network.register_to_config(sample_size=side(network.config.sample_size))
        if network.config.sample_size**2 <= _PLAIN_ATTENTION_UP_TO:
            network.set_attn_processor(AttnProcessor())

    def encoded(self, prompts: list[str]) -> Told:
        """The text encoder's last states, (B, L, D)."""
        ids = token_ids(self.pipeline, prompts)
        return Told(self.pipeline.text_encoder(ids.to(self.reads_on)).last_hidden_state.float().cpu())


def _of_networks(unet: Config, vae: Config) -> list[str]:
    found = []
    if (takes := unet.get("in_channels", 4)) != (latent := vae.get("latent_channels", 4)):
        found.append(f"has a UNet that takes {takes} channels (inpainting or depth) for latents of {latent}")
    if unet.get("time_cond_proj_dim") is not None:
        found.append("has a UNet that is told the guidance (LCM)")
    if unet.get("addition_embed_type") not in (None, "text_time"):
        found.append(f"has a UNet that is told {unet['addition_embed_type']!r} besides the text")
    if vae.get("latents_mean") is not None:
        found.append("has an autoencoder that shifts its latents")
    size = unet.get("sample_size")
    if isinstance(size, list) and len(set(size)) > 1:
        factor = autoencoder_factor(vae)
        high, wide = (int(side * factor) for side in size[:2])
        found.append(f"draws pictures that are not square ({high} x {wide}: sample_size {size})")
    elif side(size) is None or not isinstance(vae.get("block_out_channels"), list):
        found.append("does not say the size of its pictures (sample_size, block_out_channels)")
    return found
