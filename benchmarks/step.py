"""A step of distillation against a step of the plain loop, and how near to the machine's limit it comes at full size.

    python benchmarks/step.py --json step.json

writes ``equal_settings_ratio`` (plain over ours, the same batch, rank, modules and captions), ``defaults_ratio`` (the
published settings, plainly implemented, over ours with its defaults), ``sd15_matmul_fraction`` (a step at the size of
Stable Diffusion 1.5 with random weights, one forget and one retain example, as a share of this machine's own rate of
bfloat16 matrix products) and ``sd15_peak_bytes`` (memory beside the base's weights), with the seconds behind them.

Steps of plain and ours are taken in turn in one process; ratios are of medians. A step of ours carries its share of
the teacher's pool, which is filled before the first one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.plain_loop import PUBLISHED, PlainSet, Recipe, loop, prepare
from benchmarks.sd15_memory import TOKENS, WIDTH, as_denoiser, build_unet, examples, peak_gb
from fade.asking.prepare import prepare_spec
from fade.config import load_settings
from fade.data.catalog import load_pictures
from fade.lineage import made_on
from fade.methods.fade.distillation import Sets, distill
from fade.methods.fade.masks import Mask, load_mask
from fade.methods.fade.saliency import salient_parameters
from fade.methods.fade.sparse_lora import add_sparse_lora, computed_whole
from fade.methods.fade.targeting import power_law
from fade.methods.fade.training import FADE, add_student, loop_settings, train_student, training_sets
from fade.models.family import load_base
from fade.models.told import Told
from fade.project import load_project
from fade.spec import Spec, save_spec
from fade.steps.adapter import material
from fade.steps.catalog import ensure_catalog
from fade.steps.mask import mask as mask_step
from fade.steps.saliency import saliency as saliency_step
from fade.steps.split import split as split_step

PARAMS = Path("params.yaml")
CONCEPT, SURROGATE = "astronaut", "cameraman"
WARM_UP = 2
SD15_STEPS = 3


def begin(folder: Path, threads: int, changes: dict[str, Any]) -> Spec:
    """An erasure of the default settings, up to its mask."""
    project = load_project()
    ensure_catalog(project)
    settings = load_settings(project.params, changes={**changes, "threads": threads})
    spec = prepare_spec(CONCEPT, SURROGATE, project=project, settings=settings)
    save_spec(spec, folder)
    for step in (split_step, saliency_step, mask_step):
        step(folder)
    return spec


def plain_set(spec: Spec, folder: Path, name: str) -> PlainSet:
    """Pictures and captions of a split."""
    table = pd.read_parquet(folder / "splits" / f"{name}.parquet")
    captions = table["caption"].tolist()
    told = table["surrogate_caption"].tolist() if "surrogate_caption" in table else captions
    return PlainSet(load_pictures(spec.picture_catalog(folder), table), captions, told)


def same_as_ours(spec: Spec, modules: tuple[str, ...]) -> Recipe:
    """Our settings as a recipe of the plain loop."""
    ours = spec.distill.in_force
    return Recipe(
        targets=modules,
        rank=ours.rank,
        alpha=ours.alpha,
        learning_rate=ours.learning_rate,
        batch=ours.batch,
        forget_weight=ours.forget_weight,
        retain_weight=ours.retain_weight,
        clip_norm=ours.clip_norm,
        weight_decay=ours.weight_decay,
        timestep_power=ours.timestep_power,
        surrogate_share=ours.surrogate_share,
        empty_share=ours.empty_caption_share,
        cosine=True,
        steps=ours.steps,
        seed=ours.seed,
    )


def ours(spec: Spec, folder: Path) -> Iterator[object]:
    """Our own steps, as an erasure takes them."""
    base = load_base(spec.base, expected_sha256=spec.base_sha256, weights=spec.weights)
    given, settings = material(base, spec, folder, masked=True), FADE.configured(spec)
    sets = training_sets(base, given, settings)
    _, parameters = add_student(base, given, settings)
    yield None
    yield from train_student(base, parameters, given, settings, sets=sets)


def timed(work: Callable[[], object]) -> float:
    """Seconds of a call."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def on_the_canvas(threads: int, rounds: int, changes: dict[str, Any]) -> dict[str, Any]:
    """Medians of steps taken in turn, and their ratios."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        request = begin(folder, threads, changes)
        sets = [plain_set(request, folder, name) for name in ("forget", "surrogate", "retain")]
        base, steps = Path(request.base), request.distill.in_force.steps
        recipes = {
            "plain_same": same_as_ours(request, load_mask(folder / "mask").modules),
            "plain_published": PUBLISHED,
        }
        loops: dict[str, Iterator[object]] = {name: loop(prepare(base, one), *sets) for name, one in recipes.items()}
        loops["ours"] = ours(request, folder)
        next(loops["ours"])
        filled = timed(lambda: next(loops["ours"]))
        seconds: dict[str, list[float]] = {name: [] for name in loops}
        for turn in range(WARM_UP + rounds):
            for name, one in loops.items():
                spent = timed(partial(next, one))
                if turn >= WARM_UP:
                    seconds[name].append(spent)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    pool = max(filled - medians["ours"], 0.0) / steps
    whole = medians["ours"] + pool
    return {
        "equal_settings_ratio": medians["plain_same"] / whole,
        "defaults_ratio": medians["plain_published"] / whole,
        "canvas_seconds": {**medians, "ours_share_of_pool": pool},
        "canvas_spread": {name: [min(values), max(values)] for name, values in seconds.items()},
    }


def matmul_rate() -> float:
    """This machine's own rate of bfloat16 matrix products, operations a second; the best of several."""
    left, right = (torch.randn(4096, 4096).bfloat16() for _ in range(2))
    return 2 * 4096**3 / min(timed(lambda: left @ right) for _ in range(6))


def at_full_size(threads: int) -> dict[str, Any]:
    """A step at SD 1.5's size; runs in a process of its own, since peak memory is a process'."""
    torch.set_num_threads(threads)
    unet = build_unet("bf16")
    denoiser = as_denoiser(unet)
    beside = peak_gb()
    modules = tuple(sorted(salient_parameters(unet)))
    kept = tuple(modules[: round(0.75 * len(modules))])
    parameters = add_sparse_lora(
        unet, Mask("module", kept, len(kept), len(modules)), rank=6, alpha=6.0, seed=0, name="s"
    )
    unet.enable_gradient_checkpointing()
    defaults = load_settings(PARAMS).distill.model_copy(
        update={"batch": 1, "steps": SD15_STEPS, "pool": None, "precision": "bf16", "surrogate_share": 0.0}
    )
    with computed_whole(unet):
        steps = distill(
            denoiser,
            parameters,
            sets=Sets(examples(2), examples(2), examples(2)),
            empty=Told(torch.randn(1, TOKENS, WIDTH)),
            timesteps=power_law(denoiser.path.steps, 0.25),
            surrogate_share=0.0,
            **loop_settings(defaults),
        )
        # Counted in the first step, whose time is not taken.
        with FlopCounterMode(display=False) as counter:
            next(steps)
        seconds = min(timed(lambda: next(steps)) for _ in range(SD15_STEPS - 1))
    rate = matmul_rate()
    return {
        "sd15_matmul_fraction": counter.get_total_flops() / seconds / rate,
        "sd15_peak_bytes": round((peak_gb() - beside) * 1e9),
        "sd15_step_seconds": seconds,
        "sd15_step_flops": counter.get_total_flops(),
        "bf16_matmul_flops_per_second": rate,
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting, as of `fade erase`"
    )
    parser.add_argument("--full-size", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    arguments = parser.parse_args()
    changes = {name: yaml.safe_load(value) for name, _, value in (given.partition("=") for given in arguments.set)}
    figures = on_the_canvas(arguments.threads, arguments.rounds, changes)
    if arguments.full_size:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
            figures |= alone.submit(at_full_size, arguments.threads).result()
    text = json.dumps({**figures, "threads": arguments.threads, "made_on": made_on()}, indent=2, sort_keys=True)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
