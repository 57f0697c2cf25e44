"""Memory and time of an erasure at Stable Diffusion 1.5's full size, with random weights: no download is needed.

    python benchmarks/sd15_memory.py --json sd15-memory.json

Measures what grows with the network: the saliency of every module and two steps of distillation on 64 x 64
latents (pictures of 512 x 512), one forget and one retain example a step. Encoders and autoencoder, 0.2 billion
parameters that run before training, are not part of it. Peak memory is that of the process, its libraries included.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from fade.methods.fade.distillation import Sets, distill
from fade.methods.fade.examples import Examples
from fade.methods.fade.masks import make_mask
from fade.methods.fade.saliency import accumulate_saliency, noisy_groups
from fade.methods.fade.sparse_lora import adapter_tensors, add_sparse_lora
from fade.methods.fade.targeting import power_law
from fade.models.families.stable_diffusion import UNet
from fade.models.paths import DiffusionPath
from fade.models.told import Told
from fade.models.training.networks import make_noise_scheduler

LATENT, TOKENS, WIDTH = (4, 64, 64), 77, 768
BAR_GB = 8.0


def build_unet(weights: str) -> Any:
    """Stable Diffusion 1.5's UNet, 860 million random parameters, in the type they are to be held in."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if weights == "bf16" else torch.float32)
    try:
        unet = UNet2DConditionModel(sample_size=LATENT[1], cross_attention_dim=WIDTH, attention_head_dim=8)
    finally:
        torch.set_default_dtype(torch.float32)
    return unet.requires_grad_(False).eval()


def examples(count: int) -> Examples:
    """Random latents and text states."""
    return Examples(
        torch.randn(count, *LATENT),
        Told(torch.randn(count, TOKENS, WIDTH)),
        Told(torch.randn(count, TOKENS, WIDTH)),
    )


def peak_gb() -> float:
    """The most memory this process has had, in GB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def as_denoiser(unet: UNet2DConditionModel) -> UNet:
    """A network of this size on Stable Diffusion 1.x's path."""
    return UNet(unet, DiffusionPath(make_noise_scheduler().alphas_cumprod), (4, 64, 64))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak memory after each phase."""
    figures: dict[str, Any] = {"bar_gb": BAR_GB, "phases": {}}
    begun = time.perf_counter()

    def phase(name: str) -> None:
        nonlocal begun
        figures["phases"][name] = {"seconds": round(time.perf_counter() - begun, 1), "peak_gb": round(peak_gb(), 2)}
        print(f"{name:<10} {figures['phases'][name]['seconds']:>8.1f} s   peak {peak_gb():.2f} GB", flush=True)
        begun = time.perf_counter()

    phase("libraries")
    unet = build_unet(arguments.weights)
    denoiser = as_denoiser(unet)
    figures["parameters"] = sum(parameter.numel() for parameter in unet.parameters())
    if arguments.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    phase("build")
    groups = noisy_groups(examples(2), groups=1, group_size=2, timesteps=power_law(denoiser.path.steps, 1.0), seed=0)
    scores = accumulate_saliency(denoiser, groups, against="teacher", granularity="module")
    phase("saliency")
    mask = make_mask(scores, 0.75, granularity="module")
    parameters = add_sparse_lora(unet, mask, rank=6, alpha=6.0, seed=0, name="student")
    steps = distill(
        denoiser,
        parameters,
        sets=Sets(examples(2), examples(2), examples(2)),
        empty=Told(torch.randn(1, TOKENS, WIDTH)),
        timesteps=power_law(denoiser.path.steps, 0.25),
        steps=2,
        batch=1,
        learning_rate=2e-3,
        weight_decay=1e-2,
        clip_norm=1.0,
        forget_weight=1.0,
        retain_weight=1.0,
        surrogate_share=0.0,
        empty_caption_share=0.1,
        precision="bf16",
        seed=0,
        micro_batch=arguments.micro_batch,
    )
    for step in steps:
        print(f"step {step.step}: forget loss {step.forget_loss:.4f}, gradient norm {step.gradient_norm:.4f}")
    phase("distill")
    figures["adapter_bytes"] = sum(2 * tensor.numel() for tensor in adapter_tensors(denoiser, "student").values())
    figures["peak_gb"] = round(peak_gb(), 2)
    return figures


def main() -> int:
    """Print the figures; exit status 1 if the peak is above the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--micro-batch", type=int, help="examples at a time; all of a step's if left out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    asked = {name: value for name, value in vars(arguments).items() if name != "json"}
    figures = {"settings": asked, "torch": torch.__version__, **measure(arguments)}
    fits = figures["peak_gb"] <= BAR_GB
    print(f"peak {figures['peak_gb']:.2f} GB, {'within' if fits else 'ABOVE'} the bar of {BAR_GB:.0f} GB")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return 0 if fits else 1


if __name__ == "__main__":
    raise SystemExit(main())
