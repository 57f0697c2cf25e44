"""Stable Diffusion 3 and 3.5: a flow-matching transformer in which text and picture attend to each other."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from fade.models.base import Configs
from fade.models.denoiser import Denoiser
from fade.models.flow import SizedByTransformer
from fade.models.joint_attention import CountedJointAttention
from fade.models.told import Told


class JointTransformer(Denoiser):
    """Text enters once, through the context embedder, and is then attended to by projections of its own."""

    component = "transformer"
    patterns: ClassVar[Mapping[str, re.Pattern[str]]] = {
        "attention": re.compile(r"\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)$"),
        "cross_attention": re.compile(r"\.(add_k_proj|add_v_proj)$"),
        "text_attention": re.compile(r"\.(add_q_proj|add_k_proj|add_v_proj|to_add_out)$"),
        "text_sites": re.compile(r"^context_embedder$"),
        "pooled_sites": re.compile(r"^time_text_embed\.text_embedder\.linear_1$"),
    }

    def predict(self, noisy: Tensor, t: Tensor, told: Told) -> Tensor:
        """The velocity e - z_0; a network without our attention is told every position that one stands for."""
        states, counted = told.states, None
        if "empty" in told.others:
            count = int(told.others["empty"][0, 0])
            if self._counts():
                counted = {"count": count}
            else:
                states = torch.cat([states[:, :-1], states[:, -1:].expand(-1, count, -1)], dim=1)
        answer: Tensor = self.network(
            hidden_states=noisy.to(self.dtype),
            encoder_hidden_states=states.to(self.dtype),
            pooled_projections=told.others["pooled"].to(self.dtype),
            timestep=t.expand(len(noisy)),
            joint_attention_kwargs=counted,
        ).sample
        return answer

    def _counts(self) -> bool:
        return all(isinstance(one, CountedJointAttention) for one in self.network.attn_processors.values())


class StableDiffusion3(SizedByTransformer):
    """Two CLIPs, and a T5 that may be absent (arXiv:2403.03206)."""

    title = "Stable Diffusion 3 and 3.5"
    parts: ClassVar[Mapping[str, str]] = {
        "transformer": "SD3Transformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "text_encoder_3": "T5EncoderModel",
    }
    optional = ("text_encoder_3",)
    tokenizers: ClassVar[Mapping[str, str]] = {
        "tokenizer": "text_encoder",
        "tokenizer_2": "text_encoder_2",
        "tokenizer_3": "text_encoder_3",
    }
    denoiser_type = JointTransformer
    left_out: ClassVar[Mapping[str, Any]] = {"feature_extractor": None, "image_encoder": None}

    @classmethod
    def unsupported(cls, config: Configs, scheduler: str) -> list[str]:
        """Another scheduler than flow matching's, or pictures of unknown size."""
        found = super().unsupported(config, scheduler)
        if config("scheduler").get("use_dynamic_shifting"):
            found.append("shifts its noise by the picture's size (use_dynamic_shifting)")
        return found

    def prepare(self) -> None:
        """Without a T5 the zeros in its place are counted, not repeated."""
        if self.pipeline.text_encoder_3 is None:
            self.network.set_attn_processor(CountedJointAttention())

    def encoded(self, prompts: list[str]) -> Told:
        """As the stock pipeline encodes them: CLIP's positions before those of T5, and CLIP's pooled states.

        Where there is no T5 its zeros are one position, and ``empty`` says how many it stands for.
        """
        states, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompts, prompt_2=prompts, prompt_3=prompts, device=self.reads_on, do_classifier_free_guidance=False
        )
        others = {"pooled": pooled.float().cpu()}
        if self.pipeline.text_encoder_3 is None:
            read = self.pipeline.tokenizer_max_length
            others["empty"] = torch.full((len(prompts), 1), states.shape[1] - read)
            states = states[:, : read + 1]
        return Told(states.float().cpu(), others=others)
