"""Qwen-Image: a flow-matching transformer of double blocks, told by a language model, with an autoencoder of videos."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fade.models.base import Config, Configs
from fade.models.denoiser import Denoiser
from fade.models.flow import FlowMatching, packed, size_shift, unpacked
from fade.models.supported import side
from fade.models.told import Told

LENGTH = 512
"""Tokens of a prompt that are told; the stock pipeline takes up to 1024. What a prompt leaves over is masked."""
_SIDE = 128
"""Of the latents, where nothing says otherwise: the stock pipeline's own."""


class QwenImageTransformer(Denoiser):
    """Text enters through ``txt_in``, after a norm, and is attended to by projections of its own in every block."""

    component = "transformer"
    patterns: ClassVar[Mapping[str, re.Pattern[str]]] = {
        "attention": re.compile(r"\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)$"),
        "cross_attention": re.compile(r"\.(add_k_proj|add_v_proj)$"),
        "text_attention": re.compile(r"\.(add_q_proj|add_k_proj|add_v_proj|to_add_out)$"),
        "text_sites": re.compile(r"^txt_in$"),
    }

    def predict(self, noisy: Tensor, t: Tensor, told: Told) -> Tensor:
        """The velocity e - z_0."""
        count, _, height, width = noisy.shape
        answer: Tensor = self.network(
            hidden_states=packed(noisy.to(self.dtype)),
            encoder_hidden_states=told.states.to(self.dtype),
            encoder_hidden_states_mask=told.mask,
            timestep=t.expand(count) / self.path.steps,
            img_shapes=[[(1, height // 2, width // 2)]] * count,
        ).sample
        return unpacked(answer, height, width)

    def read(self, states: Tensor) -> Tensor:
        """The states after their norm, which ``txt_in`` reads."""
        norm = self.network.txt_norm
        return functional.rms_norm(states, states.shape[-1:], norm.weight.detach().to(states), norm.eps)


class QwenImage(FlowMatching):
    """Told by Qwen2.5-VL's last states of a prompt in its template; truly guided (``true_cfg_scale``)."""

    title = "Qwen-Image"
    parts: ClassVar[Mapping[str, str]] = {
        "transformer": "QwenImageTransformer2DModel",
        "vae": "AutoencoderKLQwenImage",
        "text_encoder": "Qwen2_5_VLForConditionalGeneration",
    }
    tokenizers: ClassVar[Mapping[str, str]] = {"tokenizer": "text_encoder"}
    tokenizer_classes: ClassVar[Mapping[str, tuple[str, ...]]] = {"tokenizer": ("Qwen2Tokenizer",)}
    negative = " "  # as those who made it guide it; the stock pipeline has no default
    denoiser_type = QwenImageTransformer

    @classmethod
    def unsupported(cls, config: Configs, scheduler: str) -> list[str]:
        """Another scheduler, a transformer that takes more than latents (layers, edits), or is told the guidance."""
        found, network = super().unsupported(config, scheduler), config("transformer")
        takes, latent = network.get("in_channels", 64), config("vae").get("z_dim", 16)
        if takes != 4 * latent or network.get("zero_cond_t") or network.get("use_additional_t_cond"):
            found.append(f"has a transformer that takes {takes} channels, or more than packed latents of 4 x {latent}")
        if network.get("guidance_embeds"):
            found.append("has a transformer that is told the guidance (guidance_embeds), which no stock release is")
        edge = side(network.get("sample_size", _SIDE))
        if edge is None or edge % 2:
            found.append(f"says a size of latents that are no even square (sample_size of its transformer: {edge})")
        return found

    @classmethod
    def pictures_of(cls, config: Configs) -> int:
        """As the stock pipeline draws, or what ``sample_size`` in the transformer's configuration says, in latents."""
        return int(side(config("transformer").get("sample_size", _SIDE)) or 0) * _factor(config("vae"))

    @classmethod
    def prompt_length(cls, config: Configs) -> int:
        """``LENGTH``."""
        del config
        return LENGTH

    @cached_property
    def denoiser(self) -> QwenImageTransformer:
        """The transformer on the straight path."""
        vae = self.pipeline.vae.config
        edge = self.picture_size // _factor(vae)
        return QwenImageTransformer(self.network, self.path, (vae["z_dim"], edge, edge))

    def times(self, steps: int) -> dict[str, Any]:
        """Equal steps of s, shifted by the picture's size."""
        edge = self.denoiser.latent_shape[1]
        mu = size_shift(edge * edge // 4, self.pipeline.scheduler.config)
        return {"sigmas": np.linspace(1.0, 1 / steps, steps), "mu": mu}

    def combine(self, without: Tensor, with_prompt: Tensor, guidance: float) -> Tensor:
        """Guidance that keeps the length of every token's answer, as the stock pipeline does."""
        height, width = with_prompt.shape[2:]
        towards = packed(super().combine(without, with_prompt, guidance))
        length = torch.linalg.vector_norm(packed(with_prompt), dim=-1, keepdim=True)
        return unpacked(towards * length / torch.linalg.vector_norm(towards, dim=-1, keepdim=True), height, width)

    def encoded(self, prompts: list[str]) -> Told:
        """As the stock pipeline encodes them, then filled up to one length with what the mask leaves out."""
        length = min(LENGTH, int(self.pipeline.tokenizer.model_max_length))
        states, mask = self.pipeline.encode_prompt(prompt=prompts, device=self.reads_on, max_sequence_length=length)
        mask = torch.ones(states.shape[:2]) if mask is None else mask
        missing = length - states.shape[1]
        return Told(
            functional.pad(states.float().cpu(), (0, 0, 0, missing)),
            mask=functional.pad(mask.bool().cpu(), (0, missing)),
        )

    def posterior(self, pixels: Tensor) -> Tensor:
        """Of a video of one picture."""
        mean: Tensor = self.pipeline.vae.encode(pixels[:, :, None]).latent_dist.mean[:, :, 0]
        return mean

    def reconstructed(self, latents: Tensor) -> Tensor:
        """The one picture of a video."""
        pixels: Tensor = self.pipeline.vae.decode(latents[:, :, None]).sample[:, :, 0]
        return pixels

    def scaled(self, latents: Tensor) -> Tensor:
        """Each channel by its mean and deviation."""
        mean, deviation = self._moments(latents)
        return (latents - mean) / deviation

    def unscaled(self, latents: Tensor) -> Tensor:
        """The way back."""
        mean, deviation = self._moments(latents)
        return latents * deviation + mean

    def _moments(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.pipeline.vae.config
        mean, deviation = (torch.tensor(config[name]).to(like) for name in ("latents_mean", "latents_std"))
        return mean[:, None, None], deviation[:, None, None]


def _factor(vae: Config) -> int:
    """Pixels of a picture's side to one of its latents."""
    return int(2 ** len(vae.get("temperal_downsample", (False, True, True))))
