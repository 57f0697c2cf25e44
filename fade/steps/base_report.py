"""Stage ``base_report``: how well the judges recognise the base's own pictures, and its contact sheet."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fade.evaluation.accuracy import canvas_protocol, rate, scrambled_rate
from fade.evaluation.judges import judge_pictures, load_judge
from fade.files import read_yaml, write_json, writing
from fade.models.family import load_base
from fade.models.generate import generate
from fade.sheets import labelled_sheet


def report_base(folder: Path, *, base: Path, judges: Path, params: dict[str, Any]) -> None:
    """Generate every pair with every seed; write ``metrics.json`` and ``sheet.png``.

    Args:
        params: the section ``base_report`` of params.yaml: seeds, steps, guidance, solver, batch, threads.
    """
    torch.set_num_threads(params["threads"])
    loaded = {name: load_judge(judges, name) for name in ("development", "report")}
    objects, styles = loaded["report"].objects[:-1], loaded["report"].styles[:-1]
    samples = canvas_protocol(objects, styles, params["seeds"])
    batches = generate(
        load_base(base),
        samples["prompt"].tolist(),
        samples["seed"].tolist(),
        batch=params["batch"],
        steps=params["steps"],
        guidance=params["guidance"],
        solver=params["solver"],
        precision=params["precision"],
    )
    total = -(-len(samples) // params["batch"])
    pictures = np.concatenate(list(tqdm(batches, desc="base pictures", total=total, mininterval=5)))
    metrics: dict[str, Any] = {"samples": len(samples), "settings": params}
    for name, judge in loaded.items():
        verdict = judge_pictures(judge, pictures)
        seen = samples.assign(seen_object=verdict.objects, seen_style=verdict.styles)
        metrics[name] = {
            "object": asdict(rate(int((seen["seen_object"] == seen["object"]).sum()), len(seen))),
            "style": asdict(rate(int((seen["seen_style"] == seen["style"]).sum()), len(seen))),
            "scrambled": asdict(scrambled_rate(seen)),
        }
    at = {(row["object"], row["style"], row["seed"]): i for i, row in enumerate(samples.to_dict("records"))}
    shown = params["seeds"][0]
    rows = [(name, [pictures[at[name, style, shown]] for style in styles]) for name in objects]
    with writing(folder) as temporary:
        write_json(temporary / "metrics.json", metrics)
        labelled_sheet(rows, styles, title=f"The base's own pictures, seed {shown}").save(temporary / "sheet.png")


def main() -> None:
    """Run the stage with the parameters in params.yaml."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--judges", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    params = read_yaml(arguments.params)["base_report"]
    report_base(arguments.out, base=arguments.base, judges=arguments.judges, params=params)


if __name__ == "__main__":
    main()
