"""PixArt-Sigma: a diffusion transformer that attends to a T5's states, some of which are padding."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PixArtTransformer2DModel
from diffusers.loaders.peft import PeftAdapterMixin
from torch import Tensor

from fade.models.base import Config, Configs
from fade.models.denoiser import Denoiser
from fade.models.diffusion import Diffusion, of_scheduler
from fade.models.supported import side
from fade.models.told import Told

LENGTH = 300
"""Tokens of a prompt that the stock pipelines of PixArt-Sigma and SANA read (``max_sequence_length``)."""


class CrossAttentionTransformer(Denoiser):
    """Text enters through keys and values of its own attention layers, behind one projection of the captions."""

    component = "transformer"
    patterns: ClassVar[Mapping[str, re.Pattern[str]]] = {
        "attention": re.compile(r"\.(to_q|to_k|to_v|to_out\.0)$"),
        "cross_attention": re.compile(r"\.attn2\.(to_k|to_v)$"),
        "text_attention": re.compile(r"\.attn2\."),
        "text_sites": re.compile(r"\.attn2\.(to_k|to_v)$"),
    }

    @torch.no_grad()
    def read(self, states: Tensor) -> Tensor:
        """What the keys and values read: the captions' states, projected."""
        projected: Tensor = self.network.caption_projection(states.to(self.device, self.dtype))
        return projected.float().cpu()

    def predict(self, noisy: Tensor, t: Tensor, told: Told) -> Tensor:
        """Noise or velocity; a sigma that was learnt beside it is left out, as in the stock pipeline."""
        answer: Tensor = self.network(
            noisy.to(self.dtype),
            encoder_hidden_states=told.states.to(self.dtype),
            encoder_attention_mask=told.mask,
            timestep=t.expand(len(noisy)),
            # Sizes, which PixArt-Alpha is told.
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        return answer[:, : noisy.shape[1]]


class AdaptedPixArt(PixArtTransformer2DModel, PeftAdapterMixin):
    """PixArt's transformer with what diffusers gives every other one of these classes: it takes adapters."""


# It is saved under its own name.
AdaptedPixArt.__name__ = PixArtTransformer2DModel.__name__


class PixArtSigma(Diffusion):
    """A T5 of which 300 tokens are read, and a diffusion's schedule (arXiv:2403.04692).

    diffusers has no loader of LoRA files for it: peft loads one into its transformer, and a difference or a merged
    model hold the change without.
    """

    title = "PixArt-Sigma"
    parts: ClassVar[Mapping[str, str]] = {
        "transformer": "PixArtTransformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "T5EncoderModel",
    }
    renamed: ClassVar[Mapping[str, tuple[str, ...]]] = {"transformer": ("Transformer2DModel",)}
    tokenizers: ClassVar[Mapping[str, str]] = {"tokenizer": "text_encoder"}
    exchanged: ClassVar[Mapping[type, type]] = {PixArtTransformer2DModel: AdaptedPixArt}
    denoiser_type = CrossAttentionTransformer

    @classmethod
    def unsupported(cls, config: Configs, scheduler: str) -> list[str]:
        """Sizes told, a caption that is not projected, pictures of unknown size, schedules that are no diffusion's."""
        transformer = config("transformer")
        found = of_scheduler(scheduler, config("scheduler"))
        edge = side(transformer.get("sample_size"))
        if edge is None:
            found.append("does not say the size of its pictures (sample_size)")
        told_sizes = transformer.get("use_additional_conditions")
        if edge == 128 if told_sizes is None else told_sizes:
            found.append("is told the pictures' sizes, as PixArt-Alpha (use_additional_conditions)")
        if transformer.get("caption_channels") is None:
            found.append("does not project its captions (caption_channels)")
        return found

    @classmethod
    def prompt_length(cls, config: Configs) -> int:
        """300."""
        del config
        return LENGTH

    @staticmethod
    def written(tokenizer: Any, prompts: Sequence[str]) -> list[str]:
        """In lower case, as the stock pipeline writes them where bs4 and ftfy are not installed."""
        del tokenizer
        return [prompt.lower().strip() for prompt in prompts]

    @cached_property
    def denoiser(self) -> CrossAttentionTransformer:
        """The transformer on its scheduler's path."""
        config: Config = self.network.config
        edge = side(config["sample_size"]) or 0
        return CrossAttentionTransformer(self.network, self.path, (config["in_channels"], edge, edge))

    def solver(self, name: str, steps: int) -> Any:
        """DDIM, or DPM-Solver++, which is the stock one; of the base's own noise schedule."""
        config = self.pipeline.scheduler.config
        if name == "dpm++":
            scheduler: Any = DPMSolverMultistepScheduler.from_config(config)
        else:  # whose own default would cut latents off at 1
            scheduler = DDIMScheduler.from_config(config, clip_sample=False)
        scheduler.set_timesteps(steps)
        return scheduler

    def prepare(self) -> None:
        """Its network takes adapters."""
        self.network.__class__ = AdaptedPixArt

    def encoded(self, prompts: list[str]) -> Told:
        """As the stock pipeline encodes them, and which positions hold text."""
        states, mask, _, _ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=self.reads_on, max_sequence_length=LENGTH
        )
        return Told(states.float().cpu(), mask.bool().cpu())
