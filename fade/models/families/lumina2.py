"""Lumina-Image 2.0: a flow-matching transformer of a single stream, told by Gemma."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fade.models.base import Configs
from fade.models.denoiser import Denoiser
from fade.models.flow import SizedByTransformer, size_shift
from fade.models.told import Told

_LENGTH = 256
SYSTEM = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based "
    "on textual prompts or user prompts. <Prompt Start> "
)
"""What the stock pipeline writes before every prompt, but not before the empty one of guidance."""


class RefinedTransformer(Denoiser):
    """Text enters through the caption embedder, is refined by layers of its own, and is then one sequence with the
    picture, whose projections are shared by both."""

    component = "transformer"
    patterns: ClassVar[Mapping[str, re.Pattern[str]]] = {
        "attention": re.compile(r"\.(to_q|to_k|to_v|to_out\.0)$"),
        "cross_attention": re.compile(r"^context_refiner\.\d+\.attn\.(to_k|to_v)$"),
        "text_attention": re.compile(r"^context_refiner\.\d+\.attn\."),
        "text_sites": re.compile(r"^time_caption_embed\.caption_embedder\.1$"),
    }

    @torch.no_grad()
    def read(self, states: Tensor) -> Tensor:
        """What the caption embedder's projection reads: the states, normed."""
        norm = self.network.time_caption_embed.caption_embedder[0]
        normed: Tensor = norm(states.to(self.device, self.dtype))
        return normed.float().cpu()

    def predict(self, noisy: Tensor, t: Tensor, told: Told) -> Tensor:
        """The velocity e - z_0; the network itself answers z_0 - e, and its times run from noise to picture."""
        answer: Tensor = self.network(
            noisy.to(self.dtype),
            1 - t.expand(len(noisy)) / self.path.steps,
            told.states.to(self.dtype),
            told.mask,
        ).sample
        return -answer


class Lumina2(SizedByTransformer):
    """Gemma's last but one states behind a system prompt (arXiv:2503.21758), and guidance that keeps its length."""

    title = "Lumina-Image 2.0"
    parts: ClassVar[Mapping[str, str]] = {
        "transformer": "Lumina2Transformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "Gemma2Model",
    }
    tokenizers: ClassVar[Mapping[str, str]] = {"tokenizer": "text_encoder"}
    tokenizer_classes: ClassVar[Mapping[str, tuple[str, ...]]] = {"tokenizer": ("GemmaTokenizer",)}
    denoiser_type = RefinedTransformer

    @classmethod
    def prompt_length(cls, config: Configs) -> int:
        """256, the system prompt among them."""
        del config
        return _LENGTH

    @staticmethod
    def written(tokenizer: Any, prompts: Sequence[str]) -> list[str]:
        """Behind the system prompt."""
        del tokenizer
        return [SYSTEM + prompt for prompt in prompts]

    def times(self, steps: int) -> dict[str, Any]:
        """Equal steps of s; where they are shifted, the stock pipeline takes the channels for the picture's size."""
        mu = size_shift(self.denoiser.latent_shape[0], self.pipeline.scheduler.config)
        return {"sigmas": np.linspace(1.0, 1 / steps, steps), "mu": mu}

    def combine(self, without: Tensor, with_prompt: Tensor, guidance: float) -> Tensor:
        """Guidance whose every row of latents is as long as the prompt's own answer, as in the stock pipeline."""
        answer = super().combine(without, with_prompt, guidance)
        length, own = (torch.linalg.vector_norm(one, dim=-1, keepdim=True) for one in (answer, with_prompt))
        return answer * (own / length)

    def encoded(self, prompts: list[str]) -> Told:
        """As the stock pipeline encodes them; the empty one, which guidance needs, without the system prompt."""
        return Told.join(*map(self._told, prompts))

    def _told(self, prompt: str) -> Told:
        states, mask, empty, empty_mask = self.pipeline.encode_prompt(
            [prompt], device=self.reads_on, max_sequence_length=_LENGTH
        )
        states, mask = (states, mask) if prompt else (empty, empty_mask)
        return Told(states.float().cpu(), mask.bool().cpu())
