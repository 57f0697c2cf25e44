"""What an erasure by name costs at Stable Diffusion 1.5's size, with random weights: no download is needed.

    python benchmarks/by_name_size.py build FOLDER      # a base in SD 1.5's layout, a CLIP as large as ViT-L/14
    python benchmarks/by_name_size.py measure FOLDER    # its parts, each once: a picture, the closed form, a look
    python benchmarks/by_name_size.py erase FOLDER      # the whole command, `fade init` and `fade erase`

All three write what they found into ``--json``, each under its own name; ``erase`` with the peak memory of the process
and the seconds of each step. Random weights draw noise: figures of the erasure mean nothing here, its course does.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

from fade.evaluation.clip_score import embedded_pictures, load_clip
from fade.files import read_json, write_json
from fade.hardware import fast_precision
from fade.lineage import ROOT
from fade.models.denoiser import autocast
from fade.models.family import load_base
from fade.models.generate import generate_from, guided, sample_latents
from fade.models.training.networks import build_tokenizer
from fade.words import kept_prompts, templates, vocabulary

BAR_GB = 10.0
VOCABULARY = 49408
"""Tokens of Stable Diffusion 1.5's encoder; the tokenizer here has fewer."""
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}


def build(folder: Path) -> dict[str, Any]:
    """Write ``base`` and ``clip``; gives their parameters."""
    torch.manual_seed(0)
    words = [word.name for word in vocabulary()] + [prompt for _, prompt in kept_prompts()]
    kinds = ("both", "style", "person", "object", "notion")
    words += [one.format(object="", style="") for kind in kinds for one in templates(kind)]
    tokenizer = build_tokenizer(words, max_length=77)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {**TEXT, **ids, "vocab_size": VOCABULARY, "max_position_embeddings": 77, "hidden_act": "quick_gelu"}
    torch.set_default_dtype(torch.bfloat16)
    parts = {
        "vae": AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            sample_size=512,
        ),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**text)),
        "unet": UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
    }
    torch.set_default_dtype(torch.float32)
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(
        **parts, tokenizer=tokenizer, scheduler=PNDMScheduler(**schedule, skip_prk_steps=True), **none
    ).save_pretrained(folder / "base")
    vision = {**VISION, "image_size": 224, "patch_size": 14}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=768))
    clip.save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    return {name: sum(one.numel() for one in part.parameters()) for name, part in {**parts, "clip": clip}.items()}


def measure(folder: Path, steps: int) -> dict[str, Any]:
    """Seconds of each part, once warm."""
    found: dict[str, Any] = {"precision": fast_precision(), "threads": torch.get_num_threads(), "solver_steps": steps}

    def timed(name: str, work: Callable[[], Any], rounds: int = 1) -> Any:
        begun = time.perf_counter()
        for _ in range(rounds):
            result = work()
        found[name] = round((time.perf_counter() - begun) / rounds, 2)
        print(f"{name}: {found[name]} s, peak {peak_gb():.1f} GB", flush=True)
        return result

    base = timed("load", lambda: load_base(str(folder / "base"), weights="bf16"))
    told = timed("text of one prompt", lambda: base.encode_prompts(["a cat image in neon style."]))
    drawing: dict[str, Any] = {"guidance": 4.0, "solver": "dpm++", "precision": fast_precision()}
    answer = guided(base, told, 4.0)
    latents = torch.randn(1, *base.denoiser.latent_shape)
    with torch.no_grad(), autocast(drawing["precision"]):
        answer(latents, torch.tensor(500))
        timed("a guided step of the solver", lambda: answer(latents, torch.tensor(500)), 2)
        timed("decoding", lambda: base.decode(latents), 2)
    timed("a picture", lambda: generate_from(base, told, [1], steps=steps, **drawing))
    two = base.encode_prompts(["a cat image in neon style.", "a dog"])
    timed(
        "two pictures at once, two steps, without decoding",
        lambda: sample_latents(base, two, [1, 2], steps=2, **drawing),
    )
    timed("a CLIP loaded", lambda: load_clip(folder / "clip"))
    clip = load_clip(folder / "clip")
    pictures = [np.random.default_rng(i).integers(0, 255, (512, 512, 3), dtype=np.uint8) for i in range(4)]
    timed("a look of the CLIP at 4 pictures", lambda: embedded_pictures(clip, pictures))
    return {**found, "peak_gb": round(peak_gb(), 2)}


def erase(folder: Path, concept: str, threads: int) -> dict[str, Any]:
    """`fade init` and `fade erase --budget small`, as a user types them, in a workspace of its own."""
    workspace = folder / "workspace"
    shutil.rmtree(workspace, ignore_errors=True)
    workspace.mkdir()
    shutil.copyfile(ROOT / "params.yaml", workspace / "params.yaml")
    environment = {**os.environ, "FADE_ROOT": str(workspace)}
    fade = [str(Path(sys.executable).with_name("fade"))]
    place = ["--base", str((folder / "base").resolve()), "--clip", str((folder / "clip").resolve())]
    for command in (
        [*fade, "init", "projects/mine", *place],
        [*fade, "erase", "--project", "projects/mine", "--concept", concept, "--budget", "small",
         "--set", f"threads={threads}", "--json", "row.json"],
    ):  # fmt: skip
        begun = time.perf_counter()
        done = subprocess.run(command, cwd=workspace, env=environment, check=False)
        seconds = time.perf_counter() - begun
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}.")
    row = read_json(workspace / "row.json")
    timings = read_json(workspace / row["folder"] / "timings.json")
    return {"seconds": round(seconds, 1), "peak_gb": round(peak_gb(resource.RUSAGE_CHILDREN), 2), "steps": timings}


def peak_gb(whose: int = resource.RUSAGE_SELF) -> float:
    """The most memory this process has had, or the largest of its children, in GB."""
    return resource.getrusage(whose).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def main() -> None:
    """Build, measure or erase."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["build", "measure", "erase"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=10, help="of the solver")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--concept", default="cat")
    parser.add_argument("--json", type=Path, help="where figures are added")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.what == "build":
        found = build(given.folder)
    elif given.what == "measure":
        found = measure(given.folder, given.steps)
    else:
        found = erase(given.folder, given.concept, given.threads)
    print(found)
    if given.json is not None:
        known = read_json(given.json) if given.json.is_file() else {}
        write_json(given.json, {**known, given.what: found})


if __name__ == "__main__":
    main()
