"""Evaluation of an erasure against a plain loop over diffusers' pipeline.

    python benchmarks/evaluation.py --json evaluation.json [--pictures 24] [--rounds 3]

The same prompts and seeds are drawn and judged by ours (batches, settings of params.yaml) and by a plain loop (one call
of the stock pipeline a picture), taken in turn in one process: once with our solver and steps, where the pictures must
be the same, and once with 25 steps of DDIM, the protocol's own, where they must be recognised as often. ``ratio`` and
``ratio_to_protocol`` are of medians of seconds a picture. Ours draws the base's pictures once for all erasures of a
base, the plain loop for each: ``ratio_with_base`` counts that in.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from numpy.typing import NDArray

from fade.concepts import caption
from fade.config import EvaluateSettings, load_settings
from fade.data.canvas import OBJECTS
from fade.data.styles import STYLES
from fade.evaluation.judges import judge_pictures, load_judge
from fade.lineage import made_on
from fade.models.family import load_base
from fade.models.generate import generate
from fade.project import load_project

PROJECT = load_project()
PROTOCOL_STEPS = 25
Pictures = NDArray[np.uint8]


def plain(scheduler: Any, steps: int, guidance: float) -> Callable[[Sequence[str], Sequence[int]], Pictures]:
    """One call of the stock pipeline a picture."""
    pipeline = StableDiffusionPipeline.from_pretrained(PROJECT.base)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Pictures:
        drawn = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            found = pipeline(
                prompt,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=torch.Generator().manual_seed(seed),
                output_type="np",
            )
            drawn.append(np.round(found.images[0] * 255).astype(np.uint8))
        return np.stack(drawn)

    return draw


def ours(settings: EvaluateSettings) -> Callable[[Sequence[str], Sequence[int]], Pictures]:
    """Batches, as the step ``evaluate`` draws them."""
    base = load_base(PROJECT.base)
    how = settings.model_dump(include={"batch", "steps", "guidance", "solver", "precision"})

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Pictures:
        return np.concatenate(list(generate(base, prompts, seeds, **how)))

    return draw


def main() -> None:
    """Take the programs in turn and write medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pictures", type=int, default=120, help="of one seed, spread over the pairs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    settings = load_settings(Path("params.yaml")).evaluate
    pairs = [(o, s) for o in OBJECTS for s in STYLES]
    chosen = [pairs[i * len(pairs) // given.pictures] for i in range(given.pictures)]
    prompts, seeds = [caption(o, s) for o, s in chosen], [188] * given.pictures
    solver = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler}[settings.solver]
    programs = {
        "ours": ours(settings),
        "plain": plain(solver, settings.steps, settings.guidance),
        "protocol": plain(DDIMScheduler, PROTOCOL_STEPS, settings.guidance),
    }
    judge = load_judge(Path(PROJECT.judges), "report")
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    pictures: dict[str, Pictures] = {}
    for turn in range(given.rounds + 1):
        for name, draw in programs.items():
            began = time.perf_counter()
            pictures[name] = draw(prompts, seeds)
            verdict = judge_pictures(judge, pictures[name])
            if turn > 0:  # the first one warms up
                seconds[name].append((time.perf_counter() - began) / given.pictures)
            right = [
                (seen == o, look == s)
                for (o, s), seen, look in zip(chosen, verdict.objects, verdict.styles, strict=True)
            ]
            if turn == given.rounds:
                print(name, f"{statistics.median(seconds[name]):.4f} s a picture, recognised", np.mean(right, axis=0))
    apart = np.abs(pictures["ours"].astype(int) - pictures["plain"]) / 255
    median = {name: statistics.median(values) for name, values in seconds.items()}
    found: dict[str, Any] = {
        "seconds_a_picture": median,
        "ratio": median["plain"] / median["ours"],
        "ratio_with_base": 2 * median["plain"] / median["ours"],
        "ratio_to_protocol": median["protocol"] / median["ours"],
        "difference": {"mean": float(apart.mean()), "most_of_a_picture": float(apart.mean(axis=(1, 2, 3)).max())},
        "pictures": given.pictures,
        "rounds": given.rounds,
        "threads": given.threads,
        "settings": settings.model_dump(mode="json"),
        "made_on": made_on(),
    }
    print(json.dumps(found, indent=2))
    if given.json:
        given.json.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
