"""What a search brings back that a base never saw: how deep forgetting can go.

    python -m benchmarks.never_seen --base data/base/canvas --catalog data/wide/catalog --judges data/wide/judges \\
        --concepts hippopotamus,teapot,corn --json FILE
    python -m benchmarks.never_seen --base data/wide/base ...        # the same on a base that saw them

The attack of ``benchmarks/depth.py`` on states, with pictures of concepts of another catalog than the base was trained
on, judged by judge ``report`` of that catalog. A base that was trained without a concept is what every erasure would
like to be; what the search reaches on it, it reaches by the freedom of the text alone. On a base that saw the concept
the same search by the same judge must succeed, or its figure says nothing.

Writes ``{"rows": [{"concept", "base", "success": {"100": [hits, count], ...}, "loss": {"100": mean of the last 50,
...}, "judge": [right of the pictures as the base's autoencoder gives them, count], "cpu_seconds", "budget"}]}``, and
beside it a PNG for each row: what was drawn from the last states, above some of the pictures that were searched for. A
file that is there gains rows.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.depth import Budget, through
from fade.attacks.inversion import draw_from_states, invert_concept, success_curve
from fade.data.catalog import load_catalog, load_pictures
from fade.errors import DataError
from fade.evaluation.judges import judge_pictures, load_judge
from fade.files import read_json, write_json
from fade.hardware import fast_precision
from fade.lineage import made_on
from fade.models.base import Base
from fade.models.denoiser import autocast
from fade.models.family import load_base
from fade.models.inversion import InversionStep
from fade.models.latents import to_pictures
from fade.models.told import Told

PICTURES, LATELY, SHOWN = 80, 50, 8
BEGIN = ("", "an image of a cat", "", "an image of a rocket")
"""Where searches begin, in turn: at nothing, and at objects of the canvas."""
DRAWING: dict[str, Any] = {"steps": 20, "guidance": 4.0, "solver": "ddim"}


def searched_for(base: Base, catalog: Path, judges: Path, concept: str, budget: Budget) -> tuple[dict[str, Any], Any]:
    """A concept's row, and its picture.

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

    prompts = [BEGIN[i % len(BEGIN)] for i in range(budget.restarts)]
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
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    budget = Budget(steps=tuple(sorted({int(step) for step in given.steps.split(",")})))
    base = load_base(given.base)
    rows: list[dict[str, Any]] = read_json(given.json)["rows"] if given.json.is_file() else []
    for concept in given.concepts.split(","):
        spent = time.process_time()
        row, picture = searched_for(base, given.catalog, given.judges, concept, budget)
        row |= {"base": given.base, "cpu_seconds": round(time.process_time() - spent, 1), "budget": asdict(budget)}
        rows = [one for one in rows if (one["concept"], one["base"]) != (concept, given.base)] + [row]
        write_json(given.json, {"rows": rows, "made_on": made_on()})
        name = f"{given.json.stem}-{Path(given.base).name}-{concept.replace(' ', '-')}.png"
        Image.fromarray(picture).save(given.json.with_name(name))
        print(json.dumps({name: value for name, value in row.items() if name != "budget"}), flush=True)


if __name__ == "__main__":
    main()
