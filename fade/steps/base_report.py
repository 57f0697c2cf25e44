"""Stage ``base_report``: how well the judges recognise the base's own pictures, and its contact sheet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from fade.evaluation.accuracy import canvas_protocol, scrambled_rate
from fade.evaluation.figures import BaseReport, Seen, rate
from fade.evaluation.judges import judge_pictures, load_judge
from fade.evaluation.records import dump
from fade.files import writing
from fade.hardware import chosen_precision
from fade.models.family import load_base
from fade.models.generate import generate
from fade.sheets import labelled_sheet
from fade.steps.arguments import stage_arguments


def report_pictures(
    samples: pd.DataFrame,
    objects: Sequence[str],
    styles: Sequence[str],
    out: Path,
    *,
    base: Path,
    judges: Path | None,
    params: dict[str, Any],
) -> Iterator[tuple[int, int]]:
    """Draw a protocol's pictures with a base; write ``sheet.png``, and with judges ``metrics.json``'s figures.

    Yields how many pictures are drawn, of how many.

    Args:
        samples: as ``canvas_protocol`` gives them; pairs that are not in it stay blank on the sheet.
        params: the section ``base_report`` of params.yaml: seeds, steps, guidance, solver, batch, threads, precision.
    """
    torch.set_num_threads(params["threads"])
    drawn = {name: params[name] for name in ("batch", "steps", "guidance", "solver")}
    parts: list[NDArray[np.uint8]] = []
    for batch in generate(
        load_base(base),
        samples["prompt"].tolist(),
        samples["seed"].tolist(),
        precision=chosen_precision(params["precision"]),
        **drawn,
    ):
        parts.append(batch)
        yield sum(map(len, parts)), len(samples)
    pictures = np.concatenate(parts)
    known: dict[str, Seen] = {}
    called = [*objects, *styles]
    for name in ("development", "report") if judges is not None else ():
        named = judge_pictures(load_judge(judges or Path(), name, called=called), pictures)
        seen = samples.assign(seen_object=named.objects, seen_style=named.styles)
        hits = {kind: int((seen[f"seen_{kind}"] == seen[kind]).sum()) for kind in ("object", "style")}
        rates = {kind: rate(count, len(seen)) for kind, count in hits.items()}
        known[name] = Seen(**rates, scrambled=scrambled_rate(seen))
    at = {(row["object"], row["style"], row["seed"]): i for i, row in enumerate(samples.to_dict("records"))}
    first, blank = params["seeds"][0], np.full_like(pictures[0], 255)
    rows = [
        (one, [pictures[at[one, style, first]] if (one, style, first) in at else blank for style in styles])
        for one in objects
    ]
    with writing(out) as temporary:
        dump(BaseReport(samples=len(samples), settings=params, **known), temporary / "metrics.json")
        labelled_sheet(rows, styles, title=f"The base's own pictures, seed {first}").save(temporary / "sheet.png")


def report_base(folder: Path, *, base: Path, judges: Path, params: dict[str, Any]) -> None:
    """The canvas' every pair with every seed; writes ``metrics.json`` and ``sheet.png``."""
    judge = load_judge(judges, "report")
    objects, styles = judge.objects[:-1], judge.styles[:-1]
    samples = canvas_protocol(objects, styles, params["seeds"])
    with tqdm(desc="base pictures", total=len(samples), mininterval=5) as bar:
        for done, _ in report_pictures(samples, objects, styles, folder, base=base, judges=judges, params=params):
            bar.update(done - bar.n)


def main() -> None:
    """Run the stage with the parameters in params.yaml."""
    params, folders = stage_arguments(__doc__, "base_report", "base", "judges", "out")
    report_base(folders["out"], base=folders["base"], judges=folders["judges"], params=params)


if __name__ == "__main__":
    main()
