"""What no change of the text's projections can take away: how much retained answers must move until a concept is gone.

    python benchmarks/reach.py --concepts astronaut,cat,neon --json FILE

Where text enters through linear maps alone, whoever holds base and erased weights needs no search for states that bring
a concept back: those that the erased weights W take for it most nearly are solved for, min over x of |W x - W* c|^2
(``fade/methods/rece.py``). Two ways to leave them nothing are tried, each further and further:

    shut    the ``n`` directions of a text state of which the concept's texts have most for what retained ones have
            (``fade/methods/closed_form.py``)
    rece    rounds of RECE, which erase the solved states too

A row says how far the answers to retained states moved (``retained``: root mean square, of the answers'), how far the
nearest answers lie from the concept's (``unreached``, likewise), and how many pictures drawn from the solved states
still show it to the judge ``development``.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fade.asking.prepare import AUTO, prepare_spec
from fade.concepts import caption
from fade.config import load_settings
from fade.data.catalog import load_concepts
from fade.evaluation.judges import judge_pictures, load_judge
from fade.files import write_json
from fade.lineage import made_on
from fade.methods.closed_form import metric_of_answers, open_projection
from fade.methods.edits import EditSettings, edited, solve
from fade.methods.rece import derived
from fade.models.base import Base
from fade.models.deltas import plain_modules
from fade.models.family import load_base
from fade.models.generate import generate_from
from fade.project import load_project
from fade.spec import Spec, save_spec
from fade.steps.adapter import material
from fade.steps.catalog import ensure_catalog
from fade.steps.drawn import domains
from fade.steps.split import split

RIDGE = 1e-4
"""Keeps solved states short."""
ROUNDS = (1, 2, 5, 10, 20)

Weights = Mapping[str, Tensor]


def shut(before: Weights, concept: Tensor, retained: Tensor, count: int) -> dict[str, Tensor]:
    """W* P: ``count`` directions of a state are shut."""
    forget, keep = (states.T @ states / len(states) for states in (concept, retained))
    left = open_projection(forget, keep, metric_of_answers(before.values()), count, moved=math.inf)
    return {name: weight @ left for name, weight in before.items()}


def rounds(before: Weights, concept: Tensor, surrogate: Tensor, retained: Tensor) -> Iterator[dict[str, Tensor]]:
    """The weights after each of ``ROUNDS`` rounds of RECE."""
    asked, aim, settings = concept, surrogate, EditSettings()
    for number in range(1, max(ROUNDS) + 1):
        after = {name: solve(weight, asked, aim, retained, settings) for name, weight in before.items()}
        if number in ROUNDS:
            yield after
        asked = torch.cat([asked, derived(before, after, concept, ridge=RIDGE)])
        aim = torch.cat([aim, surrogate])


def apart(before: Weights, after: Weights, of: Tensor, found: Tensor) -> float:
    """Root mean square of what ``after`` gives for ``found`` less what ``before`` gives for ``of``, of the latter's."""
    missed = sum(float((found @ after[name].T - of @ before[name].T).square().sum()) for name in before)
    return (missed / sum(float((of @ before[name].T).square().sum()) for name in before)) ** 0.5


def rows_of(base: Base, spec: Spec, counts: Sequence[int], seed: int) -> Iterator[dict[str, Any]]:
    """A row a way and how far it goes."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_spec(spec, folder)
        split(folder)
        concept, surrogate, retained = edited(base, material(base, spec, folder))
    modules = plain_modules(base.network)
    before = {name: modules[name].weight.detach().double().cpu() for name in base.denoiser.text_sites()}
    objects, styles = domains(load_concepts(Path(spec.catalog)))
    pairs = [(name, style) for name in objects for style in styles if spec.concept in (name, style)]
    own = base.encode_prompts([caption(*pair) for pair in pairs])
    judge = load_judge(Path(spec.judges), "development")
    ways = [("shut", n, shut(before, concept, retained, n)) for n in counts]
    ways += [("rece", n, one) for n, one in zip(ROUNDS, rounds(before, concept, surrogate, retained), strict=True)]
    for way, far, after in ways:
        states = own.states.flatten(0, 1).double()
        solved = derived(before, after, states, ridge=RIDGE)
        for name, weight in after.items():
            modules[name].weight.data = weight.float()
        told = own.with_tensors({"states": solved.view_as(own.states).float()})
        how = spec.evaluate.model_dump(include={"steps", "guidance", "solver", "precision"})
        named = judge_pictures(judge, generate_from(base, told, [seed + i for i in range(len(told))], **how))
        seen = named.objects if spec.kind == "object" else named.styles
        yield {
            **{"concept": spec.concept, "way": way, "n": far, "dimensions": concept.shape[1]},
            "retained": apart(before, after, retained, retained),
            "unreached": apart(before, after, states, solved),
            "shown": [sum(one == spec.concept for one in seen), len(seen)],
        }
        for name, weight in before.items():
            modules[name].weight.data = weight.float()


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", default="astronaut,cat,neon")
    parser.add_argument("--shut", default="8,16,24,32,36,40,44,48")
    parser.add_argument("--seed", type=int, default=90188, help="of the first caption's picture; one more for each")
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    project, rows = load_project(), []
    ensure_catalog(project)
    settings = load_settings(project.params, changes={"threads": 1})
    base = load_base(project.base)
    for concept in given.concepts.split(","):
        spec = prepare_spec(concept, AUTO, project=project, settings=settings)
        for row in rows_of(base, spec, [int(one) for one in given.shut.split(",")], given.seed):
            rows.append(row)
            print(json.dumps(row), flush=True)
    write_json(given.json, {"rows": rows, "made_on": made_on()})


if __name__ == "__main__":
    main()
