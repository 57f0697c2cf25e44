"""Time to forget: from the request to the first moment at which the concept is gone and the rest is still there.

    python benchmarks/time_to_forget.py --json time.json [--concepts neon,cat] [--set distill.rank=2 ...]

Three programs, on the same base, pictures, captions and threads:

    ours      split, saliency, mask, distillation from the closed form (``WARM``): what to take for speed
    defaults  the same with the settings of params.yaml: from no change, which forgets deeper
    plain     the loop of ``plain_loop.py`` with the recipe of our defaults; with ``--published`` also the published one

``--set`` changes the first two. Before the first step and after every so many the clock stands still and pictures are
drawn and judged (judge ``report``). The moment counts at which UA, IRA and CRA pass the gate's thresholds and the
drift of the retained pictures is within ``DRIFT``. What the plain loop learns inside of (the modules of our mask) is
given to it for nothing.

Writes ``{"rows": [{"concept", "plain_seconds", "ours_seconds", "ratio", "defaults_seconds", "defaults_ratio", ...}],
"median_ratio", "median_defaults_ratio"}``; a program that has not passed when its time is over has no seconds and no
ratio, but says what it reached.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
import torch
import yaml

from benchmarks.plain_loop import PUBLISHED, Recipe, loop, prepare
from benchmarks.step import plain_set, same_as_ours
from fade.asking.prepare import AUTO, prepare_spec
from fade.concepts import Concept
from fade.config import load_settings
from fade.data.catalog import load_concepts
from fade.evaluation.accuracy import canvas_protocol, drift, naming_none, summary
from fade.evaluation.judges import load_judge
from fade.lineage import made_on
from fade.methods.fade.masks import load_mask
from fade.methods.fade.training import FADE, add_student, train_student
from fade.models.families.stable_diffusion import StableDiffusion
from fade.models.family import load_base
from fade.models.generate import generate
from fade.project import load_project
from fade.spec import Spec, save_spec
from fade.steps.adapter import material
from fade.steps.catalog import ensure_catalog
from fade.steps.drawn import domains, named_by
from fade.steps.mask import mask as mask_step
from fade.steps.saliency import saliency as saliency_step
from fade.steps.split import split as split_step

SIX = ("astronaut", "cat", "motorcycle", "neon", "oil", "mosaic")
DRIFT = 0.06
"""A tenth over the worst of the 22 erasures with defaults would be 0.05; plain loops get a little more."""
SEEDS = (188, 288)
WARM = {"distill.start": "closed_form", "distill.steps": 40}
"""What ours sets besides params.yaml."""
RATIOS = {"ours": "ratio", "defaults": "defaults_ratio"}


class Check:
    """Whether a base with its adapters on has forgotten the concept and kept the rest."""

    def __init__(self, spec: Spec, concept: Concept, surrogate: str | None) -> None:
        self._request, self._concept, self._surrogate = spec, concept, surrogate
        self._judge = load_judge(Path(spec.judges), "report")
        everything = canvas_protocol(*domains(load_concepts(Path(spec.catalog))), SEEDS)
        rest = naming_none(everything, [concept])
        self._named = everything[~everything.index.isin(rest.index)].reset_index(drop=True)
        # One seed of the rest, so that a check costs seconds; every pair of object and style is in it.
        self._rest = rest[rest["seed"] == SEEDS[0]].reset_index(drop=True)
        base = load_base(spec.base)
        self._base = {name: self._drawn(base, rows) for name, rows in (("named", self._named), ("rest", self._rest))}
        self._before = self._figures(self._base["named"], self._base["rest"])

    def _drawn(self, base: Any, rows: Any) -> Any:
        how = self._request.evaluate
        parts = generate(
            base,
            rows["prompt"].tolist(),
            rows["seed"].tolist(),
            batch=how.batch,
            steps=how.steps,
            guidance=how.guidance,
            solver=how.solver,
            precision=how.precision,
        )
        return np.concatenate(list(parts))

    def _figures(self, named: Any, rest: Any) -> dict[str, float]:
        seen = [named_by(self._judge, named, self._named), named_by(self._judge, rest, self._rest)]
        found = summary(pd.concat(seen, ignore_index=True), [(self._concept, self._surrogate)], [])
        return {name: rate.value for name, rate in found.rates.items()}

    def __call__(self, base: Any) -> tuple[bool, dict[str, float]]:
        """Whether it has passed, and the figures; the rest is drawn only once the concept is gone."""
        gate = self._request.gate
        named = self._drawn(base, self._named)
        reached = self._figures(named, self._base["rest"])
        if reached["ua"] < gate.ua:
            return False, {"ua": reached["ua"]}
        rest = self._drawn(base, self._rest)
        reached = {**self._figures(named, rest), "drift": drift(self._base["rest"], rest)}
        kept = all(reached[name] >= self._before[name] - getattr(gate, f"{name}_loss") for name in ("ira", "cra"))
        return kept and reached["drift"] <= DRIFT, reached


def plain(spec: Spec, folder: Path, recipe: Recipe) -> Iterator[Any]:
    """The plain loop; gives the base with its adapter on when it is ready, then after each step."""
    ready = prepare(Path(spec.base), recipe)
    sets = [plain_set(spec, folder, name) for name in ("forget", "surrogate", "retain")]
    sd = StableDiffusion(ready.pipeline, spec.base_sha256, Path(spec.base))
    yield sd
    for _ in loop(ready, *sets):
        yield sd


def ours(spec: Spec, folder: Path) -> Iterator[Any]:
    """Our steps from the request on; gives the base with its adapter on when it is ready, then after each step."""
    save_spec(spec, folder)
    for step in (split_step, saliency_step, mask_step):
        step(folder)
    sd = load_base(spec.base, expected_sha256=spec.base_sha256, weights=spec.weights)
    given, how = material(sd, spec, folder, masked=True), FADE.configured(spec)
    _, parameters = add_student(sd, given, how)
    yield sd
    for _ in train_student(sd, parameters, given, how):
        yield sd


def told(name: str, program: str, said: str) -> None:
    """How far a program is with a concept, on the terminal."""
    print(f"{name:<12} {program:<10} {said}", flush=True)


def seconds_to_pass(
    steps: Iterator[Any], check: Check, *, every: int, most: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Seconds of work until the check passes; without ``seconds`` if it does not within ``most``, or before the end."""
    spent, count = 0.0, 0
    reached: dict[str, Any] = {}
    while True:
        begun = time.perf_counter()
        base = next(steps, None)
        spent += time.perf_counter() - begun
        if base is None:
            return {"worked_seconds": spent, "steps": count, **reached}
        if count % every == 0:
            passed, reached = check(base)
            say(f"{count} steps, {spent:.1f} s: " + ", ".join(f"{name} {value:.3f}" for name, value in reached.items()))
            if passed:
                return {"seconds": spent, "steps": count, **reached}
        if spent > most:
            return {"worked_seconds": spent, "steps": count, **reached}
        count += 1


def compare(concept: str, arguments: argparse.Namespace, changes: dict[str, Any]) -> dict[str, Any]:
    """One concept by every program."""
    name, _, surrogate = concept.partition(":")
    fixed = {"threads": arguments.threads}
    project = load_project()

    def asked(surrogate: str, given: dict[str, Any]) -> Spec:
        settings = load_settings(project.params, changes={**given, **fixed})
        return prepare_spec(name, surrogate, project=project, settings=settings)

    default = asked(surrogate or AUTO, changes)
    warm, plainly = asked(default.surrogate, {**WARM, **changes}), asked(default.surrogate, {})
    concepts = load_concepts(Path(default.catalog))
    check = Check(default, concepts[name], default.surrogate if default.surrogate in concepts else None)
    row: dict[str, Any] = {"concept": name, "surrogate": default.surrogate}
    with tempfile.TemporaryDirectory() as place:
        save_spec(plainly, Path(place))
        for step in (split_step, saliency_step, mask_step):
            step(Path(place))
        same = same_as_ours(plainly, load_mask(Path(place) / "mask").modules)
        programs: dict[str, Callable[[], Iterator[Any]]] = {
            "ours": lambda: ours(warm, Path(place) / "ours"),
            "defaults": lambda: ours(default, Path(place) / "defaults"),
            "plain": lambda: plain(plainly, Path(place), same),
        }
        if arguments.published:
            programs["published"] = lambda: plain(plainly, Path(place), PUBLISHED)
        for program, begin in programs.items():
            found = seconds_to_pass(
                begin(),
                check,
                every=arguments.every,
                most=arguments.most,
                say=partial(told, name, program),
            )
            row |= {f"{program}_{key}": value for key, value in found.items()}
    for program, ratio in RATIOS.items():
        if f"{program}_seconds" in row and "plain_seconds" in row:
            row[ratio] = row[f"{program}_seconds"] / row["plain_seconds"]
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    """Print each moment, then the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", default=",".join(SIX), help="by commas; NAME:SURROGATE names what comes instead")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="of ours, as of `fade erase`")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--every", type=int, default=10, help="steps between checks")
    parser.add_argument("--most", type=float, default=1200.0, help="seconds after which a program is given up")
    parser.add_argument("--published", action="store_true", help="also the plain loop with the published settings")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    ensure_catalog(load_project())
    changes = {name: yaml.safe_load(value) for name, _, value in (one.partition("=") for one in given.set)}
    rows = [compare(one.strip(), given, changes) for one in given.concepts.split(",")]
    ratios = {name: [row[name] for row in rows if name in row] for name in RATIOS.values()}
    figures = {
        "rows": rows,
        **{f"median_{name}": statistics.median(found) if found else None for name, found in ratios.items()},
        "settings": {
            "ours": {**WARM, **changes},
            "defaults": changes,
            "threads": given.threads,
            "every": given.every,
            "drift": DRIFT,
        },
        "made_on": made_on(),
    }
    text = json.dumps(figures, indent=2, sort_keys=True)
    print(text)
    if given.json is not None:
        given.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
