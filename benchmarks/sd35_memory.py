"""Peak memory and time of a step of distillation at SD3.5 medium's full size, on the CPU, with random weights.

    python benchmarks/sd35_memory.py --side 512 --json sd35-memory.json

Weights in bfloat16, gradient checkpointing, one forget and one retain example, one at a time, sparse LoRA on every
module. Beside what the process held at its peak stands what ``sizes.py`` calculates for pictures of the same side;
text encoders and autoencoder, which are gone before, are in neither.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.sd15_memory import peak_gb
from benchmarks.sizes import RANK, SIZES, rows, told
from fade.files import write_json
from fade.methods.fade.distillation import Sets, distill
from fade.methods.fade.examples import Examples
from fade.methods.fade.masks import Mask
from fade.methods.fade.sparse_lora import add_sparse_lora
from fade.methods.fade.targeting import power_law
from fade.models.paths import FlowPath

MODEL = "SD3.5 medium"


def measure(side: int) -> dict[str, Any]:
    """Seconds and the process' peak, in GB, after each phase; ``side`` of a picture, in pixels."""
    size = replace(SIZES[MODEL], latents=(16, side // 8, side // 8))
    phases: dict[str, dict[str, float]] = {}
    begun = time.perf_counter()

    def phase(name: str) -> None:
        nonlocal begun
        phases[name] = {"seconds": round(time.perf_counter() - begun, 1), "peak_gb": round(peak_gb(), 2)}
        print(f"{name:<10} {phases[name]['seconds']:>8.1f} s   peak {phases[name]['peak_gb']:.2f} GB", flush=True)
        begun = time.perf_counter()

    phase("libraries")
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        network = size.network()
    torch.set_default_dtype(torch.float32)
    network = torch.nn.Module.to(network.to_empty(device="cpu"), torch.bfloat16)  # as load_base does; buffers too
    network.requires_grad_(False).eval()
    torch.manual_seed(0)
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.normal_(std=0.02)
    network.enable_gradient_checkpointing()
    denoiser = size.denoiser(network, FlowPath(), size.latents)
    names = tuple(denoiser.modules())
    parameters = add_sparse_lora(
        network, Mask("none", names, len(names), len(names)), rank=RANK, alpha=RANK, seed=0, name="student"
    )
    phase("build")
    one = told(size)
    other = one.with_tensors({"states": torch.randn_like(one.states)})  # or there would be nothing to learn
    example = Examples(torch.randn(1, *size.latents), one, other)
    steps = distill(
        denoiser,
        parameters,
        sets=Sets(example, example, example),
        empty=one,
        timesteps=power_law(denoiser.path.steps, 0.25),
        steps=1,
        batch=1,
        learning_rate=5e-4,
        weight_decay=1e-2,
        clip_norm=1.0,
        forget_weight=1.0,
        retain_weight=1.0,
        surrogate_share=0.0,
        empty_caption_share=0.0,
        precision="bf16",
        seed=0,
        micro_batch=1,
    )
    for step in steps:
        print(f"gradient norm {step.gradient_norm:.3g}")
    phase("step")
    (calculated,) = [row for row in rows(MODEL, size) if row["part"] == "all"]
    return {
        "model": MODEL,
        "side": side,
        "modules": len(names),
        "trained": sum(parameter.numel() for parameter in parameters),
        "phases": phases,
        "calculated_gb": round(calculated["peak_bytes"] / 1e9, 2),
        "libraries_gb": phases["libraries"]["peak_gb"],
    }


def main() -> None:
    """Print the figures; write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=512, help="of a picture, in pixels")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    figures = {"threads": given.threads, "torch": torch.__version__, **measure(given.side)}
    print(f"peak {peak_gb():.2f} GB, of it libraries {figures['libraries_gb']:.2f}")
    print(f"calculated, without libraries: {figures['calculated_gb']:.2f} GB")
    if given.json is not None:
        write_json(given.json, figures)


if __name__ == "__main__":
    main()
