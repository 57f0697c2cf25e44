"""The search behind the baselines' settings: published methods at learning rates and lengths that fit a small base.

    python benchmarks/baselines.py --json benchmarks/results/baselines.json [--methods esd-x,uce] [--concepts cat,neon]
    python benchmarks/baselines.py --project data/wide --json FILE --methods uce --concepts zebra,grapes

Published learning rates and steps are for Stable Diffusion, and a baseline that fails because of them says nothing.
Each method is tried at every cell of its grid (its own settings alone; what the paper fixes stays) on an object and a
style, and the cell with the best mean of UA, IRA and CRA is taken, the lower drift where cells tie: what the
comparison itself reports, so that the choice favours the baseline. Judge ``development``; the comparison's is
``report``. A cell that forgets less than half of the first concept is not tried on the next. Rows already in the file
are not made again. On a catalog of many objects the pictures are those of
``fade benchmark wide``, its neighbours among the rest.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from fade.adapters.store import activate, apply_adapter, restore_base
from fade.asking.prepare import AUTO, prepare_spec
from fade.config import load_settings
from fade.data.catalog import find_concept, load_concepts
from fade.evaluation.accuracy import canvas_protocol, drift, naming_none, summary
from fade.evaluation.judges import load_judge
from fade.evaluation.neighbours import find_neighbours
from fade.evaluation.wide import MANY, wide_protocol
from fade.files import read_json, write_json
from fade.lineage import made_on
from fade.methods.plain_fade import PAPER_SETTINGS
from fade.methods.registry import find_method
from fade.models.base import Base
from fade.models.family import load_base
from fade.models.generate import generate
from fade.project import Project, load_project
from fade.spec import Spec, save_spec
from fade.steps.adapter import make_adapter, material
from fade.steps.catalog import ensure_catalog
from fade.steps.drawn import domains, named_by
from fade.steps.mask import mask
from fade.steps.saliency import saliency
from fade.steps.split import split

PLAIN = "plain-fade"
GRID: dict[str, list[dict[str, Any]]] = {
    "esd-x": [
        {"batch": 8, "learning_rate": 2e-4},
        {"batch": 4, "learning_rate": 1e-4},
        {"batch": 4, "learning_rate": 1e-4, "steps": 300},
    ],
    "esd-u": [
        {"batch": 4, "learning_rate": 5e-5},
        {"batch": 4, "learning_rate": 2e-5},
        {"batch": 4, "learning_rate": 2e-5, "steps": 300},
    ],
    "uce": [
        {},
        {"erase_scale": 3.0},
        {"erase_scale": 10.0},
        {"erase_scale": 30.0},
        {"erase_scale": 100.0},
    ],
    "ca": [
        {"learning_rate": 1e-3},
        {"learning_rate": 3e-4},
    ],
    "salun": [
        {"learning_rate": 1e-4},
        {"learning_rate": 5e-5},
    ],
    "spm": [
        {"learning_rate": 1e-3},
        {"learning_rate": 3e-4},
        {"learning_rate": 1e-2},
        {"learning_rate": 1e-2, "anchoring": 100.0},
        {"learning_rate": 1e-3, "anchoring": 1.0},
        {"learning_rate": 3e-3, "anchoring": 1.0},
    ],
    "receler": [
        {"learning_rate": 1e-3},
        {"learning_rate": 3e-4},
    ],
    "adv-unlearn": [
        {"learning_rate": 1e-4},
        {"learning_rate": 2e-4},
        {"learning_rate": 2e-4, "retain_weight": 4.0},
    ],
    "stereo": [
        {"learning_rate": 1e-4},
        {"learning_rate": 2e-4},
        {"learning_rate": 3e-4},
    ],
    "rece": [
        {},
        {"erase_scale": 10.0},
        {"erase_scale": 30.0},
        {"erase_scale": 30.0, "derived_ridge": 1.0},
    ],
    "mace": [
        {},
        {"preserve_scale": 0.3},
        {"preserve_scale": 0.1},
        {"rank": 4},
    ],
    PLAIN: [
        {},
        {"distill.learning_rate": 2e-3, "distill.forget_weight": 1.0},
    ],
}
"""By method, what is tried: changes of its defaults; of plain FADE, of the paper's settings."""
SEEDS = (188, 288)
TRIED_ON = 0.5
"""The UA on one concept from which a cell is tried on the next."""


class Check:
    """Draws and judges a base as it is now: the concept's prompts at two seeds, the rest at one."""

    def __init__(self, base: Base, spec: Spec) -> None:
        concepts = load_concepts(Path(spec.catalog))
        self._sd, self._request = base, spec
        self._concept = find_concept(concepts, spec.concept)
        names = domains(concepts)
        if len(names[0]) > MANY:
            near = find_neighbours(base, self._concept, None, concepts.values(), count=8)
            parts = wide_protocol(self._concept, None, near, names, SEEDS)
            named, rest = parts["concept"], pd.concat([parts["neighbours"], parts["rest"]])
        else:
            everything = canvas_protocol(*names, SEEDS)
            rest = naming_none(everything, [self._concept])
            named = everything[~everything.index.isin(rest.index)]
            rest = rest[rest["seed"] == SEEDS[0]]
        self._rows = pd.concat([named, rest], ignore_index=True)
        self._kept = self._rows.index >= len(named)
        self._judge = load_judge(Path(spec.judges), "development")
        self._before = self._drawn()

    def _drawn(self) -> Any:
        how = self._request.evaluate
        parts = generate(
            self._sd,
            self._rows["prompt"].tolist(),
            self._rows["seed"].tolist(),
            batch=len(self._rows),
            steps=how.steps,
            guidance=how.guidance,
            solver=how.solver,
            precision=how.precision,
        )
        return np.concatenate(list(parts))

    def figures(self) -> dict[str, float]:
        """UA, IRA, CRA and drift."""
        pictures = self._drawn()
        seen = named_by(self._judge, pictures, self._rows)
        found = summary(seen, [(self._concept, None)], [])
        rates = {name: rate.value for name, rate in found.rates.items()}
        return rates | {"drift": drift(self._before[self._kept], pictures[self._kept])}


def tried(project: Project, concept: str, methods: list[str], known: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for every cell of the methods' grids that is not known yet."""
    done = {(row["method"], _cell(row)) for row in known if row["concept"] == concept}
    cells = [(method, changes) for method in methods for changes in GRID[method]]
    weak = {(row["method"], _cell(row)) for row in known if row["ua"] < TRIED_ON}
    cells = [(m, of) for m, of in cells if (m, _cell({"settings": _full(m, of)})) not in done | weak]
    if not cells:
        return
    with tempfile.TemporaryDirectory() as temporary:
        request = _request(project, concept, {})
        torch.set_num_threads(request.threads)
        base = load_base(request.base, expected_sha256=request.base_sha256)
        check, folder = Check(base, request), Path(temporary) / "splits"
        save_spec(request, folder)
        split(folder)
        given = material(base, request, folder)
        _ = given.forget, given.anchor, given.retain  # encoded here: no cell's time is spent on it
        for method, changes in cells:
            begun = time.process_time()
            if method == PLAIN:
                _plain_fade(base, project, concept, changes, Path(temporary))
            else:
                maker, how = find_method(method), request.distill
                for _ in maker.make(base, given, maker.checked(changes), precision=how.precision, seed=how.seed):
                    pass
            seconds = round(time.process_time() - begun, 1)  # one thread: what it takes where nothing else runs
            row = {"method": method, "concept": concept, "settings": _full(method, changes), **check.figures()}
            restore_base(base)
            yield row | {"cpu_seconds": seconds}


def _full(method: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a cell, so that a row says what it was whatever the defaults are later."""
    if method == PLAIN:
        return {**PAPER_SETTINGS, **changes}
    return dict(find_method(method).checked(dict(changes)))


def _cell(row: Mapping[str, Any]) -> str:
    return json.dumps(row["settings"], sort_keys=True)


def _request(project: Project, concept: str, changes: Mapping[str, Any]) -> Spec:
    settings = load_settings(project.params, changes={"threads": 1, **changes})
    return prepare_spec(concept, AUTO, project=project, settings=settings)


def _plain_fade(base: Base, project: Project, concept: str, changes: Mapping[str, Any], root: Path) -> None:
    folder = root / str(len(list(root.iterdir())))
    save_spec(_request(project, concept, {**PAPER_SETTINGS, **changes}), folder)
    split(folder)
    saliency(folder)
    mask(folder)
    for _ in make_adapter(folder):
        pass
    apply_adapter(base, folder / "adapter", name="plain")
    activate(base, {"plain": 1.0})


def best(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By method, the cell with the best mean of UA, IRA and CRA over the concepts, then the least drift."""
    table = pd.DataFrame([{**row, "cell": _cell(row)} for row in rows])
    table["mean"] = table[["ua", "ira", "cra"]].mean(axis=1)
    cells = table.groupby(["method", "cell"], sort=False)
    means = cells[["mean", "ua", "ira", "cra", "drift"]].mean().assign(count=cells.size()).reset_index()
    means = means[means["count"] == means.groupby("method")["count"].transform("max")]
    means = means.sort_values(["mean", "drift"], ascending=[False, True])
    return {
        own["method"]: {"settings": json.loads(own["cell"]), **{n: own[n] for n in ("ua", "ira", "cra", "drift")}}
        for own in means.drop_duplicates("method").to_dict("records")
    }


def main() -> None:
    """Try what is not in the file yet, and write it after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--methods", default=",".join(GRID))
    parser.add_argument("--concepts", default="cat,neon")
    parser.add_argument("--project", type=Path, default=None, help="a project's folder; the canvas if not given")
    given = parser.parse_args()
    project = load_project() if given.project is None else load_project(given.project)
    ensure_catalog(project)
    rows = read_json(given.json)["rows"] if given.json.is_file() else []
    for concept in given.concepts.split(","):
        for row in tried(project, concept, given.methods.split(","), rows):
            rows.append(row)
            write_json(given.json, {"rows": rows, "best": best(rows), "made_on": made_on()})
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
