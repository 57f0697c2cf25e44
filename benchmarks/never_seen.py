"""What a search brings back that a base never saw: how deep forgetting can go.

    python -m benchmarks.never_seen --base data/base/canvas --catalog data/wide/catalog --judges data/wide/judges \\
        --concepts hippopotamus,teapot,corn --json FILE
    python -m benchmarks.never_seen --base data/wide/base ...        # the same on a base that saw them

    python -m benchmarks.never_seen --retrain --base data/trials/never-seen/base --catalog data/catalog \\
        --judges data/judges --begin horse,motorcycle --concepts rocket,astronaut,cat --json FILE
    python -m benchmarks.never_seen --base data/base/canvas --catalog ...        # the same, on one that saw them

The attack of ``benchmarks/depth.py`` on states, with pictures of concepts of another catalog than the base was trained
on, judged by judge ``report`` of that catalog. A base that was trained without a concept is what every erasure would
like to be; what the search reaches on it, it reaches by the freedom of the text alone. On a base that saw the concept
the same search by the same judge must succeed, or its figure says nothing.

With ``--retrain`` a ``--base`` that is not there is first trained, on the canvas without the concepts: what unlearning
is measured against. Text encoder and denoiser begin from scratch; the autoencoder is the built-in base's, which saw
the concepts, since what is asked is what a text can say. Cut off, it goes on.

Writes ``{"rows": [{"concept", "base", "success": {"100": [hits, count], ...}, "loss": {"100": mean of the last 50,
...}, "judge": [right of the pictures as the base's autoencoder gives them, count], "cpu_seconds", "budget"}]}``, and
beside it a PNG for each row: what was drawn from the last states, above some of the pictures that were searched for. A
file that is there gains rows.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from benchmarks.depth import Budget, through
from fade.attacks.inversion import draw_from_states, invert_concept, success_curve
from fade.concepts import caption_variants
from fade.data.canvas import OBJECTS, render_all
from fade.data.catalog import load_catalog, load_pictures
from fade.errors import ConfigError, DataError
from fade.evaluation.judges import judge_pictures, load_judge
from fade.files import read_json, read_yaml, sha256_file, write_json, writing
from fade.hardware import fast_precision
from fade.lineage import ROOT, made_on
from fade.models.base import Base
from fade.models.denoiser import autocast
from fade.models.family import load_base
from fade.models.inversion import InversionStep
from fade.models.latents import encode_pictures, to_pictures
from fade.models.told import Told
from fade.models.training import networks
from fade.models.training.loop import train_denoiser
from fade.models.training.steps import CHECKPOINT_EVERY, Checkpoint, kept_beside, made_of_hash

PICTURES, LATELY, SHOWN = 80, 50, 8
BEGIN = "cat,rocket"
"""Searches begin, in turn, at nothing and at these objects of the base's own."""
CANVAS, PARAMS = ROOT / "data/base/canvas", ROOT / "params.yaml"
DRAWING: dict[str, Any] = {"steps": 20, "guidance": 4.0, "solver": "ddim"}


def retrain(out: Path, without: Sequence[str], *, params: dict[str, Any]) -> None:
    """Train a base on the canvas without some of its objects; write the folder ``out``.

    Args:
        params: as the section ``base`` of params.yaml; of the autoencoder, which is not trained, nothing is read.

    Raises:
        ConfigError: one of them is no object of the canvas; or what is kept beside ``out`` is of another training.
    """
    if unknown := sorted({*without} - {*OBJECTS}):
        raise ConfigError(f"The canvas has no object {unknown[0]!r}. It has {', '.join(OBJECTS)}.")
    settings, seed = params["denoiser"], params["seed"]
    rendered = render_all(split="train", per_pair=params["pictures_per_pair"], seed=seed)
    shown = [picture for picture in rendered if picture.object not in without]
    pictures = np.stack([one.pixels for one in shown])
    captions = [caption_variants(one.object, one.style, OBJECTS[one.object].aliases) for one in shown]
    vae = AutoencoderKL.from_pretrained(CANVAS, subfolder="vae", torch_dtype=torch.float32)
    latents = encode_pictures(vae, pictures)
    sentences = sorted({sentence for variants in captions for sentence in variants})
    tokenizer = networks.build_tokenizer(sentences, max_length=settings["max_tokens"])
    networks.seed_weights(seed, "denoiser")
    width = settings["text_width"]
    text_encoder = networks.make_text_encoder(tokenizer, width=width, layers=settings["text_layers"])
    channels, sizes = settings["channels"], {"latent_size": latents.shape[-1], "latent_channels": latents.shape[1]}
    unet = networks.make_unet(channels, text_width=width, **sizes)
    made_of = made_of_hash(
        pictures, captions, settings, [sha256_file(path) for path in CANVAS.rglob("vae/*.safetensors")]
    )
    kept = kept_beside(out)
    how = {name: settings[name] for name in ("steps", "batch", "learning_rate", "ema_decay")}
    how |= {"seed": seed, "checkpoint": Checkpoint(kept / "denoiser.safetensors", CHECKPOINT_EVERY, made_of)}
    for _ in tqdm(
        train_denoiser(unet, text_encoder, tokenizer, latents, captions, **how), total=settings["steps"], mininterval=10
    ):
        pass
    with writing(out) as temporary:
        networks.save_pipeline(temporary, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet)
    shutil.rmtree(kept)


def searched_for(
    base: Base, catalog: Path, judges: Path, concept: str, budget: Budget, *, begin: Sequence[str]
) -> tuple[dict[str, Any], Any]:
    """A concept's row, and its picture.

    Args:
        begin: objects at whose names every other search begins.

    Raises:
        DataError: the catalog has no pictures to train on of an object of this name.
    """
    table = load_catalog(catalog)
    rows = table[(table["object"] == concept) & (table["split"] == "train")].sort_values("image_id")
    if rows.empty:
        raise DataError(f"{catalog} holds no training pictures of an object {concept!r}.")
    rows = rows.iloc[np.linspace(0, len(rows) - 1, min(PICTURES, len(rows))).astype(int)]
    judge, precision = load_judge(judges, "report", called=[concept]), fast_precision()
    pictures = load_pictures(catalog, rows)

    def seen_in(some: NDArray[np.uint8]) -> NDArray[np.bool_]:
        return np.array(judge_pictures(judge, some).objects) == concept

    with torch.no_grad(), autocast(precision):
        latents = base.encode_pictures(pictures).float()
        known = seen_in(to_pictures(base.decode(latents)))
    drawn: list[NDArray[np.uint8]] = []

    def shows(states: Told) -> NDArray[np.bool_]:
        how = {"batch": 12, "precision": precision, **DRAWING}
        drawn.append(draw_from_states(base, states.to("cpu"), seeds=budget.seeds, **how))
        return seen_in(drawn[-1])

    losses: list[float] = []

    def heard(search: Iterator[InversionStep]) -> Iterator[InversionStep]:
        for step in search:
            losses.append(step.loss)
            yield step

    beginnings = [said for one in begin for said in ("", f"an image of a {one}")]
    prompts = list(islice(cycle(beginnings), budget.restarts))
    how: dict[str, Any] = {
        "restarts": budget.restarts,
        "steps": max(budget.steps),
        "batch": budget.batch,
        "seed": budget.seed,
    }
    search = invert_concept(
        base, latents, prompts=prompts, learning_rate=budget.learning_rate, precision=precision, **how
    )
    curve = through(success_curve(heard(search), shows, budget.steps))
    row = {
        "concept": concept,
        "success": {str(stop): [hits, curve.count] for stop, hits in zip(curve.stops, curve.hits, strict=True)},
        "loss": {
            str(stop): round(float(np.mean(losses[max(0, stop - LATELY) : stop])), 4)
            for stop in curve.stops
            if stop <= len(losses)
        },
        "judge": [int(known.sum()), len(known)],
    }
    sheet = [drawn[-1][:SHOWN], drawn[-1][SHOWN : 2 * SHOWN], np.asarray(pictures)[:SHOWN]]
    return row, np.concatenate([np.concatenate(list(line), axis=1) for line in sheet if len(line) == SHOWN])


def main() -> None:
    """A row a concept; the file is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="data/base/canvas")
    parser.add_argument("--catalog", type=Path, default=Path("data/wide/catalog"))
    parser.add_argument("--judges", type=Path, default=Path("data/wide/judges"))
    parser.add_argument("--concepts", required=True, help="objects of that catalog, by commas")
    parser.add_argument("--steps", default="100,300,1000")
    parser.add_argument("--begin", default=BEGIN, help="objects that the base knows, by commas")
    parser.add_argument(
        "--retrain", action="store_true", help="train the base without the concepts, if it is not there"
    )
    parser.add_argument("--denoiser-steps", type=int, default=5000, help="of --retrain; the canvas' base took 7500")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    budget = Budget(steps=tuple(sorted({int(step) for step in given.steps.split(",")})))
    concepts = given.concepts.split(",")
    if given.retrain and not Path(given.base).exists():
        params = read_yaml(PARAMS)["base"]
        params["denoiser"]["steps"] = given.denoiser_steps
        retrain(Path(given.base), concepts, params=params)
    base = load_base(given.base)
    rows: list[dict[str, Any]] = read_json(given.json)["rows"] if given.json.is_file() else []
    for concept in concepts:
        spent = time.process_time()
        row, picture = searched_for(base, given.catalog, given.judges, concept, budget, begin=given.begin.split(","))
        row |= {"base": given.base, "cpu_seconds": round(time.process_time() - spent, 1), "budget": asdict(budget)}
        rows = [one for one in rows if (one["concept"], one["base"]) != (concept, given.base)] + [row]
        write_json(given.json, {"rows": rows, "made_on": made_on()})
        name = f"{given.json.stem}-{Path(given.base).name}-{concept.replace(' ', '-')}.png"
        Image.fromarray(picture).save(given.json.with_name(name))
        print(json.dumps({name: value for name, value in row.items() if name != "budget"}), flush=True)


if __name__ == "__main__":
    main()
