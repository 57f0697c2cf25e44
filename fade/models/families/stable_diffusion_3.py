"""Stable Diffusion 3 and 3.5: a flow-matching transformer in which text and picture attend to each other."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from fade.models.base import Base, Config, Configs
from fade.models.denoiser import Denoiser
from fade.models.paths import FlowPath
from fade.models.supported import autoencoder_factor, side
from fade.models.told import Told


class JointTransformer(Denoiser):
    """Text enters once, through the context embedder, and is then attended to by projections of its own."""

    component = "transformer"
    patterns: ClassVar[Mapping[str, re.Pattern[str]]] = {
        "attention": re.compile(r"\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)$"),
        "cross_attention": re.compile(r"\.(add_k_proj|add_v_proj)$"),
        "text_attention": re.compile(r"\.(add_q_proj|add_k_proj|add_v_proj|to_add_out)$"),
        "text_sites": re.compile(r"^context_embedder$"),
    }

    def predict(self, noisy: Tensor, t: Tensor, told: Told) -> Tensor:
        """The velocity e - z_0."""
        answer: Tensor = self.network(
            hidden_states=noisy.to(self.dtype),
            encoder_hidden_states=told.states.to(self.dtype),
            pooled_projections=told.others["pooled"].to(self.dtype),
            timestep=t.expand(len(noisy)),
        ).sample
        return answer


class StableDiffusion3(Base):
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
        found = []
        if scheduler != "FlowMatchEulerDiscreteScheduler":
            found.append(f"has a {scheduler} (expected FlowMatchEulerDiscreteScheduler)")
        if config("scheduler").get("use_dynamic_shifting"):
            found.append("shifts its noise by the picture's size (use_dynamic_shifting)")
        if side(config("transformer").get("sample_size")) is None:
            found.append("does not say the size of its pictures (sample_size)")
        return found

    @classmethod
    def pictures_of(cls, config: Configs) -> int:
        """The latents' side times the autoencoder's factor."""
        return int(side(config("transformer")["sample_size"]) or 0) * autoencoder_factor(config("vae"))

    @classmethod
    def predicts(cls, config: Configs) -> str:
        """A flow's velocity, e - z_0."""
        del config
        return "velocity of a flow"

    @cached_property
    def denoiser(self) -> JointTransformer:
        """The transformer on the straight path."""
        config: Config = self.network.config
        edge = side(config["sample_size"]) or 0
        path = FlowPath(self.pipeline.scheduler.config.num_train_timesteps)
        return JointTransformer(self.network, path, (config["in_channels"], edge, edge))

    @staticmethod
    def noise_schedule(scheduler: Any) -> tuple[object, Tensor | None]:
        """The number of times, and how they are shifted."""
        config = scheduler.config
        return "flow", torch.tensor([float(config.num_train_timesteps), float(config.shift)])

    def solver(self, name: str, steps: int) -> Any:
        """``ddim``, which on a flow is Euler's step and the base's own scheduler; or DPM-Solver++ along the flow."""
        own = self.pipeline.scheduler
        if name == "dpm++":
            scheduler: Any = DPMSolverMultistepScheduler(
                num_train_timesteps=own.config.num_train_timesteps,
                prediction_type="flow_prediction",
                use_flow_sigmas=True,
                flow_shift=own.config.shift,
            )
        else:
            scheduler = type(own).from_config(own.config)
        scheduler.set_timesteps(steps)
        return scheduler

    @torch.no_grad()
    def encoded(self, prompts: list[str]) -> Told:
        """As the stock pipeline encodes them: CLIP's positions before those of T5, and CLIP's pooled states."""
        states, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompts, prompt_2=prompts, prompt_3=prompts, device=self.device, do_classifier_free_guidance=False
        )
        return Told(states.float().cpu(), others={"pooled": pooled.float().cpu()})
