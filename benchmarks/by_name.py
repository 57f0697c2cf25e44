"""Erasures by name alone, judged afterwards by judges that were not asked: how far can a name and a CLIP be trusted?

    python benchmarks/by_name.py --base data/base/canvas --concepts astronaut,neon --json FILE

Each concept is erased with no catalog and no classifier (``fade erase --by-name``): the base draws, the CLIP judges.
Then the project's own judges look at every pair of the project's catalog, before and after. ``--json`` has a row a
concept, beside those that the file has of other bases, budgets and concepts, and the means of each. ``agreement`` is
the share of those pictures, before and after, of which the CLIP and the judge ``report`` say alike whether they show
the concept, and ``confusion`` counts them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import yaml

from fade.adapters.store import activate, apply_adapter, restore_base
from fade.asking import planned
from fade.asking.budgets import budget_changes
from fade.asking.by_name import prepare_by_name
from fade.asking.planned import Asked
from fade.concepts import CAPTION_TEMPLATE
from fade.config import load_settings
from fade.data.catalog import load_concepts, load_templates
from fade.data.splits import find_pairs
from fade.evaluation.accuracy import canvas_protocol, summary
from fade.evaluation.judges import judge_pictures, load_judge
from fade.evaluation.measured import Evaluation
from fade.evaluation.records import load
from fade.evaluation.zero_shot import open_judge
from fade.files import read_json, write_json
from fade.methods.fade.sparse_lora import computed_whole
from fade.models.base import Base
from fade.models.family import load_base
from fade.pipeline import run, steps_of
from fade.project import Project, load_project
from fade.spec import Spec, save_spec
from fade.steps.catalog import ensure_catalog
from fade.steps.drawn import base_pictures, domains, ended, named_by, pictures_now

OUT = Path("data/trials/by-name")


def erased(asked: Asked, *, project: Project, changes: dict[str, Any]) -> tuple[Spec, Path]:
    """Erase one by name, without DVC, MLflow and Great Expectations."""
    settings = load_settings(
        project.params, changes={**budget_changes(asked.budget, pictures=asked.pictures is not None), **changes}
    )
    # What was planned is no part of this repository.
    with mock.patch.object(planned, "NAMED", OUT / "named"):
        spec = prepare_by_name(asked, project=project, settings=settings).spec
    folder = OUT / spec.id
    save_spec(spec, folder)
    for step in steps_of(spec):
        if step.in_trials and not all((folder / name).exists() for name in step.outputs):
            for _ in run(step, folder):
                pass
    return spec, folder


def row_of(spec: Spec, folder: Path, project: Project, *, seeds: Sequence[int], seconds: float) -> dict[str, Any]:
    """What the project's judges see of an erasure by name, and whether the CLIP saw the same."""
    own = load(Evaluation, folder / "evaluation" / "metrics.json")
    concepts = load_concepts(Path(project.catalog))
    told = spec.model_copy(update={"catalog": project.catalog, "judges": project.judges, "by_name": False})
    ((concept, _),) = find_pairs(concepts, [spec.pairs[0].model_copy(update={"surrogate": "nothing"})])
    template = (load_templates(Path(project.catalog)) or (CAPTION_TEMPLATE,))[0]
    samples = canvas_protocol(*domains(concepts), seeds, template=template)
    base = load_base(spec.base, expected_sha256=spec.base_sha256, weights=spec.weights)
    before = ended(base_pictures(base, told, samples))
    with switched_on(base, folder / "adapter"):
        after = ended(pictures_now(base, told, samples, done=0))
    judge = load_judge(Path(project.judges), "report", called=list(concepts))
    clip = open_judge(folder / "judges", "report")
    was, now = (summary(named_by(judge, pictures, samples), [(concept, None)], []) for pictures in (before, after))
    pictures = np.concatenate([before, after])
    says = [_shows(one, pictures, concept.kind, concept.name) for one in (judge, clip)]
    confusion = pd.crosstab(pd.Series(says[0]), pd.Series(says[1]))
    return {
        "concept": concept.name,
        "kind": concept.kind,
        "surrogate": spec.surrogate,
        "ua": now.ua.value,
        "ira": now.ira.value,
        "cra": now.cra.value,
        "base_ira": was.ira.value,
        "base_cra": was.cra.value,
        "clip_ua": own.report.after.ua.value,
        "agreement": float(np.mean(says[0] == says[1])),
        "confusion": {
            f"judge {a}, clip {b}": int(confusion.get(b, pd.Series(dtype=int)).get(a, 0))
            for a in (True, False)
            for b in (True, False)
        },
        "unjudged": own.gate.verdict == "unjudged",
        "verdict": own.gate.verdict,
        "seconds": round(seconds, 1),
        "pictures": len(samples),
        "folder": str(folder),
    }


def means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over the concepts of each base and budget; agreement and confusions over all their pictures."""
    found = []
    for (base, budget), part in pd.DataFrame(rows).groupby(["base", "budget"], sort=False):
        confusion = pd.DataFrame(part["confusion"].tolist()).sum()
        alike = confusion["judge True, clip True"] + confusion["judge False, clip False"]
        found.append({
            "base": base,
            "budget": budget,
            "concepts": len(part),
            **{name: float(part[name].mean()) for name in ("ua", "ira", "cra", "base_ira", "base_cra", "clip_ua")},
            "agreement": float(alike / confusion.sum()),
            "confusion": {name: int(count) for name, count in confusion.items()},
            "unjudged": int(part["unjudged"].sum()),
            "seconds": float(part["seconds"].mean()),
        })  # fmt: skip
    return found


def _shows(judge: Any, pictures: Any, kind: str, name: str) -> Any:
    seen = judge_pictures(judge, pictures)
    return np.array(seen.objects if kind == "object" else seen.styles) == name


@contextmanager
def switched_on(base: Base, adapter: Path | None) -> Iterator[None]:
    """An adapter on a base until the end; None: the base as it is."""
    if adapter is None:
        yield
        return
    apply_adapter(base, adapter, name="candidate")
    activate(base, {"candidate": 1.0})
    with computed_whole(base.network):
        yield
    restore_base(base)


def main() -> None:
    """Erase and judge each; the file is written after every concept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", help="the project's by default")
    parser.add_argument("--concepts", help="names by commas; every concept of the project's catalog by default")
    parser.add_argument("--clip", default="data/canvas-clip")
    parser.add_argument("--budget", default="normal")
    parser.add_argument("--seeds", default="1188,1288", help="of the pictures that are judged afterwards")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting; repeatable")
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    project = load_project().at(base=given.base)
    ensure_catalog(project)
    names = given.concepts.split(",") if given.concepts else list(load_concepts(Path(project.catalog)))
    known: dict[str, Any] = read_json(given.json) if given.json.is_file() else {"rows": []}
    changes = {name: yaml.safe_load(value) for name, _, value in (one.partition("=") for one in given.set)}
    for name in names:
        begun = time.perf_counter()
        asked = Asked(name, clip=given.clip, budget=given.budget)
        spec, folder = erased(asked, project=project, changes=changes)
        seconds = time.perf_counter() - begun
        seeds = [int(seed) for seed in given.seeds.split(",")]
        asked_as = {"base": project.base, "budget": given.budget, "set": given.set}
        row = {**asked_as, **row_of(spec, folder, project, seeds=seeds, seconds=seconds)}
        rows = [one for one in known["rows"] if any(one[key] != row[key] for key in ("base", "budget", "concept"))]
        known = {**known, "rows": [*rows, row]}
        write_json(given.json, {**known, "means": means([*rows, row])})
        print({key: value for key, value in row.items() if key != "folder"}, flush=True)


if __name__ == "__main__":
    main()
