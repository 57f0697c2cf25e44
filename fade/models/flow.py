"""What the families of flow-matching transformers share: their path, their scheduler, and what they cannot be."""

from __future__ import annotations

import math
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

EULER = "FlowMatchEulerDiscreteScheduler"


class FlowMatching(Base):
    """A base that was trained on the straight path, drawn by flow matching's Euler steps (arXiv:2209.03003)."""

    # From no change the same training disturbs twice as much here as on a U-Net (docs/method.md).
    defaults: ClassVar[Mapping[str, Any]] = {"distill.start": "closed_form", "distill.learning_rate": 5e-4}

    @classmethod
    def unsupported(cls, config: Configs, scheduler: str) -> list[str]:
        """Another scheduler than flow matching's."""
        return cls.of_scheduler(config, scheduler)

    @classmethod
    def of_scheduler(cls, config: Configs, scheduler: str) -> list[str]:
        """What of its scheduler is not supported; arguments and phrases are those of ``unsupported``."""
        del config
        return [f"has a {scheduler} (expected {EULER})"] if scheduler != EULER else []

    @classmethod
    def predicts(cls, config: Configs) -> str:
        """A flow's velocity, e - z_0."""
        del config
        return "velocity of a flow"

    @property
    def path(self) -> FlowPath:
        """The straight path, in as many times as its scheduler counts."""
        return FlowPath(self.pipeline.scheduler.config.num_train_timesteps)

    @staticmethod
    def noise_schedule(scheduler: Any) -> tuple[object, Tensor | None]:
        """The number of times, and how they are shifted."""
        config = scheduler.config
        shifts = [config.get(name) or 0.0 for name in ("base_shift", "max_shift", "shift_terminal")]
        dynamic = shifts if config.get("use_dynamic_shifting") else []
        return "flow", torch.tensor([float(config.num_train_timesteps), float(config.shift), *map(float, dynamic)])

    def times(self, steps: int) -> dict[str, Any]:
        """What the stock pipeline tells its scheduler of the times besides their number (``sigmas``, ``mu``)."""
        del steps
        return {}

    def solver(self, name: str, steps: int) -> Any:
        """``ddim``, which on a flow is Euler's step and the base's own scheduler; or DPM-Solver++ along the flow."""
        own, told = self.pipeline.scheduler, self.times(steps)
        if name == "dpm++":
            scheduler: Any = DPMSolverMultistepScheduler(
                num_train_timesteps=own.config.num_train_timesteps,
                prediction_type="flow_prediction",
                use_flow_sigmas=True,
                flow_shift=_shift(own.config, told.get("mu")),
            )
            scheduler.set_timesteps(steps)
        else:
            scheduler = type(own).from_config(own.config)
            scheduler.set_timesteps(**told if "sigmas" in told else {"num_inference_steps": steps, **told})
        return scheduler


class SizedByTransformer(FlowMatching):
    """A flow whose transformer's ``sample_size`` is the side of its latents."""

    @classmethod
    def unsupported(cls, config: Configs, scheduler: str) -> list[str]:
        """Another scheduler, or pictures of unknown size."""
        found = super().unsupported(config, scheduler)
        if side(config("transformer").get("sample_size")) is None:
            found.append("does not say the size of its pictures (sample_size)")
        return found

    @cached_property
    def denoiser(self) -> Denoiser:
        """The transformer on the straight path."""
        config: Config = self.network.config
        edge = side(config["sample_size"]) or 0
        return self.denoiser_type(self.network, self.path, (config["in_channels"], edge, edge))


class SizedByAutoencoder(FlowMatching):
    """A flow on tokens of 2 x 2 latents whose transformer is of no size: the autoencoder's ``sample_size`` says it."""

    usual_size: ClassVar[int | None] = None
    """Of pictures, in pixels, where the autoencoder says none; None: it must."""

    @classmethod
    def unsupported(cls, config: Configs, scheduler: str) -> list[str]:
        """Another scheduler, or pictures of unknown size."""
        found, vae = super().unsupported(config, scheduler), config("vae")
        edge = side(vae.get("sample_size", cls.usual_size))
        if edge is None or edge % (2 * autoencoder_factor(vae)):
            found.append(f"does not say a size of pictures that two latents divide (sample_size of its vae: {edge})")
        return found

    @classmethod
    def pictures_of(cls, config: Configs) -> int:
        """The autoencoder's ``sample_size``."""
        return int(side(config("vae").get("sample_size", cls.usual_size)) or 0)


def _shift(config: Any, mu: float | None) -> float:
    """The factor that moves times towards noise: told by the base, or by the picture's size."""
    if mu is None or not config.use_dynamic_shifting:
        return float(config.shift)
    return math.exp(mu) if config.time_shift_type == "exponential" else mu


def size_shift(tokens: int, config: Mapping[str, Any] | Config) -> float:
    """mu, by which FLUX.1, Qwen-Image and Lumina2 shift their times: linear in the number of the picture's tokens.

    As their pipelines in diffusers compute it (``calculate_shift``).
    """
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return float(least + (tokens - low) * (most - least) / (high - low))


def packed(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h/2 w/2, 4 C): a token for each patch of 2 x 2."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, height * width // 4, channels * 4)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """The way back, to (B, C, height, width)."""
    batch, _, wide = tokens.shape
    patches = tokens.view(batch, height // 2, width // 2, wide // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, wide // 4, height, width)
