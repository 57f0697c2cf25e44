"""A small Stable Diffusion, trained from scratch on captioned pictures.

The architecture is Stable Diffusion's in small (AutoencoderKL, CLIPTextModel, UNet2DConditionModel),
so every line that works on this base works on a real checkpoint. Training loops are generators that
yield a record per step: the caller shows progress, the library knows no tracker.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fade.errors import DataError
from fade.models.diffusion import add_noise, autocast, make_noise_scheduler, min_snr_weights
from fade.models.latents import encode_pictures, to_tensor
from fade.seeding import derive_seed, torch_generator

CANONICAL_CAPTION_SHARE = 0.7
EMPTY_CAPTION_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class StepStats:
    """One training step: ``step`` of ``steps`` (from 1) and its loss."""

    step: int
    steps: int
    loss: float


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
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, initial_alphabet=sorted(alphabet), end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(sorted(set(captions)), trainer)
    learned = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    tokens = [*sorted(alphabet), *(f"{letter}</w>" for letter in sorted(alphabet))]
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


def make_text_encoder(tokenizer: CLIPTokenizer, *, width: int, layers: int) -> CLIPTextModel:
    """A CLIP text encoder for the tokenizer's vocabulary."""
    return CLIPTextModel(
        CLIPTextConfig(
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
    )


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


def _learning_rate(step: int, steps: int, peak: float) -> float:
    """100 steps of warm-up, then a cosine to 2 % of the peak; ``step`` counts from 1."""
    return peak * min(1.0, step / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


def _descend(loss: Tensor, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def _gradient_l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of the first differences in both directions: it keeps edges sharp."""
    across = (a.diff(dim=-1) - b.diff(dim=-1)).abs().mean()
    down = (a.diff(dim=-2) - b.diff(dim=-2)).abs().mean()
    return across + down


def train_autoencoder(
    vae: AutoencoderKL, pictures: NDArray[np.uint8], *, steps: int, batch: int, learning_rate: float, seed: int
) -> Iterator[StepStats]:
    """Train on L1 + L1 of image gradients + 1e-6 KL, then set ``scaling_factor`` to 1 / std of the latents.

    Args:
        pictures: (N, H, W, 3) uint8.

    Raises:
        DataError: there are no pictures.
    """
    if len(pictures) == 0:
        raise DataError("No pictures to train the autoencoder on: got 0. Give a catalog with pictures.")
    generator = torch_generator(seed, "autoencoder")
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=1e-4, betas=(0.9, 0.99), fused=True)
    vae.train()
    for step in range(1, steps + 1):
        chosen = torch.randint(len(pictures), (batch,), generator=generator).numpy()
        target = to_tensor(pictures[chosen])
        _set_learning_rate(optimizer, _learning_rate(step, steps, learning_rate))
        with autocast("bf16"):
            posterior = vae.encode(target).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            sampled = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)
            decoded = vae.decode(sampled).sample.float()
        divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        loss = F.l1_loss(decoded, target) + 0.5 * _gradient_l1(decoded, target) + 1e-6 * divergence
        _descend(loss, optimizer, parameters)
        yield StepStats(step, steps, float(loss.detach()))
    vae.eval()
    sample = encode_pictures(vae, pictures[:: max(1, len(pictures) // 1024)], scaled=False)
    vae.register_to_config(scaling_factor=round(float(1 / sample.std()), 5))


class _Captions:
    """Which sentence each picture of a batch carries: 10 % none, else 70 % its first, else any of its own."""

    def __init__(self, tokenizer: CLIPTokenizer, captions: Sequence[Sequence[str]]) -> None:
        sentences = sorted({caption for variants in captions for caption in variants} | {""})
        number = {sentence: i for i, sentence in enumerate(sentences)}
        self._ids = tokenize(tokenizer, sentences)
        self._empty = number[""]
        self._variants = [[number[caption] for caption in group] for group in captions]

    def draw(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Token ids (B, L) for the pictures ``rows``."""
        chosen = []
        for row, (kind, which) in zip(rows.tolist(), torch.rand(len(rows), 2, generator=generator), strict=True):
            group = self._variants[row]
            if kind < EMPTY_CAPTION_SHARE:
                chosen.append(self._empty)
            elif kind < EMPTY_CAPTION_SHARE + (1 - EMPTY_CAPTION_SHARE) * CANONICAL_CAPTION_SHARE:
                chosen.append(group[0])
            else:
                chosen.append(group[min(int(which * len(group)), len(group) - 1)])
        return self._ids[chosen]


class _Average:
    """Exponential moving average of parameters, with a short memory at first."""

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self._parameters = parameters
        self._averages = [parameter.detach().clone() for parameter in parameters]
        self._decay = decay

    def update(self, step: int) -> None:
        decay = min(self._decay, step / (step + 9))
        torch._foreach_lerp_(self._averages, [parameter.detach() for parameter in self._parameters], 1 - decay)

    @torch.no_grad()
    def install(self) -> None:
        for parameter, average in zip(self._parameters, self._averages, strict=True):
            parameter.copy_(average)


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
) -> Iterator[StepStats]:
    """Train UNet and text encoder together on noise prediction; leaves both with averaged weights.

    A picture's first caption is drawn in 70 % of steps, else one of all; 10 % are empty, for
    classifier-free guidance (arXiv:2207.12598). Loss weights: min-SNR 5 (arXiv:2303.09556).

    Args:
        latents: (N, C, h, w) float32, scaled.
        captions: N lists of captions, canonical first.
    """
    generator = torch_generator(seed, "denoiser")
    alphas_cumprod = make_noise_scheduler().alphas_cumprod
    drawn = _Captions(tokenizer, captions)
    # Plain attention is faster than the fused kernel in the backward pass on CPU.
    unet.set_attn_processor(AttnProcessor())
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    average = _Average(parameters, ema_decay)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=1e-2, betas=(0.9, 0.99), fused=True)
    unet.train()
    text_encoder.train()
    for step in range(1, steps + 1):
        rows = torch.randint(len(latents), (batch,), generator=generator)
        ids = drawn.draw(rows, generator)
        timesteps = torch.randint(len(alphas_cumprod), (batch,), generator=generator)
        noise = torch.randn(latents[rows].shape, generator=generator)
        noisy = add_noise(latents[rows], noise, timesteps, alphas_cumprod)
        _set_learning_rate(optimizer, _learning_rate(step, steps, learning_rate))
        with autocast("bf16"):
            predicted = unet(noisy, timesteps, text_encoder(ids).last_hidden_state).sample
        error = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
        loss = (error * min_snr_weights(timesteps, alphas_cumprod, 5.0)).mean()
        _descend(loss, optimizer, parameters)
        average.update(step)
        yield StepStats(step, steps, float(loss.detach()))
    average.install()
    unet.eval()
    text_encoder.eval()


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
