"""What the closed form costs: one erasure on the canvas, and a large vocabulary.

    python benchmarks/closed_form.py --json closed-form.json

On the canvas: from the text states of an erasure's captions to the factors of its adapter, median of several runs.
A large vocabulary: fifty concepts erased at once with ten thousand prompts retained, at the sizes of the canvas and of
Stable Diffusion 1.5 (random weights and text states, 77 tokens x 768). Encoding the prompts is not in these figures;
``encode_seconds_a_prompt`` says what one costs with an encoder of Stable Diffusion 1.5's size. How well it forgets is
measured by ``fade benchmark canvas``, with the settings in docs/method.md.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.sd15_memory import TOKENS, WIDTH, as_denoiser, build_unet
from fade.config import ClosedFormSettings
from fade.lineage import made_on
from fade.methods.closed_form import closed_form, distinct, text_moments
from fade.methods.fade.masks import Mask
from fade.models.denoiser import Denoiser
from fade.models.family import load_base
from fade.project import load_project

CONCEPTS, CAPTIONS, RETAINED = 50, 4, 10_000


def cross_attention(denoiser: Denoiser) -> Mask:
    """Every key and value that reads the text."""
    modules = tuple(denoiser.text_sites())
    return Mask("none", modules, len(modules), len(modules))


def timed(denoiser: Denoiser, states: tuple[Tensor, ...], rank: int, rounds: int) -> dict[str, Any]:
    """Median seconds of equal captions set aside, moments, solution and factors."""
    mask, given, seconds = cross_attention(denoiser), ClosedFormSettings(), []
    for _ in range(rounds):
        begun = time.perf_counter()
        concept, surrogate = distinct(states[0], states[1])
        (retain,) = distinct(states[2])
        moments = text_moments(concept, surrogate, retain, **given.model_dump(exclude={"shut"}))
        changes = closed_form(denoiser, moments, mask, rank=rank)
        seconds.append(time.perf_counter() - begun)
    return {
        "seconds": statistics.median(seconds),
        "projections": len(changes),
        "captions": [len(concept), len(retain)],
        "bytes_in_half": 2 * sum(change.A.numel() + change.B.numel() for change in changes.values()),
    }


def vocabulary(tokens: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random states of concepts, their surrogates, and what is retained."""
    generator = torch.Generator().manual_seed(0)
    sizes = (CONCEPTS * CAPTIONS, CONCEPTS * CAPTIONS, RETAINED)
    concept, surrogate, retain = (torch.randn(n, tokens, width, generator=generator) for n in sizes)
    return concept, surrogate, retain


def encode_seconds(prompts: int = 16) -> float:
    """Seconds a prompt of a text encoder of Stable Diffusion 1.5's size, with random weights."""
    config = CLIPTextConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=12, num_attention_heads=12
    )
    encoder, ids = CLIPTextModel(config).eval(), torch.randint(1000, (prompts, TOKENS))
    with torch.no_grad():
        encoder(ids)
        begun = time.perf_counter()
        encoder(ids)
    return (time.perf_counter() - begun) / prompts


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    base = load_base(load_project().base)
    styles = [f"a {{}} image in {style} style." for style in ("photo", "oil", "neon", "sketch")]
    told = [[form.format(name) for form in styles] for name in ("cat", "horse")]
    others = [form.format(name) for form in styles for name in ("rocket", "flower", "temple", "coins", "clock")]
    canvas = tuple(base.encode_prompts(prompts).states for prompts in (*told, others))
    found: dict[str, Any] = {"canvas": timed(base.denoiser, canvas, 1, given.rounds)}
    tokens, width = canvas[0].shape[1:]
    found["canvas_vocabulary"] = timed(base.denoiser, vocabulary(tokens, width), CONCEPTS, given.rounds)
    denoiser = as_denoiser(build_unet("fp32"))
    found["sd15"] = timed(denoiser, tuple(part[:40] for part in vocabulary(TOKENS, WIDTH)), 1, given.rounds)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found["sd15_vocabulary"] = timed(denoiser, vocabulary(TOKENS, WIDTH), CONCEPTS, 1)
    found["sd15_vocabulary"]["peak_gib_above"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    found |= {"encode_seconds_a_prompt": encode_seconds(), "threads": given.threads, "made_on": made_on()}
    print(json.dumps(found, indent=2))
    if given.json:
        given.json.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
