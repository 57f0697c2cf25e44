"""Tiny pipelines of flow-matching transformers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import nn
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from .parts import (
    CHANNELS,
    LATENT,
    PICTURE,
    autoencoder,
    clip_config,
    clip_tokenizer,
    gemma,
    gemma_tokenizer,
    language_tokenizer,
    qwen3,
    t5,
    t5_tokenizer,
)


def stable_diffusion_3() -> StableDiffusion3Pipeline:
    """Two CLIPs and no T5."""
    tokenizer = clip_tokenizer()
    vae = autoencoder(shift_factor=0.1, scaling_factor=1.5)
    first, second = (
        CLIPTextModelWithProjection(clip_config(tokenizer, width=width, act=act, projection=width))
        for width, act in ((32, "quick_gelu"), (16, "gelu"))
    )
    return StableDiffusion3Pipeline(
        vae=vae,
        text_encoder=first,
        text_encoder_2=second,
        text_encoder_3=None,
        tokenizer=tokenizer,
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=None,
        transformer=SD3Transformer2DModel(
            sample_size=LATENT,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=56,
            caption_projection_dim=32,
            pooled_projection_dim=32 + 16,
            pos_embed_max_size=LATENT,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux(*, distilled: bool) -> FluxPipeline:
    """dev, which is distilled, or schnell."""
    tokenizer, second = clip_tokenizer(), t5_tokenizer()
    vae = autoencoder(shift_factor=0.1, scaling_factor=1.5)
    # dev's times are shifted by the picture's size, schnell's are not.
    shift: dict[str, Any] = {"shift": 3.0, "use_dynamic_shifting": True} if distilled else {"shift": 1.0}
    return FluxPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(clip_config(tokenizer, width=16, act="quick_gelu", projection=16)),
        text_encoder_2=t5(second, width=24),
        tokenizer=tokenizer,
        tokenizer_2=second,
        transformer=FluxTransformer2DModel(
            in_channels=4 * CHANNELS,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=24,
            pooled_projection_dim=16,
            guidance_embeds=distilled,
            axes_dims_rope=(2, 2, 4),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(**shift),
    )


_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LANGUAGE_MODEL: dict[str, Any] = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}


def qwen_image() -> QwenImagePipeline:
    """With a vision tower that nothing asks."""
    tokenizer = language_tokenizer()
    text = {
        **_LANGUAGE_MODEL,
        "vocab_size": len(tokenizer),
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]},
        "bos_token_id": None,
        "eos_token_id": None,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 24}
    transformer = QwenImageTransformer2DModel(
        in_channels=4 * CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=24,
        axes_dims_rope=(2, 2, 4),
    )
    transformer.register_to_config(sample_size=LATENT)
    return QwenImagePipeline(
        vae=AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=CHANNELS,
            dim_mult=[1, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.5, 0.7, 1.2, 0.9],
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config={**vision, "fullatt_block_indexes": [0]})
        ),
        tokenizer=tokenizer,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=1.0, use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
    )


def _flux_2_parts(*, guidance: bool) -> dict[str, Any]:
    vae = AutoencoderKLFlux2(
        block_out_channels=(16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=16,
        sample_size=PICTURE,
        mid_block_add_attention=False,
    )
    torch.nn.init.normal_(vae.bn.running_mean, std=0.1)
    torch.nn.init.uniform_(vae.bn.running_var, 0.5, 2.0)
    transformer = Flux2Transformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=3 * 8,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=guidance,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return {"vae": vae, "transformer": transformer, "scheduler": scheduler}


def flux_2() -> Flux2Pipeline:
    """dev."""
    tokenizer = language_tokenizer(
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'][0]['text'] }}"
        "{% else %}[INST]{{ m['content'][0]['text'] }}[/INST]{% endif %}{% endfor %}"
    )
    text = {
        **_LANGUAGE_MODEL,
        "model_type": "mistral",
        "vocab_size": len(tokenizer),
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 30,
        "head_dim": 4,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 4,
        "image_size": 32,
    }
    encoder = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision))
    return Flux2Pipeline(tokenizer=tokenizer, text_encoder=encoder, **_flux_2_parts(guidance=True))


def flux_2_klein(*, distilled: bool) -> Flux2KleinPipeline:
    """klein, distilled or not."""
    tokenizer = language_tokenizer(_CHAT)
    encoder = Qwen3ForCausalLM(
        Qwen3Config(
            **_LANGUAGE_MODEL,
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=27,
            head_dim=4,
            tie_word_embeddings=True,
        )
    )
    parts = _flux_2_parts(guidance=False)
    return Flux2KleinPipeline(tokenizer=tokenizer, text_encoder=encoder, is_distilled=distilled, **parts)


def sana() -> SanaPipeline:
    """SANA."""
    tokenizer, blocks = gemma_tokenizer(), ("ResBlock", "ResBlock", "EfficientViTBlock")
    halves = ("encoder", "decoder")
    shape: dict[str, Any] = {f"{half}_block_types": blocks for half in halves}
    shape |= {f"{half}_block_out_channels": (8, 8, 16) for half in halves}
    shape |= {f"{half}_layers_per_block": (1, 1, 1) for half in halves}
    shape |= {f"{half}_qkv_multiscales": ((), (), (5,)) for half in halves}
    return SanaPipeline(
        vae=AutoencoderDC(latent_channels=CHANNELS, attention_head_dim=8, scaling_factor=0.41407, **shape),
        text_encoder=gemma(tokenizer, width=24),
        tokenizer=tokenizer,
        transformer=SanaTransformer2DModel(
            sample_size=LATENT,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            cross_attention_head_dim=16,
            num_cross_attention_heads=2,
            cross_attention_dim=32,
            caption_channels=24,
        ),
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )


def z_image() -> ZImagePipeline:
    """Z-Image."""
    tokenizer = language_tokenizer(_CHAT, length=1024)
    transformer = ZImageTransformer2DModel(
        in_channels=CHANNELS,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=24,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 32, 32],
    )
    for pad in (transformer.x_pad_token, transformer.cap_pad_token):  # nothing draws these two
        nn.init.normal_(pad, std=0.02)
    return ZImagePipeline(
        vae=autoencoder(shift_factor=0.1, scaling_factor=1.5),
        text_encoder=qwen3(tokenizer, width=24),
        tokenizer=tokenizer,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def lumina2() -> Lumina2Pipeline:
    """Lumina-Image 2.0."""
    tokenizer = gemma_tokenizer()
    return Lumina2Pipeline(
        vae=autoencoder(shift_factor=0.1, scaling_factor=1.5),
        text_encoder=gemma(tokenizer, width=24),
        tokenizer=tokenizer,
        transformer=Lumina2Transformer2DModel(
            sample_size=LATENT,
            in_channels=CHANNELS,
            hidden_size=32,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(4, 6, 6),
            axes_lens=(300, 32, 32),
            cap_feat_dim=24,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
    )
