"""An untrained base of every family, small, of the real classes, and how the stock pipeline of each is called.

Tests and ``parity.py`` share it. ``KINDS`` names the builders; a family may have several kinds (what differs in how it
is told, guided or drawn). ``save_tiny`` saves one as its stock pipeline does. ``draw`` and ``answers`` ask the stock
pipeline with latents as this library holds them, (B, C, h, w): what it packs, shifts or scales in between is undone by
its own methods, so that what is compared is independent of ours.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from fade.concepts import caption
from fade.data.canvas import OBJECTS
from fade.data.styles import STYLES
from fade.models.families import lumina2, sana
from fade.models.training import networks as small

LENGTH, LATENT, CHANNELS, PICTURE, LANGUAGE_LENGTH = 16, 16, 4, 64, 56
"""Tokens of a prompt, side and channels of latents, side of a picture, tokens of a prompt in its template."""
QWEN_IMAGE_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
"""Of which the stock pipeline drops the first 34 tokens."""
_CAPTIONS = sorted(caption(o, s) for o in OBJECTS for s in STYLES)
_SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}

# ---------------------------------------------------------------------------------------------- parts


def clip_tokenizer() -> CLIPTokenizer:
    """Every word of the canvas' captions is a token."""
    return small.build_tokenizer(_CAPTIONS, max_length=LENGTH)


def clip_config(tokenizer: CLIPTokenizer, *, width: int, act: str, projection: int) -> CLIPTextConfig:
    """Of a CLIP that reads."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act=act,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def t5_tokenizer(*, length: int = LENGTH) -> T5Tokenizer:
    """The same words, and letters for others."""
    words = sorted({word.strip(".") for line in _CAPTIONS for word in line.split()})
    letters = "abcdefghijklmnopqrstuvwxyz.,"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    pieces += [(f"▁{word}", -2.0) for word in words] + [(letter, -9.0) for letter in letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)


def t5(tokenizer: T5Tokenizer, *, width: int) -> T5EncoderModel:
    """T5 1.1's encoder."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=8,
            d_ff=2 * width,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )


def language_tokenizer(template: str = "", *, length: int = LANGUAGE_LENGTH) -> Qwen2Tokenizer:
    """A byte-pair tokenizer as Qwen's and Mistral's: every word of captions and templates is a token."""
    lines = [*_CAPTIONS, QWEN_IMAGE_TEMPLATE, SYSTEM_MESSAGE, template]
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = Qwen2Tokenizer(vocab={}, merges=[]).backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=5000, initial_alphabet=alphabet, show_progress=False)
    words.train_from_iterator(lines, trainer)
    learnt = json.loads(words.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=[tuple(merge) for merge in learnt["merges"]],
        model_max_length=length,
        additional_special_tokens=["<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"],
        chat_template=template or None,
    )


def _merged(tokens: Sequence[str], pieces: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary and merges by which every piece is one token, grown letter by letter."""
    vocabulary, merges = {token: number for number, token in enumerate(tokens)}, []
    for piece in pieces:
        for end in range(2, len(piece) + 1):
            if piece[:end] not in vocabulary:
                vocabulary[piece[:end]] = len(vocabulary)
                merges.append((piece[: end - 1], piece[end - 1]))
    return vocabulary, merges


def _words(*texts: str) -> list[str]:
    return sorted({word for text in texts for word in re.findall("[A-Za-z]+", text)})


def gemma_tokenizer() -> GemmaTokenizer:
    """The same words, those that pipelines write before a prompt, and letters for others."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.ascii_letters, ".", ","]
    words = _words(*_CAPTIONS, *sana.INSTRUCTION, lumina2.SYSTEM)
    vocabulary, merges = _merged(tokens, [f"▁{word}" for word in words])
    return GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)


def gemma(tokenizer: GemmaTokenizer, *, width: int) -> Gemma2Model:
    """Gemma 2's states."""
    return Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            sliding_window=32,
        )
    )


def qwen3(tokenizer: Qwen2Tokenizer, *, width: int) -> Qwen3Model:
    """Qwen 3's states."""
    return Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
    )


def autoencoder(**config: float) -> Any:
    """AutoencoderKL of factor 4."""
    vae = small.make_autoencoder([16, 16, 16], size=PICTURE, latent_channels=CHANNELS)
    vae.register_to_config(**config)
    return vae


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


# ---------------------------------------------------------------------------------------------- pipelines


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


def _stable_diffusion_3() -> StableDiffusion3Pipeline:
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


def _flux(*, distilled: bool) -> FluxPipeline:
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


def _qwen_image() -> QwenImagePipeline:
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


def _flux_2() -> Flux2Pipeline:
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


def _flux_2_klein(*, distilled: bool) -> Flux2KleinPipeline:
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


def _sana() -> SanaPipeline:
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


def _z_image() -> ZImagePipeline:
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


def _lumina2() -> Lumina2Pipeline:
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


KINDS: Mapping[str, Callable[[], Any]] = {
    "epsilon": partial(_stable_diffusion, "epsilon"),
    "velocity": partial(_stable_diffusion, "velocity"),
    "sd2": partial(_stable_diffusion, "sd2"),
    "sdxl": partial(_stable_diffusion_xl, zeros=True),
    "sdxl-empty-prompt": partial(_stable_diffusion_xl, zeros=False),
    "sd3": _stable_diffusion_3,
    "flux-dev": partial(_flux, distilled=True),
    "flux-schnell": partial(_flux, distilled=False),
    "qwen-image": _qwen_image,
    "flux2-dev": _flux_2,
    "flux2-klein": partial(_flux_2_klein, distilled=False),
    "flux2-klein-distilled": partial(_flux_2_klein, distilled=True),
    "pixart-sigma": _pixart_sigma,
    "sana": _sana,
    "z-image": _z_image,
    "lumina2": _lumina2,
}
"""Kind to what builds its pipeline."""


def save_tiny(folder: Path, kind: str, *, seed: int = 0) -> Path:
    """An untrained base of a kind, as its stock pipeline saves it, in float32; give ``folder``."""
    torch.manual_seed(seed)
    KINDS[kind]().save_pretrained(folder)
    return folder


# ---------------------------------------------------------------------------------------------- the stock pipelines


@dataclass(frozen=True)
class Call:
    """How a stock pipeline is called with (B, C, h, w) latents.

    Attributes:
        arguments: of the pipeline, first latents and guidance: what it is called with besides prompts and steps.
        latents: of the pipeline and latents as it holds them: (B, C, h, w).
    """

    arguments: Callable[[Any, Tensor, float], dict[str, Any]]
    latents: Callable[[Any, Tensor], Tensor]


def _flux_arguments(stock: Any, first: Tensor, guidance: float) -> dict[str, Any]:
    given: dict[str, Any] = {"latents": stock._pack_latents(first, *first.shape), "max_sequence_length": LENGTH}
    given |= {"height": PICTURE, "width": PICTURE}
    if stock.transformer.config.guidance_embeds:
        return given | {"guidance_scale": guidance}
    return given | {"true_cfg_scale": guidance, "negative_prompt": [""] * len(first)}


def _qwen_image_arguments(stock: Any, first: Tensor, guidance: float) -> dict[str, Any]:
    given = {"latents": stock._pack_latents(first, *first.shape), "height": PICTURE, "width": PICTURE}
    if guidance > 1:
        given |= {"true_cfg_scale": guidance, "negative_prompt": [" "] * len(first)}
    return given


def _flux_2_arguments(_: Any, first: Tensor, guidance: float) -> dict[str, Any]:
    size: dict[str, Any] = {"height": PICTURE, "width": PICTURE, "max_sequence_length": LANGUAGE_LENGTH}
    return {"latents": first, "guidance_scale": guidance, **size}


def _flux_2_latents(stock: Any, held: Tensor) -> Tensor:
    """Tokens as the loop holds them; or what the pipeline gives in the end, without its batch norm and patches."""
    if held.dim() == 3:
        side = LATENT // 2
        return held.transpose(1, 2).unflatten(2, (side, side))
    norm = stock.vae.bn
    deviation = torch.sqrt(norm.running_var + stock.vae.config.batch_norm_eps)
    return (stock._patchify_latents(held) - norm.running_mean[:, None, None]) / deviation[:, None, None]


def _sized(stock: Any, first: Tensor, guidance: float) -> dict[str, Any]:
    """These take a picture's size for one of few, and tiny ones are of none."""
    del stock
    size: dict[str, Any] = {"height": PICTURE, "width": PICTURE, "use_resolution_binning": False}
    return {"latents": first, "guidance_scale": guidance, **size}


def _one_less(stock: Any, first: Tensor, guidance: float) -> dict[str, Any]:
    """Z-Image counts guidance from the prompt's own answer."""
    del stock
    return {"latents": first, "guidance_scale": guidance - 1, "height": PICTURE, "width": PICTURE}


CALLS: Mapping[str, Call] = {
    "QwenImagePipeline": Call(
        _qwen_image_arguments,
        lambda stock, held: stock._unpack_latents(held, PICTURE, PICTURE, stock.vae_scale_factor)[:, :, 0],
    ),
    "Flux2Pipeline": Call(_flux_2_arguments, _flux_2_latents),
    "Flux2KleinPipeline": Call(_flux_2_arguments, _flux_2_latents),
    "FluxPipeline": Call(
        _flux_arguments, lambda stock, held: stock._unpack_latents(held, PICTURE, PICTURE, stock.vae_scale_factor)
    ),
    "PixArtSigmaPipeline": Call(_sized, lambda _, held: held),
    "SanaPipeline": Call(_sized, lambda _, held: held),
    "ZImagePipeline": Call(_one_less, lambda _, held: held),
}
"""By the pipeline's class; ``PLAIN`` for all others."""
PLAIN = Call(lambda _, first, guidance: {"latents": first, "guidance_scale": guidance}, lambda _, held: held)


def stock_pipeline(folder: Path) -> Any:
    """The stock pipeline in a folder."""
    index = json.loads((folder / "model_index.json").read_text())
    absent = {part: None for part, given in index.items() if given == [None, None] and part != "safety_checker"}
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_lora(stock: Any, folder: Path) -> None:
    """A LoRA in a folder by the stock pipeline's own loader, or by peft's where it has none."""
    if hasattr(stock, "load_lora_weights"):
        stock.load_lora_weights(folder)
    else:
        stock.transformer = PeftModel.from_pretrained(stock.transformer, folder).eval().get_base_model()


class _Counting(DPMSolverMultistepScheduler):
    """DPM-Solver++ for pipelines that say Euler's times (``sigmas``, ``mu``): it takes their number alone."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        del mu
        super().set_timesteps(num_inference_steps if sigmas is None else len(sigmas), device=device)


def stock_solver(stock: Any, name: str) -> Any:
    """A stock scheduler as a user would set it, ``ddim`` or ``dpm++``: of a flow, Euler's is the first-order one."""
    own = stock.scheduler
    if isinstance(own, FlowMatchEulerDiscreteScheduler):
        if name == "ddim":
            return own
        flow: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        if own.config.use_dynamic_shifting:
            return DPMSolverMultistepScheduler(**flow, use_dynamic_shifting=True, time_shift_type="exponential")
        return _Counting(**flow, flow_shift=own.config.shift)
    if own.config.get("use_flow_sigmas"):
        return own if name == "dpm++" else FlowMatchEulerDiscreteScheduler(shift=own.config.flow_shift)
    if isinstance(own, DPMSolverMultistepScheduler):  # which says nothing of it, and DDIM would cut latents off at 1
        return own if name == "dpm++" else DDIMScheduler.from_config(own.config, clip_sample=False)
    kind = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler}[name]
    return kind.from_config(own.config)


def draw(stock: Any, prompts: Sequence[str], first: Tensor, *, steps: int, guidance: float, output: str) -> Any:
    """What the stock pipeline draws: latents (B, C, h, w) for ``latent``, else pictures as it gives them (``np``)."""
    call = CALLS.get(type(stock).__name__, PLAIN)
    given = call.arguments(stock, first, guidance)
    found = stock(prompt=list(prompts), num_inference_steps=steps, output_type=output, **given).images
    return call.latents(stock, found) if output == "latent" else found


def answers(
    stock: Any, prompts: Sequence[str], first: Tensor, *, steps: int, guidance: float = 1.0
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What its network answered on the way: latents (B, C, h, w), time and answer (B, C, h, w) of each step.

    At a guidance of 1 it is the network's own answer; of one that is told its guidance, at any.
    """
    call, seen = CALLS.get(type(stock).__name__, PLAIN), []
    step = stock.scheduler.step

    def noted(answer: Tensor, timestep: Tensor, latents: Tensor, **options: Any) -> Any:
        seen.append((call.latents(stock, latents), timestep, call.latents(stock, answer)))
        return step(answer, timestep, latents, **options)

    stock.scheduler.step = noted
    try:
        draw(stock, prompts, first, steps=steps, guidance=guidance, output="latent")
    finally:
        del stock.scheduler.step
    return seen
