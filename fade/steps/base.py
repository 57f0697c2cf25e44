"""Stage ``base``: train the built-in base model on the canvas and save it as a diffusers folder."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from fade.concepts import caption_variants
from fade.data.canvas import OBJECTS, SIZE, render_all
from fade.files import read_yaml, writing
from fade.models import base
from fade.models.latents import encode_pictures


def build_base(folder: Path, *, params: dict[str, Any]) -> None:
    """Train autoencoder, text encoder and UNet on rendered canvas pictures; write ``folder``.

    Deterministic for one machine and thread count. The trained autoencoder is kept beside the folder
    until the end, so that an interrupted training does not begin it again.

    Args:
        params: the section ``base`` of params.yaml.
    """
    torch.set_num_threads(params["threads"])
    seed = params["seed"]
    rendered = render_all(split="train", per_pair=params["pictures_per_pair"], seed=seed)
    pictures = list(tqdm(rendered, desc="canvas", mininterval=5))
    pixels = np.stack([picture.pixels for picture in pictures])
    captions = [caption_variants(p.object, p.style, OBJECTS[p.object].aliases) for p in pictures]
    kept = folder.with_name(f".{folder.name}.autoencoder.safetensors")
    vae = _trained_autoencoder(kept, pixels, settings=params["autoencoder"], seed=seed)
    # The saved base has fp16 weights: the UNet learns the latents that those give.
    vae.to(torch.float16).to(torch.float32)
    unet, text_encoder, tokenizer = _trained_denoiser(
        encode_pictures(vae, pixels), captions, settings=params["denoiser"], seed=seed
    )
    with writing(folder) as temporary:
        base.save_pipeline(temporary, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet)
    kept.unlink()


def _trained_autoencoder(
    kept: Path, pixels: NDArray[np.uint8], *, settings: dict[str, Any], seed: int
) -> AutoencoderKL:
    base.seed_weights(seed, "autoencoder")
    vae = base.make_autoencoder(settings["channels"], size=SIZE, latent_channels=settings["latent_channels"])
    if kept.is_file():
        state = load_file(kept)
        vae.register_to_config(scaling_factor=float(state.pop("scaling_factor")))
        vae.load_state_dict(state)
        return vae.eval()
    training = {name: settings[name] for name in ("steps", "batch", "learning_rate")}
    _show(base.train_autoencoder(vae, pixels, seed=seed, **training), "autoencoder", settings["steps"])
    with writing(kept) as temporary:
        factor = torch.tensor(vae.config.scaling_factor, dtype=torch.float64)
        save_file({**vae.state_dict(), "scaling_factor": factor}, temporary)
    return vae


def _trained_denoiser(
    latents: Tensor, captions: Sequence[tuple[str, ...]], *, settings: dict[str, Any], seed: int
) -> tuple[UNet2DConditionModel, CLIPTextModel, CLIPTokenizer]:
    sentences = sorted({caption for variants in captions for caption in variants})
    tokenizer = base.build_tokenizer(sentences, max_length=settings["max_tokens"])
    base.seed_weights(seed, "denoiser")
    width = settings["text_width"]
    text_encoder = base.make_text_encoder(tokenizer, width=width, layers=settings["text_layers"])
    unet = base.make_unet(
        settings["channels"], latent_size=latents.shape[-1], text_width=width, latent_channels=latents.shape[1]
    )
    training = {name: settings[name] for name in ("steps", "batch", "learning_rate", "ema_decay")}
    steps = base.train_denoiser(unet, text_encoder, tokenizer, latents, captions, seed=seed, **training)
    _show(steps, "denoiser", settings["steps"])
    return unet, text_encoder, tokenizer


def _show(steps: Iterator[base.StepStats], name: str, count: int) -> None:
    loss = 0.0
    with tqdm(total=count, desc=name, mininterval=10) as bar:
        for stats in steps:
            loss = stats.loss if stats.step == 1 else 0.99 * loss + 0.01 * stats.loss
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update()


def main() -> None:
    """Run the stage with the parameters in params.yaml."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    build_base(arguments.out, params=read_yaml(arguments.params)["base"])


if __name__ == "__main__":
    main()
