"""What an erasure costs: a model with a measured fit on the canvas, and what it says of larger bases on an H100.

    python benchmarks/cost.py --json cost.json

With F the floating-point operations of one forward pass of the denoiser over one example:

    step       2 batch F (teacher + student + back to the activations + density x back to the weights)
               = 2 batch F (3 + density)                 and each of the ``rank`` rows and columns a little more
    saliency   groups x group_size x 4 F                 gain: teacher, student, back to activations and weights
    pictures   pictures x solver steps x 2 F             guidance asks twice

Seconds of a step are fitted as  overhead + operations / rate + per_rank x batch x rank  over batch, density and rank,
with the largest relative error of the fit beside it. The prediction for Stable Diffusion 1.5 and XL takes operations
counted on the real architectures without weights, and ``UTILISATION`` of the card's dense bfloat16 rate: an assumption,
not a measurement, as no such card was at hand.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from scipy.optimize import nnls
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.step import begin, ours
from fade.config import Settings, load_settings
from fade.lineage import made_on
from fade.models.family import load_base
from fade.steps.saliency import FEW_GROUPS

PARAMS = Path("params.yaml")
BATCHES, DENSITIES, RANKS = (4, 16), (0.1, 0.75), (1, 16)
WARM_UP, STEPS = 2, 5
H100, UTILISATION = 989e12, 0.4
"""NVIDIA's data sheet: dense bfloat16, SXM; and the share of it that is assumed."""
XL = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def forward_flops(config: dict[str, Any]) -> int:
    """Of one example, on the architecture without weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
        size, width = config["sample_size"], config["cross_attention_dim"]
        added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        given = (torch.empty(1, 4, size, size), torch.zeros(1), torch.empty(1, 77, width))
        with FlopCounterMode(display=False) as counter:
            unet(*given, added_cond_kwargs=added if "addition_embed_type" in config else None)
    return counter.get_total_flops()


def canvas_flops(base: Path) -> int:
    """The same of the built-in base."""
    sd = load_base(base)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        sd.denoiser.predict(torch.zeros(1, *sd.denoiser.latent_shape), torch.zeros(1), sd.unconditional())
    return counter.get_total_flops()


def step_work(flops: float, *, batch: int, density: float) -> float:
    """Operations of one step."""
    return 2 * batch * flops * (3 + density)


def measured(threads: int) -> tuple[list[dict[str, Any]], Path]:
    """Median seconds of a step for every batch, density and rank."""
    rows = []
    for batch, density, rank in itertools.product(BATCHES, DENSITIES, RANKS):
        changes = {"distill.batch": batch, "distill.rank": rank, "distill.alpha": rank, "mask.density": density}
        changes |= {"distill.steps": WARM_UP + STEPS, "saliency.groups": 1}
        with tempfile.TemporaryDirectory() as place:
            request = begin(Path(place), threads, changes)
            steps, seconds = ours(request, Path(place)), []
            next(steps)
            for _ in range(WARM_UP + STEPS):
                begun = time.perf_counter()
                next(steps)
                seconds.append(time.perf_counter() - begun)
        rows.append({"batch": batch, "density": density, "rank": rank, "seconds": statistics.median(seconds[WARM_UP:])})
    return rows, Path(request.base)


def fitted(rows: list[dict[str, Any]], flops: float) -> dict[str, float]:
    """Non-negative least squares of relative errors; seconds, operations a second, seconds a row and column."""
    work = np.array(
        [[1, step_work(flops, batch=r["batch"], density=r["density"]), r["batch"] * r["rank"]] for r in rows]
    )
    seconds = np.array([row["seconds"] for row in rows])
    scale = work.max(axis=0)
    found, _ = nnls(work / scale / seconds[:, None], np.ones(len(rows)))
    overhead, a_flop, a_rank = found / scale
    error = np.abs(work @ (found / scale) / seconds - 1)
    return {
        "overhead_seconds": overhead,
        "flops_per_second": 1 / a_flop if a_flop else float("inf"),
        "seconds_a_batch_rank": a_rank,
        "largest_relative_error": float(error.max()),
    }


def predicted(flops: float, settings: Settings) -> dict[str, float]:
    """Seconds on the card with the default settings."""
    rate, distill, saliency = H100 * UTILISATION, settings.distill, settings.saliency
    step = step_work(flops, batch=distill.batch, density=settings.mask.density) / rate
    return {
        "forward_teraflops": flops / 1e12,
        "step_seconds": step,
        "distill_seconds": step * distill.steps,
        "saliency_seconds": (saliency.groups or FEW_GROUPS) * saliency.group_size * 4 * flops / rate,
        "seconds_a_picture_of_25_steps": 25 * 2 * flops / rate,
    }


def main() -> None:
    """Measure, fit, predict."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows, base = measured(given.threads)
    flops, settings = canvas_flops(base), load_settings(PARAMS)
    found: dict[str, Any] = {
        "rows": rows,
        "canvas_forward_gigaflops": flops / 1e9,
        "fit": fitted(rows, flops),
        "h100": {
            "utilisation_assumed": UTILISATION,
            "sd15": predicted(forward_flops({"sample_size": 64, "cross_attention_dim": 768}), settings),
            "sdxl": predicted(forward_flops(XL), settings),
        },
        "threads": given.threads,
        "made_on": made_on(),
    }
    text = json.dumps(found, indent=2, sort_keys=True)
    print(text)
    if given.json is not None:
        given.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
