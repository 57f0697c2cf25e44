"""FLUX.2 dev and klein: double and single blocks told by a language model, on patches of batch-normed latents."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor
from torch.nn import functional

from fade.models.base import Configs
from fade.models.denoiser import Denoiser
from fade.models.flow import SizedByAutoencoder
from fade.models.supported import autoencoder_factor
from fade.models.told import Told

LENGTH = 512
"""Tokens of a prompt, its template among them; all of them are read, what a prompt leaves over too."""
GUIDANCE = 4.0
"""What dev is told where nobody says otherwise, as in training: the stock pipeline's own."""
_FUSED = re.compile(r"\.to_qkv_mlp_proj$")


class Flux2Transformer(Denoiser):
    """Text enters through the context embedder; in the single blocks one matrix holds queries, keys, values and the
    feed-forward's two halves, for text and picture alike."""

    component = "transformer"
    patterns: ClassVar[Mapping[str, re.Pattern[str]]] = {
        "attention": re.compile(
            r"\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out|to_qkv_mlp_proj|attn\.to_out)$"
        ),
        "cross_attention": re.compile(r"\.(add_k_proj|add_v_proj)$"),
        "text_attention": re.compile(r"\.(add_q_proj|add_k_proj|add_v_proj|to_add_out)$"),
        "text_sites": re.compile(r"^context_embedder$"),
    }

    def predict(self, noisy: Tensor, t: Tensor, told: Told) -> Tensor:
        """The velocity e - z_0."""
        count, _, height, width = noisy.shape
        guidance = told.others.get("guidance")
        text = torch.zeros(told.states.shape[1], 4, device=noisy.device, dtype=torch.int64)
        text[:, 3] = torch.arange(len(text))
        answer: Tensor = self.network(
            hidden_states=noisy.to(self.dtype).flatten(2).transpose(1, 2),
            encoder_hidden_states=told.states.to(self.dtype),
            timestep=t.expand(count) / self.path.steps,
            guidance=None if guidance is None else guidance[:, 0],
            img_ids=torch.cartesian_prod(
                torch.arange(1), torch.arange(height), torch.arange(width), torch.arange(1)
            ).to(noisy.device),
            txt_ids=text,
        ).sample
        return answer.transpose(1, 2).unflatten(2, (height, width))

    def fused(self) -> dict[str, tuple[int, ...]]:
        """Queries, keys, values, gate and linear half of every single block."""
        config = self.network.config
        width = config.num_attention_heads * config.attention_head_dim
        rows = (*[width] * 3, *[int(width * config.mlp_ratio)] * 2)
        return {name: rows for name in self.modules() if _FUSED.search(name)}


class Flux2(SizedByAutoencoder):
    """FLUX.2 dev: three layers of Mistral's states, and the guidance that it was distilled for."""

    title = "FLUX.2 dev"
    parts: ClassVar[Mapping[str, str]] = {
        "transformer": "Flux2Transformer2DModel",
        "vae": "AutoencoderKLFlux2",
        "text_encoder": "Mistral3ForConditionalGeneration",
    }
    tokenizers: ClassVar[Mapping[str, str]] = {"tokenizer": "text_encoder"}
    tokenizer_classes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        # Text alone needs no processor of pictures; the library's own needs torchvision.
        "tokenizer": ("PixtralProcessor", "LlamaTokenizer", "TokenizersBackend", "Qwen2Tokenizer")
    }
    denoiser_type = Flux2Transformer
    usual_size = 1024

    @classmethod
    def unsupported(cls, config: Configs, scheduler: str) -> list[str]:
        """Another scheduler, a transformer that takes other channels than patches of latents, an unknown size."""
        found, vae = super().unsupported(config, scheduler), config("vae")
        takes, latent = config("transformer").get("in_channels", 128), vae.get("latent_channels", 32)
        if takes != 4 * latent or list(vae.get("patch_size", (2, 2))) != [2, 2]:
            found.append(f"has a transformer that takes {takes} channels for patches of 2 x 2 of {latent}")
        return found

    @classmethod
    def prompt_length(cls, config: Configs) -> int:
        """``LENGTH``."""
        del config
        return LENGTH

    @cached_property
    def denoiser(self) -> Flux2Transformer:
        """The transformer on the straight path; its latents are patches of 2 x 2 of the autoencoder's."""
        edge = self.picture_size // autoencoder_factor(self.pipeline.vae.config) // 2
        return Flux2Transformer(self.network, self.path, (self.network.config.in_channels, edge, edge))

    def times(self, steps: int) -> dict[str, Any]:
        """Equal steps of s, shifted by the picture's size and the number of steps."""
        edge = self.denoiser.latent_shape[1]
        return {"sigmas": np.linspace(1.0, 1 / steps, steps), "mu": compute_empirical_mu(edge * edge, steps)}

    def guide(self, told: Told, guidance: float) -> tuple[Told, float]:
        """It is told the guidance, and asked once a step."""
        said = torch.full_like(told.others["guidance"], guidance)
        return replace(told, others={**told.others, "guidance": said}), 1.0

    def encoded(self, prompts: list[str]) -> Told:
        """As the stock pipeline encodes them: three layers' states of every position, beside each other."""
        tokenizer = getattr(self.pipeline.tokenizer, "tokenizer", self.pipeline.tokenizer)
        states, _ = self.pipeline.encode_prompt(
            prompt=prompts, device=self.reads_on, max_sequence_length=min(LENGTH, int(tokenizer.model_max_length))
        )
        return Told(states.float().cpu(), others=self.further(len(prompts)))

    def further(self, count: int) -> dict[str, Tensor]:
        """What it is told besides the text."""
        return {"guidance": torch.full((count, 1), GUIDANCE)}

    def scaled(self, latents: Tensor) -> Tensor:
        """Patches of 2 x 2, each channel by the running statistics of the autoencoder's batch norm."""
        mean, deviation = self._moments(latents)
        return (functional.pixel_unshuffle(latents, 2) - mean) / deviation

    def unscaled(self, latents: Tensor) -> Tensor:
        """The way back."""
        mean, deviation = self._moments(latents)
        return functional.pixel_shuffle(latents * deviation + mean, 2)

    def _moments(self, like: Tensor) -> tuple[Tensor, Tensor]:
        vae = self.pipeline.vae
        deviation = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
        return vae.bn.running_mean.to(like)[:, None, None], deviation.to(like)[:, None, None]


class Flux2Klein(Flux2):
    """FLUX.2 klein: Qwen3's states; truly guided, or distilled to a few steps and drawn without guidance."""

    title = "FLUX.2 klein"
    parts: ClassVar[Mapping[str, str]] = {**Flux2.parts, "text_encoder": "Qwen3ForCausalLM"}
    tokenizer_classes: ClassVar[Mapping[str, tuple[str, ...]]] = {"tokenizer": ("Qwen2Tokenizer",)}

    def guide(self, told: Told, guidance: float) -> tuple[Told, float]:
        """What was distilled ignores guidance, as in the stock pipeline."""
        return told, 1.0 if self.pipeline.config.is_distilled else guidance

    def further(self, count: int) -> dict[str, Tensor]:
        """Nothing."""
        del count
        return {}
