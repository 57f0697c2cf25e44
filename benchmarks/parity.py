"""Every family against its stock pipeline: answers, pictures and LoRA files, on untrained bases of the real classes.

    python benchmarks/parity.py --json parity.json

A minute on one core. For each kind of base in ``tiny/families.py``: how far our denoiser's answers are from what the
stock pipeline's network answered on its way, at its own latents and times; how far our picture is from the stock
pipeline's at equal first latents, guided; and for a random adapter on every module, exported and loaded by the stock
pipeline's own loader (peft's where it has none: PixArt-Sigma), how many of its keys that pipeline holds, and how far
its picture is from ours. Differences are the largest one, in parts of the answer's or picture's range
(``adapter_picture_difference`` is that with the adapter).
A family of several kinds is shown by the worst of each figure; a key that was passed over is an error. Real
checkpoints are not compared: none is at hand.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import logging as transformers_logging

from benchmarks.tiny.families import KINDS, save_tiny
from benchmarks.tiny.stock import answers, draw, load_lora, stock_pipeline, stock_solver
from fade.adapters.exports import Layout, export_adapter
from fade.adapters.store import activate, apply_adapter, save_adapter
from fade.files import write_json
from fade.methods.fade.masks import Mask
from fade.methods.fade.saliency import salient_parameters
from fade.methods.fade.sparse_lora import adapter_tensors, add_sparse_lora, lora_layers
from fade.models.base import Base
from fade.models.family import load_base
from fade.models.generate import first_latents, sample_latents

PROMPTS, SEEDS = ["a cat image in neon style.", "a horse image in oil style."], [188, 288]
STEPS, GUIDANCE = 4, 3.0


def compared(kind: str, folder: Path) -> dict[str, Any]:
    """The figures of one kind."""
    save_tiny(folder / "base", kind)
    base, stock = load_base(folder / "base"), stock_pipeline(folder / "base")
    stock.scheduler = stock_solver(stock, "ddim")
    found: dict[str, Any] = {"family": type(stock).__name__, "answer_difference": _answers(base, stock)}
    found["picture_difference"] = _pictures(base, stock)
    layout: Layout = "diffusers" if hasattr(stock, "load_lora_weights") else "peft"
    lora = export_adapter(_random_adapter(base, folder), folder / "lora", layout=layout)
    load_lora(stock, lora)
    found["lora_keys"], found["lora_keys_used"] = _keys(lora, stock, base.denoiser.component)
    apply_adapter(base, folder / "adapter", name="one")
    activate(base, {"one": 1.0})
    found["adapter_picture_difference"] = _pictures(base, stock)
    return found


def _answers(base: Base, stock: Any) -> float:
    told, _ = base.guide(base.encode_prompts(PROMPTS), 1.0)
    found = []
    for noisy, t, theirs in answers(stock, PROMPTS, first_latents(SEEDS, base.denoiser.latent_shape), steps=STEPS):
        with torch.no_grad():
            found.append(_apart(base.denoiser.predict(noisy, t, told), theirs))
    return max(found)


def _pictures(base: Base, stock: Any) -> float:
    latents = sample_latents(base, base.encode_prompts(PROMPTS), SEEDS, steps=STEPS, guidance=GUIDANCE, solver="ddim")
    with torch.no_grad():
        ours = (base.decode(latents).clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1)
    first = first_latents(SEEDS, base.denoiser.latent_shape)
    theirs = draw(stock, PROMPTS, first, steps=STEPS, guidance=GUIDANCE, output="np")
    return _apart(ours, torch.from_numpy(np.asarray(theirs)))


def _apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / (theirs.max() - theirs.min()))


def _random_adapter(base: Base, folder: Path) -> Path:
    """A LoRA of random weights on every module, stored as ours; the base is left plain."""
    twin = load_base(folder / "base")
    names = tuple(sorted(salient_parameters(twin.network)))
    add_sparse_lora(twin.network, Mask("none", names, len(names), len(names)), rank=2, alpha=2.0, seed=0, name="one")
    torch.manual_seed(0)
    for layer in lora_layers(twin.network).values():
        torch.nn.init.normal_(layer.lora_B["one"].weight, std=0.1)
    save_adapter(folder / "adapter", adapter_tensors(twin.denoiser, "one"), {"base_sha256": base.sha256})
    return folder / "adapter"


def _keys(lora: Path, stock: Any, component: str) -> tuple[int, int]:
    """Keys of a LoRA file, and of how many of them the stock network holds these very values."""
    held = dict(getattr(stock, component).named_parameters())
    (file,) = lora.glob("*.safetensors")
    stored = load_file(file)
    used = 0
    for key, tensor in stored.items():
        name = key.removeprefix(f"{component}.").removeprefix("base_model.model.")
        mine = next((held[end] for end in _loaded_as(name) if end in held), None)
        used += mine is not None and torch.equal(mine.float(), tensor.float())
    return len(stored), used


def _loaded_as(name: str) -> tuple[str, str]:
    """What diffusers and what peft calls the parameter that a tensor of a LoRA file becomes."""
    return name.replace(".weight", ".default_0.weight"), name.replace(".weight", ".default.weight")


def by_family(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a family: the worst of its kinds."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        known = found.setdefault(row["family"], row | {"lora_keys": 0, "lora_keys_used": 0})
        for name, value in row.items():
            if name.startswith("lora"):
                known[name] += value
            elif name != "family":
                known[name] = max(known[name], value)
    return list(found.values())


def main() -> None:
    """Print a line a family; write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    rows = []
    for kind in given.kinds:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(compared(kind, Path(folder)))
    families = by_family(rows)
    for row in families:
        print(
            f"{row['family']:30} answers {row['answer_difference']:.1e}, pictures {row['picture_difference']:.1e}, "
            f"with adapter {row['adapter_picture_difference']:.1e}, LoRA keys {row['lora_keys_used']} of "
            f"{row['lora_keys']}"
        )
    if given.json:
        write_json(given.json, {"families": families})
    if passed_over := [row["family"] for row in families if row["lora_keys_used"] < row["lora_keys"]]:
        parser.exit(1, f"Keys of LoRA files were passed over by {', '.join(passed_over)}: expected every key used.\n")


if __name__ == "__main__":
    main()
