"""An untrained base of every family, small, of the real classes, and how the stock pipeline of each is called.

Tests and ``parity.py`` share it. ``KINDS`` names the builders; a family may have several kinds (what differs in how it
is told, guided or drawn). ``save_tiny`` saves one as its stock pipeline does. ``draw`` and ``answers`` ask the stock
pipeline with latents as this library holds them, (B, C, h, w): what it packs, shifts or scales in between is undone by
its own methods, so that what is compared is independent of ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
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
    PNDMScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from fade.concepts import caption
from fade.data.canvas import OBJECTS
from fade.data.styles import STYLES
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


def t5_tokenizer() -> T5Tokenizer:
    """The same words, and letters for others."""
    words = sorted({word.strip(".") for line in _CAPTIONS for word in line.split()})
    letters = "abcdefghijklmnopqrstuvwxyz.,"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    pieces += [(f"▁{word}", -2.0) for word in words] + [(letter, -9.0) for letter in letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=LENGTH)


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


def language_tokenizer(template: str = "") -> Qwen2Tokenizer:
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
        model_max_length=LANGUAGE_LENGTH,
        additional_special_tokens=["<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"],
        chat_template=template or None,
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
    tokenizer = language_tokenizer(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
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


def stock_solver(stock: Any, name: str) -> Any:
    """A stock scheduler as a user would set it, ``ddim`` or ``dpm++``: of a flow, Euler's is the first-order one."""
    own = stock.scheduler
    if isinstance(own, FlowMatchEulerDiscreteScheduler):
        if name == "ddim":
            return own
        flow: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        if own.config.use_dynamic_shifting:
            return DPMSolverMultistepScheduler(**flow, use_dynamic_shifting=True, time_shift_type="exponential")
        return DPMSolverMultistepScheduler(**flow, flow_shift=own.config.shift)
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
