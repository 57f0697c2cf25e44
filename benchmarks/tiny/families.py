"""The tiny bases by kind, each as its stock pipeline saves it; a family may have several kinds.

They differ in how they are told, guided or drawn. Tests and ``parity.py`` share them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
)

from . import flows
from .parts import CHANNELS, LATENT, autoencoder, clip_config, clip_tokenizer, t5, t5_tokenizer

_SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def _unet(text_width: int, **changes: Any) -> UNet2DConditionModel:
    settings: dict[str, Any] = {
        "sample_size": LATENT,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": text_width,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**settings | changes)


def _stable_diffusion(kind: str) -> StableDiffusionPipeline:
    width, act = (40, "gelu") if kind == "sd2" else (32, "quick_gelu")
    like_sd2: dict[str, Any] = {"attention_head_dim": (2, 4), "use_linear_projection": True}
    tokenizer = clip_tokenizer()
    return StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=CLIPTextModel(clip_config(tokenizer, width=width, act=act, projection=width)),
        tokenizer=tokenizer,
        unet=_unet(width, **like_sd2 if kind == "sd2" else {}),
        scheduler=PNDMScheduler(
            **_SCHEDULE,
            skip_prk_steps=True,
            prediction_type="epsilon" if kind == "epsilon" else "v_prediction",
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _stable_diffusion_xl(*, zeros: bool) -> StableDiffusionXLPipeline:
    tokenizer = clip_tokenizer()
    second = clip_config(tokenizer, width=16, act="gelu", projection=16)
    return StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=CLIPTextModel(clip_config(tokenizer, width=32, act="quick_gelu", projection=32)),
        text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer=tokenizer,
        tokenizer_2=clip_tokenizer(),
        unet=_unet(
            32 + 16,
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
        ),
        scheduler=EulerDiscreteScheduler(**_SCHEDULE, timestep_spacing="leading"),
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )


def _pixart_sigma() -> PixArtSigmaPipeline:
    tokenizer = t5_tokenizer(length=512)
    return PixArtSigmaPipeline(
        vae=autoencoder(),
        text_encoder=t5(tokenizer, width=24),
        tokenizer=tokenizer,
        transformer=PixArtTransformer2DModel(
            sample_size=LATENT,
            in_channels=CHANNELS,
            out_channels=2 * CHANNELS,  # a sigma is learnt beside the noise
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            cross_attention_dim=32,
            caption_channels=24,
            use_additional_conditions=False,
        ),
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02),
    )


KINDS: Mapping[str, Callable[[], Any]] = {
    "epsilon": partial(_stable_diffusion, "epsilon"),
    "velocity": partial(_stable_diffusion, "velocity"),
    "sd2": partial(_stable_diffusion, "sd2"),
    "sdxl": partial(_stable_diffusion_xl, zeros=True),
    "sdxl-empty-prompt": partial(_stable_diffusion_xl, zeros=False),
    "sd3": flows.stable_diffusion_3,
    "flux-dev": partial(flows.flux, distilled=True),
    "flux-schnell": partial(flows.flux, distilled=False),
    "qwen-image": flows.qwen_image,
    "flux2-dev": flows.flux_2,
    "flux2-klein": partial(flows.flux_2_klein, distilled=False),
    "flux2-klein-distilled": partial(flows.flux_2_klein, distilled=True),
    "pixart-sigma": _pixart_sigma,
    "sana": flows.sana,
    "z-image": flows.z_image,
    "lumina2": flows.lumina2,
}
"""Kind to what builds its pipeline."""


def save_tiny(folder: Path, kind: str, *, seed: int = 0) -> Path:
    """An untrained base of a kind, as its stock pipeline saves it, in float32; give ``folder``."""
    torch.manual_seed(seed)
    KINDS[kind]().save_pretrained(folder)
    return folder
