"""SANA: a flow-matching transformer of linear attention, told by a Gemma that is first told what to do."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SanaPipeline
from torch import Tensor

from fade.models.base import Configs
from fade.models.families.pixart_sigma import LENGTH, CrossAttentionTransformer, PixArtSigma
from fade.models.flow import SizedByTransformer
from fade.models.told import Told

_SCHEDULER = "DPMSolverMultistepScheduler"
INSTRUCTION: list[str] = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
"""What the stock pipeline writes before every prompt, but not before the empty one of guidance."""


class LinearTransformer(CrossAttentionTransformer):
    """Keys and values of the text stand behind a projection of the captions and a norm."""

    @torch.no_grad()
    def read(self, states: Tensor) -> Tensor:
        """What the keys and values read: the captions' states, projected and normed."""
        network = self.network
        read: Tensor = network.caption_norm(network.caption_projection(states.to(self.device, self.dtype)))
        return read.float().cpu()

    def predict(self, noisy: Tensor, t: Tensor, told: Told) -> Tensor:
        """The velocity e - z_0."""
        answer: Tensor = self.network(
            noisy.to(self.dtype),
            encoder_hidden_states=told.states.to(self.dtype),
            encoder_attention_mask=told.mask,
            timestep=t.expand(len(noisy)) * self.network.config.timestep_scale,
        ).sample
        return answer[:, : noisy.shape[1]]


class Sana(SizedByTransformer):
    """SANA and SANA-1.5 (arXiv:2410.10629): Gemma's states, and an autoencoder of factor 32."""

    title = "SANA"
    parts: ClassVar[Mapping[str, str]] = {
        "transformer": "SanaTransformer2DModel",
        "vae": "AutoencoderDC",
        "text_encoder": "Gemma2Model",
    }
    tokenizers: ClassVar[Mapping[str, str]] = {"tokenizer": "text_encoder"}
    tokenizer_classes: ClassVar[Mapping[str, tuple[str, ...]]] = {"tokenizer": ("GemmaTokenizer",)}
    denoiser_type = LinearTransformer

    @classmethod
    def unsupported(cls, config: Configs, scheduler: str) -> list[str]:
        """Guidance told (SANA-Sprint), a schedule that is no flow's, or pictures of unknown size."""
        found = super().unsupported(config, scheduler)
        if config("transformer").get("guidance_embeds"):
            found.append("has a transformer that is told the guidance (SANA-Sprint)")
        return found

    @classmethod
    def of_scheduler(cls, config: Configs, scheduler: str) -> list[str]:
        """Another one than DPM-Solver++ along a flow."""
        schedule = config("scheduler")
        if scheduler != _SCHEDULER:
            return [f"has a {scheduler} (expected {_SCHEDULER})"]
        if not schedule.get("use_flow_sigmas") or schedule.get("prediction_type") != "flow_prediction":
            return ["is no flow (its scheduler lacks use_flow_sigmas, or predicts something else)"]
        return []

    @classmethod
    def prompt_length(cls, config: Configs) -> int:
        """What is left of 300 beside the instruction's last token."""
        del config
        return LENGTH - 1

    @staticmethod
    def written(tokenizer: Any, prompts: Sequence[str]) -> list[str]:
        """In lower case; the instruction before it has tokens of its own."""
        return PixArtSigma.written(tokenizer, prompts)

    @staticmethod
    def noise_schedule(scheduler: Any) -> tuple[object, Tensor | None]:
        """The number of times, and how they are shifted."""
        config = scheduler.config
        return "flow", torch.tensor([float(config.num_train_timesteps), float(config.flow_shift)])

    def solver(self, name: str, steps: int) -> Any:
        """DPM-Solver++ along the flow, which is the stock one; or ``ddim``, which on a flow is Euler's step."""
        config = self.pipeline.scheduler.config
        if name == "dpm++":
            scheduler: Any = DPMSolverMultistepScheduler.from_config(config)
        else:
            times = config.num_train_timesteps
            scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=times, shift=config.flow_shift)
        scheduler.set_timesteps(steps)
        return scheduler

    def posterior(self, pixels: Tensor) -> Tensor:
        """The latents themselves: this autoencoder has no posterior."""
        latents: Tensor = self.pipeline.vae.encode(pixels).latent
        return latents

    def encoded(self, prompts: list[str]) -> Told:
        """As the stock pipeline encodes them, behind its instruction; the empty one, which guidance needs, without."""
        return Told.join(*(self._told(prompt, INSTRUCTION if prompt else []) for prompt in prompts))

    def _told(self, prompt: str, instruction: list[str]) -> Told:
        states, mask, _, _ = self.pipeline.encode_prompt(
            prompt,
            do_classifier_free_guidance=False,
            device=self.reads_on,
            max_sequence_length=LENGTH,
            complex_human_instruction=instruction,
        )
        return Told(states.float().cpu(), mask.bool().cpu())
