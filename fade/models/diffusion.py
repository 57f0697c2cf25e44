"""The forward process, written once: noise levels, noisy latents and what the network predicts."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from fade.errors import ConfigError


def make_noise_scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.x's noise schedule (scaled linear, 1000 steps, epsilon prediction)."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """z_t = sqrt(a_t) z_0 + sqrt(1 - a_t) e   (DDPM, arXiv:2006.11239, eq. 4).

    Args:
        latents: z_0, (B, C, H, W), scaled by the autoencoder's scaling factor.
        noise: e, of the same shape.
        timesteps: (B,) integers in 0..T-1.
        alphas_cumprod: (T,), the noise scheduler's.
    """
    level = alphas_cumprod.to(latents.device, latents.dtype)[timesteps][:, None, None, None]
    return level.sqrt() * latents + (1 - level).sqrt() * noise


def min_snr_weights(timesteps: Tensor, alphas_cumprod: Tensor, gamma: float) -> Tensor:
    """min(SNR, gamma) / SNR for epsilon prediction, (B,)   (arXiv:2303.09556, section 3.4)."""
    level = alphas_cumprod[timesteps].float()
    snr = level / (1 - level)
    return torch.clamp(snr, max=gamma) / snr


def denoising_target(
    latents: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, prediction_type: str
) -> Tensor:
    """What a network of this prediction type learns to answer: e, or v = sqrt(a_t) e - sqrt(1 - a_t) z_0.

    v-prediction: arXiv:2202.00512, appendix D.

    Raises:
        ConfigError: another prediction type than ``epsilon`` or ``v_prediction``.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        level = alphas_cumprod.to(latents.device, latents.dtype)[timesteps][:, None, None, None]
        return level.sqrt() * noise - (1 - level).sqrt() * latents
    raise ConfigError(f"Prediction type {prediction_type!r} is not supported: expected 'epsilon' or 'v_prediction'.")


def autocast(precision: str, device: str = "cpu") -> AbstractContextManager[None]:
    """Matrix products in bfloat16 for ``bf16``, untouched float32 for ``fp32``."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")
