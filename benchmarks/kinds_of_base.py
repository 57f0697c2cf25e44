"""What an erasure costs on one base and on another at equal steps, taken in turn.

    python benchmarks/kinds_of_base.py --json FILE

Both bases see the same catalog, concept, steps, batch and rank; of their kind are the defaults that each kind has of
its own (docs/settings.md, "By kind of base"). An erasure is all that makes its adapter: splits, saliency, mask and
distillation, each with its own loading of the base, as a trial runs them; nothing is drawn. One round is one erasure
on each, in one process, so that what else runs on the machine slows both. Processor seconds stand beside the clock's:
on a machine that is shared they are the steadier ones. Ratios are of a round's second base over its first.

Writes ``{"rows": [{"round", "base", "seconds", "cpu_seconds", "distill_seconds", "distill_cpu_seconds"}], "ratio",
"cpu_ratio", "distill_cpu_ratio"}``, each ratio with the median, the least and the most of all rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fade.asking.prepare import prepare_spec
from fade.config import load_settings
from fade.files import write_json
from fade.lineage import made_on
from fade.pipeline import Step, maker_of
from fade.project import load_project
from fade.spec import Spec, save_spec
from fade.steps.catalog import ensure_catalog
from fade.studies.trial import run_steps, steps_of_trial

BASES = "data/base/canvas,data/base/canvas-flow"
RATIOS = {"ratio": "seconds", "cpu_ratio": "cpu_seconds", "distill_cpu_ratio": "distill_cpu_seconds"}


def spec_of(base: str, concept: str, surrogate: str, changes: dict[str, Any]) -> Spec:
    """The erasure on one of the bases."""
    project = load_project().at(base=base)
    ensure_catalog(project)
    return prepare_spec(
        concept, surrogate, project=project, settings=load_settings(project.params, changes={**changes, "threads": 1})
    )


def erased(spec: Spec) -> dict[str, float]:
    """The seconds of an erasure from its request to its adapter, by the clock and by the processor."""
    spent: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        save_spec(spec, Path(folder))
        for step in (step for step in steps_of_trial(spec) if step.makes_adapter or step.name == "split"):
            for name, seconds in _timed(step, Path(folder)).items():
                spent[name] = spent.get(name, 0.0) + seconds
                if step == maker_of(spec):
                    spent[f"distill_{name}"] = seconds
    return {name: round(seconds, 3) for name, seconds in spent.items()}


def _timed(step: Step, folder: Path) -> dict[str, float]:
    begun, busy = time.perf_counter(), time.process_time()
    run_steps(folder, [step], None)
    return {"seconds": time.perf_counter() - begun, "cpu_seconds": time.process_time() - busy}


def ratios(rows: Sequence[dict[str, Any]], bases: Sequence[str]) -> dict[str, dict[str, float]]:
    """Second base over first, round by round: median, least and most."""
    found = {}
    for name, of in RATIOS.items():
        first, second = ([row[of] for row in rows if row["base"] == base] for base in bases)
        each = [b / a for a, b in zip(first, second, strict=True)]
        found[name] = {"median": statistics.median(each), "least": min(each), "most": max(each)}
    return found


def main() -> None:
    """A line an erasure; the file is written after every round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", default=BASES, help="two, by a comma")
    parser.add_argument("--concept", default="astronaut")
    parser.add_argument("--surrogate", default="cameraman")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of both; repeatable"
    )
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    bases = given.bases.split(",")
    if len(bases) != 2:
        parser.error(f"--bases takes two by a comma: got {given.bases}")
    changes = {name: yaml.safe_load(value) for name, _, value in (one.partition("=") for one in given.set)}
    specs = {base: spec_of(base, given.concept, given.surrogate, {"settings": "fixed", **changes}) for base in bases}
    if len({spec.distill.in_force.steps for spec in specs.values()}) > 1:
        parser.error("The bases' erasures have other numbers of steps: give --set distill.steps=NUMBER")
    rows: list[dict[str, Any]] = []
    for number in range(1, given.rounds + 1):
        for base, spec in specs.items():
            rows.append({"round": number, "base": base, **erased(spec)})
            print(rows[-1], flush=True)
        found = ratios(rows, bases)
        steps = next(iter(specs.values())).distill.in_force.steps
        write_json(given.json, {"rows": rows, "steps": steps, **found, "threads": 1, "made_on": made_on()})
    for name, of in found.items():
        print(f"{name}: {of['median']:.2f} ({of['least']:.2f} to {of['most']:.2f})")


if __name__ == "__main__":
    main()
