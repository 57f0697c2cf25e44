"""What an erasure by name costs at Stable Diffusion 1.5's size, with random weights: no download is needed.

    python -m benchmarks.by_name_size build FOLDER       # a base in SD 1.5's layout, a CLIP as large as ViT-L/14
    python -m benchmarks.by_name_size measure FOLDER     # its parts, each once: a picture, captions, the closed form
    python -m benchmarks.by_name_size erase FOLDER       # the commands of docs/how-to/own-checkpoint.md on it
    python -m benchmarks.by_name_size commands FOLDER    # the same on tiny bases, in SD 1.5's layout and FLUX.1's
    python -m benchmarks.by_name_size export FOLDER      # an adapter's export alone, with the look at it afterwards

Each adds what it found to ``--json`` under its own name: ``erase`` with peak memory and the seconds of each step, which
are of this machine and of whatever else runs on it; ``measure`` in seconds of the processor, of one thread. Random
weights draw noise: figures of the erasure mean nothing here, its course does.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shlex
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
from dvc.repo import Repo
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

from benchmarks.tiny.families import save_tiny
from fade.adapters.exports import export_adapter
from fade.adapters.stock import deviation
from fade.adapters.store import save_adapter
from fade.evaluation.clip_score import embedded_pictures, load_clip
from fade.files import read_json, write_json
from fade.hardware import fast_precision
from fade.lineage import ROOT, made_on
from fade.methods.closed_form import closed_form, text_moments
from fade.methods.fade.masks import Mask
from fade.models.denoiser import autocast
from fade.models.family import load_base
from fade.models.generate import guided
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
    """Seconds of the processor for each part, once warm."""
    found: dict[str, Any] = {"precision": fast_precision(), "solver_steps": steps, "made_on": made_on()}

    def timed(name: str, work: Callable[[], Any], *, warm: bool = False) -> Any:
        if warm:
            work()
        begun = time.process_time()
        result = work()
        found[name] = round(time.process_time() - begun, 2)
        print(f"{name}: {found[name]} s, peak {peak_gb():.1f} GB", flush=True)
        return result

    base = timed("load", lambda: load_base(str(folder / "base"), weights=fast_precision()))
    prompts = [f"a picture of a cat, number {number}" for number in range(16)]
    told = timed("encode 16 captions", lambda: base.encode_prompts(prompts))
    with torch.no_grad(), autocast(fast_precision()):
        answer, latents = guided(base, told[:1], 4.0), torch.randn(1, *base.denoiser.latent_shape)
        timed("a guided step of the solver", lambda: answer(latents, torch.tensor(500)), warm=True)
        timed("decode a picture", lambda: base.decode(latents))
    moments = text_moments(told.states[:4], told.states[4:8], told.states[8:], retain_weight=3.0, ridge=1e-3)
    modules = tuple(base.denoiser.text_sites())
    mask = Mask("none", modules, len(modules), len(modules))
    timed("the closed form", lambda: closed_form(base.denoiser, moments, mask, rank=2))
    clip = timed("load the CLIP", lambda: load_clip(folder / "clip"))
    pictures = [np.random.default_rng(i).integers(0, 255, (512, 512, 3), dtype=np.uint8) for i in range(4)]
    timed("a look of the CLIP at 4 pictures", lambda: embedded_pictures(clip, pictures))
    picture = steps * found["a guided step of the solver"] + found["decode a picture"]
    return {**found, "a picture": round(picture, 1), "peak_gb": round(peak_gb(), 2)}


def export(folder: Path) -> dict[str, Any]:
    """Peak memory and seconds of an export that stock libraries load back, of an adapter of the text's projections."""
    place, out = folder / "base", folder / "export.safetensors"
    made, draw = folder / "adapter", torch.Generator().manual_seed(0)
    base = load_base(str(place))
    sites = {name: base.network.get_submodule(name).weight.shape for name in base.denoiser.text_sites()}
    shapes = {f"{name}.lora_A.weight": (2, wide) for name, (_, wide) in sites.items()}
    shapes |= {f"{name}.lora_B.weight": (high, 2) for name, (high, _) in sites.items()}
    tensors = {f"unet.{name}": 0.1 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    save_adapter(made, tensors, {"base_sha256": base.sha256})
    del base
    begun, before = time.perf_counter(), peak_gb()
    export_adapter(made, out, layout="kohya")
    off = deviation(out, layout="kohya", adapter=made, base=place)
    found = {"seconds": round(time.perf_counter() - begun, 1), "deviation": off}
    return {**found, "peak_gb_loaded": round(before, 2), "peak_gb": round(peak_gb(), 2)}


def commands(folder: Path, kind: str, threads: int) -> dict[str, Any]:
    """Seconds of each command of the how-to page, as it stands there, on a tiny base of a kind."""
    place = folder / kind
    if not (place / "model").is_dir():
        save_tiny(place / "model", kind)
        _tiny_clip(place / "clip")
    given = {"MODEL": str((place / "model").resolve()), "CLIP": str((place / "clip").resolve()), "Van Gogh": "cat"}
    further = ["--budget", "small", "--set", f"threads={threads}", "--json", "row.json"]
    return _typed(place / "workspace", given, further, unet=kind != "flux-dev")


def erase(folder: Path, concept: str, threads: int) -> dict[str, Any]:
    """The same on the base of SD 1.5's size, with peak memory and the seconds of each step of the erasure."""
    place = {"MODEL": str((folder / "base").resolve()), "CLIP": str((folder / "clip").resolve()), "Van Gogh": concept}
    further = ["--budget", "small", "--set", f"threads={threads}", "--json", "row.json"]
    workspace = folder / "workspace"
    found = _typed(workspace, place, further, unet=True)
    steps = read_json(workspace / read_json(workspace / "row.json")["folder"] / "timings.json")
    return {**found, "peak_gb": round(peak_gb(resource.RUSAGE_CHILDREN), 2), "steps": steps}


def _typed(workspace: Path, given: dict[str, str], further: list[str], *, unet: bool) -> dict[str, Any]:
    """The page's commands in a workspace of their own; of a base of noise a person has to decide."""
    shutil.rmtree(workspace, ignore_errors=True)
    workspace.mkdir(parents=True)
    # What a clone has.
    Repo.init(str(workspace), no_scm=True).close()
    (workspace / "dvc.yaml").write_text("stages: {}\n", encoding="utf-8")
    shutil.copyfile(ROOT / "params.yaml", workspace / "params.yaml")
    environment = {**os.environ, "FADE_ROOT": str(workspace.resolve())}
    page = (ROOT / "docs/how-to/own-checkpoint.md").read_text(encoding="utf-8")
    block = re.search(r"## By name\n[\s\S]*?\n\n((?:    .*\n)+)", page)
    seconds, known = {}, dict(given)
    for line in (block[1] if block else "").splitlines():
        words = [known.get(word, word) for word in shlex.split(line)]
        what = words[1]
        if what == "erase":
            words += further
        elif what == "approve":
            words += ["--because", "looked at the pictures"]
        elif what == "export" and not unet:
            words = ["fade", "export", known["ID"], "-o", "erasure"]
        words[0] = str(Path(sys.executable).with_name("fade"))
        begun = time.perf_counter()
        done = subprocess.run(words, cwd=workspace, env=environment, check=False)
        seconds[what] = round(time.perf_counter() - begun, 1)
        if done.returncode:
            raise SystemExit(f"{shlex.join(words)} ended with {done.returncode}.")
        if what == "erase":
            known["ID"] = Path(read_json(workspace / "row.json")["folder"]).name
    out = workspace / ("erasure.safetensors" if unet else "erasure")
    size = sum(one.stat().st_size for one in ([out] if out.is_file() else out.iterdir()))
    return {"seconds": seconds, "exported_bytes": size, "threads": further[3]}


def _tiny_clip(folder: Path) -> None:
    """A random CLIP of 16 x 16 pictures, which can tell nothing."""
    tokenizer = build_tokenizer(["a cat image in neon style.", "a picture of a horse"], max_length=16)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    text |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    vision = {**small, "image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def peak_gb(whose: int = resource.RUSAGE_SELF) -> float:
    """The most memory this process has had, or the largest of its children, in GB."""
    return resource.getrusage(whose).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def main() -> None:
    """Do one of the five."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["build", "measure", "erase", "commands", "export"])
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
    elif given.what == "commands":
        found = {kind: commands(given.folder, kind, given.threads) for kind in ("epsilon", "flux-dev")}
    elif given.what == "export":
        found = export(given.folder)
    else:
        found = erase(given.folder, given.concept, given.threads)
    print(found)
    if given.json is not None:
        known = read_json(given.json) if given.json.is_file() else {}
        write_json(given.json, {**known, given.what: found})


if __name__ == "__main__":
    main()
