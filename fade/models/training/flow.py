"""Training of a small Stable Diffusion 3 from scratch: a flow transformer over an autoencoder that is there already.

The classes are Stable Diffusion 3's in small (SD3Transformer2DModel, two CLIPs with projection, no T5), so every line
that works on this base works on a real checkpoint. Autoencoder and tokenizer are taken over from another base as they
are. Cut off or not, a training gives the same bytes on one machine with one number of threads.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from fade.files import writing
from fade.hardware import fast_precision
from fade.models.denoiser import autocast
from fade.models.joint_attention import CountedJointAttention
from fade.models.latents import encode_pictures
from fade.models.paths import FlowPath
from fade.models.supported import autoencoder_factor
from fade.models.training import networks
from fade.models.training.steps import (
    CHECKPOINT_EVERY,
    Captions,
    Checkpoint,
    StepStats,
    Training,
    check_side,
    kept_beside,
    learning_rate_at,
    made_of_hash,
    set_learning_rate,
)
from fade.seeding import torch_generator

PATCH = 2
EMPTY_POSITIONS = 256
"""How many zeros the stock pipeline puts behind CLIP's states where there is no T5: its ``max_sequence_length``."""


def make_transformer(
    *, width: int, heads: int, layers: int, latent_size: int, latent_channels: int, text_width: int
) -> SD3Transformer2DModel:
    """Joint attention of text and 2 x 2 patches of latents, its queries and keys normalised as in 3.5.

    Args:
        text_width: of the states of each of the two text encoders.
    """
    return SD3Transformer2DModel(
        sample_size=latent_size,
        patch_size=PATCH,
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_layers=layers,
        attention_head_dim=width // heads,
        num_attention_heads=heads,
        joint_attention_dim=2 * text_width,
        caption_projection_dim=width,
        pooled_projection_dim=2 * text_width,
        pos_embed_max_size=latent_size // PATCH,
        qk_norm="rms_norm",
    )


def told(encoders: Sequence[CLIPTextModelWithProjection], ids: Tensor) -> tuple[Tensor, Tensor]:
    """What the stock pipeline tells its transformer of token ids (B, L), with one zero for the 256 of an absent T5.

    Returns:
        States (B, L + 1, D): the encoders' last but one, side by side; pooled projections (B, D).
    """
    answers = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    states = torch.cat([answer.hidden_states[-2] for answer in answers], dim=-1)
    pooled = torch.cat([answer.text_embeds for answer in answers], dim=-1)
    return torch.cat([states, torch.zeros_like(states[:, :1])], dim=1), pooled


def train_transformer(
    transformer: SD3Transformer2DModel,
    encoders: Sequence[CLIPTextModelWithProjection],
    tokenizer: CLIPTokenizer,
    latents: Tensor,
    captions: Sequence[Sequence[str]],
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    ema_decay: float,
    time_mean: float,
    time_spread: float,
    seed: int,
    checkpoint: Checkpoint,
) -> Iterator[StepStats]:
    """Train transformer and text encoders together on the flow's velocity; leaves them with averaged weights.

    Begins where the checkpoint ends. Times are s = sigmoid(n), n ~ N(mean, spread) (arXiv:2403.03206, section 3.1);
    captions, empty ones and the average of the weights are those of ``loop.train_denoiser``.

    Args:
        latents: (N, C, h, w) float32, scaled.
        captions: N lists of captions, canonical first.

    Raises:
        ConfigError: the checkpoint is of another training.
    """
    generator = torch_generator(seed, "transformer")
    path = FlowPath()
    drawn = Captions(tokenizer, captions)
    transformer.set_attn_processor(CountedJointAttention())
    parts = {"transformer": transformer, **{f"text_encoder_{i}": one for i, one in enumerate(encoders)}}
    training = Training(parts, generator, learning_rate=learning_rate, weight_decay=1e-2)
    for part in parts.values():
        part.train()
    for step in range(training.load(checkpoint) + 1, steps + 1):
        rows = torch.randint(len(latents), (batch,), generator=generator)
        ids = drawn.draw(rows, generator)
        times = path.steps * torch.sigmoid(time_mean + time_spread * torch.randn(batch, generator=generator))
        clean = latents[rows]
        noise = torch.randn(clean.shape, generator=generator)
        set_learning_rate(training.optimizer, learning_rate_at(step, steps, learning_rate))
        with autocast(fast_precision("cpu")):
            states, pooled = told(encoders, ids)
            answer = transformer(
                path.noised(clean, noise, times),
                states,
                pooled,
                times,
                joint_attention_kwargs={"count": EMPTY_POSITIONS},
            ).sample
        loss = (answer.float() - path.target(clean, noise, times)).square().mean()
        training.descend(loss, step, ema_decay=ema_decay, checkpoint=checkpoint, steps=steps)
        yield StepStats("transformer", step, steps, float(loss.detach()))
    training.take_averages()
    for part in parts.values():
        part.eval()


def new_networks(
    tokenizer: CLIPTokenizer, latent_shape: Sequence[int], params: Mapping[str, Any]
) -> tuple[SD3Transformer2DModel, list[CLIPTextModelWithProjection]]:
    """The untrained transformer and its two text encoders, their weights drawn from the seed.

    Args:
        latent_shape: channels, height and width.
    """
    networks.seed_weights(params["seed"], "transformer")
    config = networks.text_encoder_config(tokenizer, width=params["text_width"], layers=params["text_layers"])
    encoders = [CLIPTextModelWithProjection(config) for _ in range(2)]
    transformer = make_transformer(
        **{name: params[name] for name in ("width", "heads", "layers", "text_width")},
        latent_size=latent_shape[-1],
        latent_channels=latent_shape[0],
    )
    return transformer, encoders


def train_flow_base(
    pictures: NDArray[np.uint8],
    captions: Sequence[Sequence[str]],
    out: Path,
    *,
    like: Path,
    params: Mapping[str, Any],
) -> Iterator[StepStats]:
    """Train a flow transformer and its text encoders; write the diffusers folder ``out``.

    What is under way is kept beside ``out`` until the end, so that a training that was cut off goes on.

    Args:
        pictures: (N, H, H, 3) uint8.
        captions: N lists of captions, canonical first.
        like: the base whose autoencoder and tokenizer are taken over, a diffusers folder.
        params: as the section ``flow_base`` of params.yaml.

    Raises:
        DataError: the latents of such pictures cannot be cut into patches.
        ConfigError: what is kept is of other pictures, captions or settings.
    """
    vae = AutoencoderKL.from_pretrained(like / "vae", dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(like / "tokenizer")
    vae.eval().requires_grad_(False)
    # The stock pipeline adds the shift when it decodes, and takes no None.
    vae.register_to_config(shift_factor=vae.config.shift_factor or 0.0)
    check_side(pictures, PATCH * autoencoder_factor(vae.config))
    made_of = made_of_hash(pictures, captions, params)
    kept = kept_beside(out)
    latents = encode_pictures(vae, pictures)
    transformer, encoders = new_networks(tokenizer, latents.shape[1:], params)
    trained = ("steps", "batch", "learning_rate", "ema_decay", "time_mean", "time_spread", "seed")
    yield from train_transformer(
        transformer,
        encoders,
        tokenizer,
        latents,
        captions,
        checkpoint=Checkpoint(kept / "transformer.safetensors", CHECKPOINT_EVERY, made_of),
        **{name: params[name] for name in trained},
    )
    with writing(out) as temporary:
        save_pipeline(temporary, vae, tokenizer, transformer, encoders, shift=params["shift"])
        for name in ("tokenizer", "tokenizer_2"):  # saved, they would note how they were loaded here
            shutil.copytree(like / "tokenizer", temporary / name, dirs_exist_ok=True)
    shutil.rmtree(kept)


def save_pipeline(
    folder: Path,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    transformer: SD3Transformer2DModel,
    encoders: Sequence[CLIPTextModelWithProjection],
    *,
    shift: float,
) -> None:
    """Write a diffusers StableDiffusion3Pipeline folder with fp16 weights.

    The text encoders are stored as float32 holding fp16 values: transformers loads a file in the type it is stored
    in while diffusers loads in float32, and a plain ``from_pretrained`` must not mix the two.

    Args:
        shift: of the scheduler's times towards noise.
    """
    for part in (vae, transformer, *encoders):
        part.to(torch.float16)
    for encoder in encoders:
        encoder.to(torch.float32)
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    ).save_pretrained(folder, safe_serialization=True)
