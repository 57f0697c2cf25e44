"""Training of a small base that can be cut off and goes on: the loops of ``base.py`` with a checkpoint.

Step for step they draw and compute what ``base.train_autoencoder`` and ``base.train_denoiser`` do, so a
training, cut off or not, gives the same bytes as those give; a test holds the two together. They stand
beside each other because whatever changes in ``base.py`` makes the shipped base stale.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from fade.errors import ConfigError, DataError
from fade.files import writing
from fade.models.base import (
    StepStats,
    _Captions,
    _descend,
    _gradient_l1,
    _learning_rate,
    _set_learning_rate,
)
from fade.models.diffusion import add_noise, autocast, make_noise_scheduler, min_snr_weights
from fade.models.latents import encode_pictures, to_tensor
from fade.seeding import torch_generator


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a training is kept, how often, and of what.

    Attributes:
        made_of: names pictures, captions and settings; a checkpoint of others is refused.
    """

    path: Path
    every: int
    made_of: str


class _Training:
    """All that changes from step to step, so that it can be written and read back whole."""

    def __init__(
        self, modules: Mapping[str, nn.Module], generator: torch.Generator, *, learning_rate: float, weight_decay: float
    ) -> None:
        self.parameters = [parameter for module in modules.values() for parameter in module.parameters()]
        self.averages = [parameter.detach().clone() for parameter in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.99), fused=True
        )
        self._generator = generator

    def save(self, checkpoint: Checkpoint, step: int) -> None:
        tensors = {"generator": self._generator.get_state(), "step": torch.tensor(step)}
        for i, parameter in enumerate(self.parameters):
            tensors |= {f"{i}.value": parameter.detach(), f"{i}.average": self.averages[i]}
            tensors |= {f"{i}.{name}": state for name, state in self.optimizer.state[parameter].items()}
        with writing(checkpoint.path) as temporary:
            save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, {"made_of": checkpoint.made_of})

    @torch.no_grad()
    def load(self, checkpoint: Checkpoint) -> int:
        """Steps that were done; 0 if nothing is kept.

        Raises:
            ConfigError: what is kept was made of other pictures or settings.
        """
        if not checkpoint.path.is_file():
            return 0
        with safe_open(checkpoint.path, "pt") as file:
            if file.metadata()["made_of"] != checkpoint.made_of:
                raise ConfigError(
                    f"{checkpoint.path} was made of other pictures or settings. Remove it to begin anew, or train with "
                    "what it was made of."
                )
            state = self.optimizer.state_dict()
            for i, parameter in enumerate(self.parameters):
                parameter.copy_(file.get_tensor(f"{i}.value"))
                self.averages[i].copy_(file.get_tensor(f"{i}.average"))
                state["state"][i] = {n: file.get_tensor(f"{i}.{n}") for n in ("step", "exp_avg", "exp_avg_sq")}
            self.optimizer.load_state_dict(state)
            self._generator.set_state(file.get_tensor("generator"))
            return int(file.get_tensor("step"))


def train_autoencoder(
    vae: AutoencoderKL,
    pictures: NDArray[np.uint8],
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
    checkpoint: Checkpoint,
) -> Iterator[StepStats]:
    """As ``base.train_autoencoder``, from where the checkpoint ends.

    Args:
        pictures: (N, H, W, 3) uint8.

    Raises:
        DataError: there are no pictures.
        ConfigError: the checkpoint is of another training.
    """
    if len(pictures) == 0:
        raise DataError("No pictures to train the autoencoder on: got 0. Give a catalog with pictures.")
    generator = torch_generator(seed, "autoencoder")
    training = _Training({"vae": vae}, generator, learning_rate=learning_rate, weight_decay=1e-4)
    vae.train()
    for step in range(training.load(checkpoint) + 1, steps + 1):
        chosen = torch.randint(len(pictures), (batch,), generator=generator).numpy()
        target = to_tensor(pictures[chosen])
        _set_learning_rate(training.optimizer, _learning_rate(step, steps, learning_rate))
        with autocast("bf16"):
            posterior = vae.encode(target).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            sampled = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)
            decoded = vae.decode(sampled).sample.float()
        divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        loss = F.l1_loss(decoded, target) + 0.5 * _gradient_l1(decoded, target) + 1e-6 * divergence
        _descend(loss, training.optimizer, training.parameters)
        if step % checkpoint.every == 0 or step == steps:
            training.save(checkpoint, step)
        yield StepStats(step, steps, float(loss.detach()))
    vae.eval()
    sample = encode_pictures(vae, pictures[:: max(1, len(pictures) // 1024)], scaled=False)
    vae.register_to_config(scaling_factor=round(float(1 / sample.std()), 5))


def train_denoiser(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    latents: Tensor,
    captions: Sequence[Sequence[str]],
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    ema_decay: float,
    seed: int,
    checkpoint: Checkpoint,
) -> Iterator[StepStats]:
    """As ``base.train_denoiser``, from where the checkpoint ends.

    Args:
        latents: (N, C, h, w) float32, scaled.
        captions: N lists of captions, canonical first.

    Raises:
        ConfigError: the checkpoint is of another training.
    """
    generator = torch_generator(seed, "denoiser")
    alphas_cumprod = make_noise_scheduler().alphas_cumprod
    drawn = _Captions(tokenizer, captions)
    # Plain attention is faster than the fused kernel in the backward pass on CPU.
    unet.set_attn_processor(AttnProcessor())
    modules = {"unet": unet, "text_encoder": text_encoder}
    training = _Training(modules, generator, learning_rate=learning_rate, weight_decay=1e-2)
    unet.train()
    text_encoder.train()
    for step in range(training.load(checkpoint) + 1, steps + 1):
        rows = torch.randint(len(latents), (batch,), generator=generator)
        ids = drawn.draw(rows, generator)
        timesteps = torch.randint(len(alphas_cumprod), (batch,), generator=generator)
        noise = torch.randn(latents[rows].shape, generator=generator)
        noisy = add_noise(latents[rows], noise, timesteps, alphas_cumprod)
        _set_learning_rate(training.optimizer, _learning_rate(step, steps, learning_rate))
        with autocast("bf16"):
            predicted = unet(noisy, timesteps, text_encoder(ids).last_hidden_state).sample
        error = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
        loss = (error * min_snr_weights(timesteps, alphas_cumprod, 5.0)).mean()
        _descend(loss, training.optimizer, training.parameters)
        decay = min(ema_decay, step / (step + 9))
        torch._foreach_lerp_(training.averages, [parameter.detach() for parameter in training.parameters], 1 - decay)
        if step % checkpoint.every == 0 or step == steps:
            training.save(checkpoint, step)
        yield StepStats(step, steps, float(loss.detach()))
    with torch.no_grad():
        for parameter, average in zip(training.parameters, training.averages, strict=True):
            parameter.copy_(average)
    unet.eval()
    text_encoder.eval()
