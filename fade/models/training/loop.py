"""Training of a small Stable Diffusion from scratch, on any captioned pictures; cut off, it goes on.

The loops are generators that yield a record per step: the caller shows progress, the library knows no tracker.
Cut off or not, a training gives the same bytes on one machine with one number of threads.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from fade.errors import ConfigError, DataError
from fade.files import sha256_file, writing
from fade.hardware import fast_precision
from fade.models.denoiser import autocast
from fade.models.latents import encode_pictures, to_tensor
from fade.models.paths import DiffusionPath, min_snr_weights
from fade.models.training import networks
from fade.models.training.steps import (
    CHECKPOINT_EVERY,
    Captions,
    Checkpoint,
    StepStats,
    Training,
    check_side,
    descend,
    kept_beside,
    learning_rate_at,
    made_of_hash,
    set_learning_rate,
)
from fade.seeding import torch_generator

MOST_TOKENS = 77


def _gradient_l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of the first differences in both directions: it keeps edges sharp."""
    across = (a.diff(dim=-1) - b.diff(dim=-1)).abs().mean()
    down = (a.diff(dim=-2) - b.diff(dim=-2)).abs().mean()
    return across + down


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
    """Train on L1 + L1 of image gradients + 1e-6 KL, then set ``scaling_factor`` to 1 / std of the latents.

    Begins where the checkpoint ends.

    Args:
        pictures: (N, H, W, 3) uint8.

    Raises:
        DataError: there are no pictures.
        ConfigError: the checkpoint is of another training.
    """
    if len(pictures) == 0:
        raise DataError("No pictures to train the autoencoder on: got 0. Give a catalog with pictures.")
    generator = torch_generator(seed, "autoencoder")
    training = Training({"vae": vae}, generator, learning_rate=learning_rate, weight_decay=1e-4)
    vae.train()
    for step in range(training.load(checkpoint) + 1, steps + 1):
        chosen = torch.randint(len(pictures), (batch,), generator=generator).numpy()
        target = to_tensor(pictures[chosen])
        set_learning_rate(training.optimizer, learning_rate_at(step, steps, learning_rate))
        with autocast(fast_precision("cpu")):
            posterior = vae.encode(target).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            sampled = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)
            decoded = vae.decode(sampled).sample.float()
        divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        loss = F.l1_loss(decoded, target) + 0.5 * _gradient_l1(decoded, target) + 1e-6 * divergence
        descend(loss, training.optimizer, training.parameters)
        if step % checkpoint.every == 0 or step == steps:
            training.save(checkpoint, step)
        yield StepStats("autoencoder", step, steps, float(loss.detach()))
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
    """Train UNet and text encoder together on noise prediction; leaves both with averaged weights.

    Begins where the checkpoint ends. A picture's first caption is drawn in 70 % of steps, else one of all; 10 % are
    empty, for classifier-free guidance (arXiv:2207.12598). Loss weights: min-SNR 5 (arXiv:2303.09556). The average
    of the weights is exponential, with a short memory at first.

    Args:
        latents: (N, C, h, w) float32, scaled.
        captions: N lists of captions, canonical first.

    Raises:
        ConfigError: the checkpoint is of another training.
    """
    generator = torch_generator(seed, "denoiser")
    path = DiffusionPath(networks.make_noise_scheduler().alphas_cumprod)
    drawn = Captions(tokenizer, captions)
    # Plain attention is faster than the fused kernel in the backward pass on CPU.
    unet.set_attn_processor(AttnProcessor())
    modules = {"unet": unet, "text_encoder": text_encoder}
    training = Training(modules, generator, learning_rate=learning_rate, weight_decay=1e-2)
    unet.train()
    text_encoder.train()
    for step in range(training.load(checkpoint) + 1, steps + 1):
        rows = torch.randint(len(latents), (batch,), generator=generator)
        ids = drawn.draw(rows, generator)
        timesteps = torch.randint(path.steps, (batch,), generator=generator)
        noise = torch.randn(latents[rows].shape, generator=generator)
        noisy = path.noised(latents[rows], noise, timesteps)
        set_learning_rate(training.optimizer, learning_rate_at(step, steps, learning_rate))
        with autocast(fast_precision("cpu")):
            predicted = unet(noisy, timesteps, text_encoder(ids).last_hidden_state).sample
        error = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
        loss = (error * min_snr_weights(timesteps, path, 5.0)).mean()
        training.descend(loss, step, ema_decay=ema_decay, checkpoint=checkpoint, steps=steps)
        yield StepStats("denoiser", step, steps, float(loss.detach()))
    training.take_averages()
    unet.eval()
    text_encoder.eval()


def train_base(
    pictures: NDArray[np.uint8], captions: Sequence[Sequence[str]], out: Path, *, params: Mapping[str, Any]
) -> Iterator[StepStats]:
    """Train autoencoder, text encoder and UNet; write the diffusers folder ``out``.

    What is under way is kept beside ``out`` until the end, so that a training that was cut off goes on.

    Args:
        pictures: (N, H, H, 3) uint8.
        captions: N lists of captions, canonical first.
        params: as the section ``base`` of params.yaml. ``start``, where it is given, is the folder of a base of the
            same shape whose weights training begins with; of its words those that the captions hold.

    Raises:
        DataError: there are no pictures, or their side is none that the networks can halve.
        ConfigError: what is kept is of other pictures, captions or settings; or ``start`` is no base of this shape.
    """
    check_side(pictures, 2 ** (len(params["autoencoder"]["channels"]) + len(params["denoiser"]["channels"]) - 2))
    start = Path(params["start"]) if params.get("start") else None
    others = [] if start is None else [sha256_file(path) for path in sorted(start.rglob("*.safetensors"))]
    made_of = made_of_hash(pictures, captions, params, others)
    kept = kept_beside(out)
    vae = new_autoencoder(params, size=pictures.shape[1])
    if start is not None:
        _begin_with(vae, AutoencoderKL.from_pretrained(start, subfolder="vae"), start)
    settings = {name: params["autoencoder"][name] for name in ("steps", "batch", "learning_rate")}
    checkpoint = Checkpoint(kept / "autoencoder.safetensors", CHECKPOINT_EVERY, made_of)
    yield from train_autoencoder(vae, pictures, seed=params["seed"], checkpoint=checkpoint, **settings)
    # The saved base has fp16 weights: the UNet learns the latents that those give.
    vae.to(torch.float16).to(torch.float32)
    latents = encode_pictures(vae, pictures)
    settings = params["denoiser"]
    tokenizer = _tokenizer(captions, settings["max_tokens"])
    networks.seed_weights(params["seed"], "denoiser")
    text_encoder = networks.make_text_encoder(tokenizer, width=settings["text_width"], layers=settings["text_layers"])
    unet = networks.make_unet(
        settings["channels"],
        latent_size=latents.shape[-1],
        text_width=settings["text_width"],
        latent_channels=latents.shape[1],
    )
    if start is not None:
        _begin_with(unet, UNet2DConditionModel.from_pretrained(start, subfolder="unet"), start)
        _begin_with_text(text_encoder, tokenizer, start)
    yield from train_denoiser(
        unet,
        text_encoder,
        tokenizer,
        latents,
        captions,
        seed=params["seed"],
        checkpoint=Checkpoint(kept / "denoiser.safetensors", CHECKPOINT_EVERY, made_of),
        **{name: settings[name] for name in ("steps", "batch", "learning_rate", "ema_decay")},
    )
    with writing(out) as temporary:
        networks.save_pipeline(temporary, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet)
    shutil.rmtree(kept)


def _begin_with(network: nn.Module, known: nn.Module, start: Path) -> None:
    """Give a network the weights of one of its shape.

    Raises:
        ConfigError: they are not of one shape.
    """
    wanted, given = network.state_dict(), known.state_dict()
    if {name: t.shape for name, t in wanted.items()} != {name: t.shape for name, t in given.items()}:
        raise ConfigError(
            f"The {type(network).__name__} in {start} has another shape than the one to train. Give the section base "
            "its channels and latent_channels, or begin without `start`."
        )
    network.load_state_dict(given)


@torch.no_grad()
def _begin_with_text(encoder: CLIPTextModel, tokenizer: CLIPTokenizer, start: Path) -> None:
    """Give a text encoder the layers of another one, and what that one knows of the words that both have.

    Raises:
        ConfigError: it has another width or number of layers.
    """
    known = CLIPTextModel.from_pretrained(start, subfolder="text_encoder", torch_dtype=torch.float32)
    words = CLIPTokenizer.from_pretrained(start, subfolder="tokenizer").get_vocab()
    wanted, given = encoder.state_dict(), known.state_dict()
    embeddings = [name for name in wanted if name.endswith(("token_embedding.weight", "position_embedding.weight"))]
    for name, values in wanted.items():
        if name not in given or (given[name].shape if name not in embeddings else given[name].shape[1:]) != (
            values.shape if name not in embeddings else values.shape[1:]
        ):
            raise ConfigError(
                f"The text encoder in {start} has another shape than the one to train: {name}. Give the section base "
                "its text_width and text_layers, or begin without `start`."
            )
        if name not in embeddings:
            values.copy_(given[name])
        elif name.endswith("position_embedding.weight"):
            count = min(len(values), len(given[name]))
            values[:count] = given[name][:count]
        else:
            for word, number in tokenizer.get_vocab().items():
                if word in words:
                    values[number] = given[name][words[word]]


def new_autoencoder(params: Mapping[str, Any], *, size: int) -> AutoencoderKL:
    """The untrained autoencoder, its weights drawn from the seed."""
    settings = params["autoencoder"]
    networks.seed_weights(params["seed"], "autoencoder")
    return networks.make_autoencoder(settings["channels"], size=size, latent_channels=settings["latent_channels"])


def _tokenizer(captions: Sequence[Sequence[str]], least: int) -> CLIPTokenizer:
    """Long enough for the longest caption: one cut short would lose its last words."""
    sentences = sorted({sentence for variants in captions for sentence in variants})
    longest = max(map(len, networks.build_tokenizer(sentences, max_length=MOST_TOKENS)(sentences).input_ids))
    return networks.build_tokenizer(sentences, max_length=min(MOST_TOKENS, max(least, longest)))
