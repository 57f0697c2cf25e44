"""FLUX.1 dev and schnell: a flow-matching transformer of double and single blocks on packed latents."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fade.models.base import Configs
from fade.models.denoiser import Denoiser
from fade.models.flow import SizedByAutoencoder, packed, size_shift, unpacked
from fade.models.supported import autoencoder_factor
from fade.models.told import Told

GUIDANCE = 3.5
"""What dev is told where nobody says otherwise, as in training: the stock pipeline's own."""
_LENGTHS = {True: 512, False: 256}
"""Tokens of T5 that dev (told its guidance) and schnell (not told) were trained with."""


class FluxTransformer(Denoiser):
    """Text enters through the context embedder, is attended to by projections of its own in the double blocks, and is
    one sequence with the picture in the single blocks, whose projections are shared by both."""

    component = "transformer"
    patterns: ClassVar[Mapping[str, re.Pattern[str]]] = {
        "attention": re.compile(r"\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)$"),
        "cross_attention": re.compile(r"\.(add_k_proj|add_v_proj)$"),
        "text_attention": re.compile(r"\.(add_q_proj|add_k_proj|add_v_proj|to_add_out)$"),
        "text_sites": re.compile(r"^context_embedder$"),
        "pooled_sites": re.compile(r"^time_text_embed\.text_embedder\.linear_1$"),
    }

    def predict(self, noisy: Tensor, t: Tensor, told: Told) -> Tensor:
        """The velocity e - z_0."""
        count, _, height, width = noisy.shape
        guidance = told.others.get("guidance")
        answer: Tensor = self.network(
            hidden_states=packed(noisy.to(self.dtype)),
            encoder_hidden_states=told.states.to(self.dtype),
            pooled_projections=told.others["pooled"].to(self.dtype),
            timestep=t.expand(count) / self.path.steps,
            guidance=None if guidance is None else guidance[:, 0],
            img_ids=_places(height // 2, width // 2).to(noisy.device, self.dtype),
            txt_ids=torch.zeros(told.states.shape[1], 3, device=noisy.device, dtype=self.dtype),
        ).sample
        return unpacked(answer, height, width)


def _places(high: int, wide: int) -> Tensor:
    """Row and column of every token of the picture, after a zero, (high * wide, 3)."""
    rows, columns = torch.meshgrid(torch.arange(high), torch.arange(wide), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)


class Flux(SizedByAutoencoder):
    """A pooled CLIP and a T5; dev is told the guidance that it was distilled for, schnell is drawn without."""

    title = "FLUX.1"
    parts: ClassVar[Mapping[str, str]] = {
        "transformer": "FluxTransformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "T5EncoderModel",
    }
    tokenizers: ClassVar[Mapping[str, str]] = {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"}
    denoiser_type = FluxTransformer
    left_out: ClassVar[Mapping[str, Any]] = {"feature_extractor": None, "image_encoder": None}

    @classmethod
    def unsupported(cls, config: Configs, scheduler: str) -> list[str]:
        """Another scheduler, a transformer that takes more than latents (fill, depth), pictures of unknown size."""
        found = super().unsupported(config, scheduler)
        takes, latent = config("transformer").get("in_channels", 64), config("vae").get("latent_channels")
        if takes != 4 * (latent or 0):
            found.append(f"has a transformer that takes {takes} channels for packed latents of 4 x {latent}")
        return found

    @classmethod
    def prompt_length(cls, config: Configs) -> int:
        """What dev and what schnell was trained with."""
        return _LENGTHS[bool(config("transformer").get("guidance_embeds"))]

    @cached_property
    def denoiser(self) -> FluxTransformer:
        """The transformer on the straight path."""
        vae = self.pipeline.vae.config
        edge = self.picture_size // autoencoder_factor(vae)
        return FluxTransformer(self.network, self.path, (vae["latent_channels"], edge, edge))

    def times(self, steps: int) -> dict[str, Any]:
        """Equal steps of s, shifted by the picture's size where the base's scheduler says so."""
        edge = self.denoiser.latent_shape[1]
        mu = size_shift(edge * edge // 4, self.pipeline.scheduler.config)
        return {"sigmas": np.linspace(1.0, 1 / steps, steps), "mu": mu}

    def guide(self, told: Told, guidance: float) -> tuple[Told, float]:
        """Dev is told the guidance; schnell follows the prompt, or is truly guided above 1 (``true_cfg_scale``)."""
        if "guidance" not in told.others:
            return told, guidance
        said = torch.full_like(told.others["guidance"], guidance)
        return replace(told, others={**told.others, "guidance": said}), 1.0

    def encoded(self, prompts: list[str]) -> Told:
        """As the stock pipeline encodes them: T5's states of every position, CLIP's pooled ones, dev's guidance."""
        length = min(
            self.prompt_length(lambda part: getattr(self.pipeline, part).config),
            int(self.pipeline.tokenizer_2.model_max_length),
        )
        states, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompts, prompt_2=prompts, device=self.reads_on, max_sequence_length=length
        )
        others = {"pooled": pooled.float().cpu()}
        if self.network.config.guidance_embeds:
            others["guidance"] = torch.full((len(prompts), 1), GUIDANCE)
        return Told(states.float().cpu(), others=others)
