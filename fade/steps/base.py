"""Stage ``base``: train the built-in base model on the canvas and save it as a diffusers folder."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from fade.concepts import caption_variants
from fade.data.canvas import OBJECTS, SIZE, render_all
from fade.files import read_yaml, writing
from fade.models import base
from fade.models.latents import encode_pictures

logger = logging.getLogger(__name__)


def build_base(folder: Path, *, params: dict[str, Any]) -> None:
    """Train autoencoder, text encoder and UNet on rendered canvas pictures; write ``folder``.

    Deterministic for one machine and thread count. The trained autoencoder is kept beside the folder
    until the end, so that an interrupted training does not begin it again.

    Args:
        params: the section ``base`` of params.yaml.
    """
    torch.set_num_threads(params["threads"])
    seed = params["seed"]
    pictures = list(
        tqdm(render_all(split="train", per_pair=params["pictures_per_pair"], seed=seed), desc="canvas", mininterval=5)
    )
    pixels = np.stack([picture.pixels for picture in pictures])
    captions = [caption_variants(p.object, p.style, OBJECTS[p.object].aliases) for p in pictures]
    settings = params["autoencoder"]
    base.seed_weights(seed, "autoencoder")
    vae = base.make_autoencoder(settings["channels"], size=SIZE)
    kept = folder.with_name(f".{folder.name}.autoencoder.safetensors")
    if kept.is_file():
        state = load_file(kept)
        vae.register_to_config(scaling_factor=float(state.pop("scaling_factor")))
        vae.load_state_dict(state)
        vae.eval()
    else:
        steps = base.train_autoencoder(
            vae,
            pixels,
            steps=settings["steps"],
            batch=settings["batch"],
            learning_rate=settings["learning_rate"],
            seed=seed,
        )
        _show(steps, "autoencoder", settings["steps"])
        with writing(kept) as temporary:
            factor = torch.tensor(vae.config.scaling_factor, dtype=torch.float64)
            save_file({**vae.state_dict(), "scaling_factor": factor}, temporary)
    # The saved base has fp16 weights: the UNet learns the latents that those give.
    vae.to(torch.float16).to(torch.float32)
    latents = encode_pictures(vae, pixels)
    settings = params["denoiser"]
    tokenizer = base.build_tokenizer(
        sorted({caption for variants in captions for caption in variants}), max_length=settings["max_tokens"]
    )
    base.seed_weights(seed, "denoiser")
    text_encoder = base.make_text_encoder(tokenizer, width=settings["text_width"], layers=settings["text_layers"])
    unet = base.make_unet(settings["channels"], latent_size=latents.shape[-1], text_width=settings["text_width"])
    steps = base.train_denoiser(
        unet,
        text_encoder,
        tokenizer,
        latents,
        captions,
        steps=settings["steps"],
        batch=settings["batch"],
        learning_rate=settings["learning_rate"],
        ema_decay=settings["ema_decay"],
        seed=seed,
    )
    _show(steps, "denoiser", settings["steps"])
    with writing(folder) as temporary:
        base.save_pipeline(temporary, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet)
    kept.unlink()


def _show(steps: Any, name: str, count: int) -> None:
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
