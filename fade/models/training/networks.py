"""The networks of a small Stable Diffusion, its tokenizer, and how they are saved.

The architecture is Stable Diffusion's in small (AutoencoderKL, CLIPTextModel, UNet2DConditionModel),
so every line that works on this base works on a real checkpoint. ``training.py`` trains it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fade.seeding import derive_seed


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


def build_tokenizer(captions: Sequence[str], *, max_length: int) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges make every word of ``captions`` one token.

    Words that no caption holds are spelt out in smaller pieces, as in any CLIP tokenizer.
    """
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix="", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    last_letters = [f"{letter}</w>" for letter in sorted(alphabet)]
    # Special only so that they are numbered: the trainer numbers last letters as it meets them, in an order that
    # changes from process to process, and decides between equally frequent pairs by these numbers.
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,
        initial_alphabet=sorted(alphabet),
        special_tokens=last_letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(sorted(set(captions)), trainer)
    learned = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    tokens = [*sorted(alphabet), *last_letters]
    known = set(tokens)
    tokens += [token for token, _ in learned if token not in known]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    merges = [tuple(merge) for merge in _merges(bpe)]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=merges,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=max_length,
    )


def _merges(bpe: Tokenizer) -> list[list[str]]:
    merges: list[list[str]] = json.loads(bpe.to_str())["model"]["merges"]
    return merges


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Token ids (B, max_length), padded as Stable Diffusion pads."""
    ids: Tensor = tokenizer(
        list(captions),
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    ).input_ids
    return ids


def make_autoencoder(channels: Sequence[int], *, size: int, latent_channels: int = 4) -> AutoencoderKL:
    """An AutoencoderKL of factor ``2 ** (len(channels) - 1)``."""
    levels = len(channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(channels),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=16,
        sample_size=size,
        mid_block_add_attention=False,
    )


def text_encoder_config(tokenizer: CLIPTokenizer, *, width: int, layers: int) -> CLIPTextConfig:
    """Of a CLIP text encoder for the tokenizer's vocabulary, its projection as wide as its states."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 32),
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_text_encoder(tokenizer: CLIPTokenizer, *, width: int, layers: int) -> CLIPTextModel:
    """A CLIP text encoder for the tokenizer's vocabulary."""
    return CLIPTextModel(text_encoder_config(tokenizer, width=width, layers=layers))


def make_unet(
    channels: Sequence[int], *, latent_size: int, text_width: int, latent_channels: int = 4
) -> UNet2DConditionModel:
    """A conditional UNet with attention (self and cross) at its lowest resolution."""
    levels = len(channels)
    return UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=tuple(channels),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * (levels - 1) + ("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1),
        cross_attention_dim=text_width,
        attention_head_dim=2,
        norm_num_groups=16,
    )


def save_pipeline(
    folder: Path,
    *,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
) -> None:
    """Write a diffusers StableDiffusionPipeline folder with fp16 weights.

    The text encoder is stored as float32 holding fp16 values: transformers loads a file in the type it
    is stored in while diffusers loads in float32, and a plain ``from_pretrained`` must not mix the two.
    """
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_noise_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for part in (vae, unet, text_encoder):
        part.to(torch.float16)
    text_encoder.to(torch.float32)
    pipeline.save_pretrained(folder, safe_serialization=True)


def seed_weights(seed: int, part: str) -> None:
    """Seed torch's default generator before a network is built: layer initialisers draw from it."""
    torch.manual_seed(derive_seed(seed, "weights", part))
