"""Class-wise protocols: of a set of labelled pictures (Imagenette, LFW, dog breeds, SUN ...) one class is erased.

UA is of the erased class's prompts and IRA of all other classes'; there is a CRA only where the set has styles. The
judges are the user's, or are trained here on the set's real pictures, and their accuracy on pictures that they have
not seen is told beside every figure. Each erasure is a trial of a study, so a protocol goes on where it was stopped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fade.asking.prepare import AUTO
from fade.concepts import Concept
from fade.config import EvaluateSettings
from fade.data.catalog import find_concept, load_concepts
from fade.data.splits import NOTHING
from fade.errors import ConfigError, DataError
from fade.evaluation.figures import JudgesReport, rate
from fade.evaluation.judges import check_known
from fade.evaluation.records import as_json, load
from fade.files import write_json
from fade.project import Project
from fade.steps.drawn import domains
from fade.steps.evaluate import further_seeds
from fade.steps.train import Progress, judges_identity, train_judges
from flows.studies.study import Cell, Study, plan, run_study

CLASSIFIERS = Path("data/classifiers")
PICTURES = 50
"""Pictures that a class is judged by, unless another number is asked for."""


@dataclass(frozen=True, slots=True)
class Protocol:
    """What is erased, and by whom it is judged."""

    name: str
    cells: list[Cell]
    judges: Path


def plan_classes(
    project: Project,
    forget: Sequence[str] | None,
    *,
    pictures: int = PICTURES,
    changes: Mapping[str, Any] | None = None,
) -> Protocol:
    """An erasure a class; everything is checked before any of them runs.

    Args:
        project: its catalog is the set of classes, and its judges know them.
        forget: classes, each alone or with its surrogate after a colon; every class of the set if None. Where only
            persons are left to choose from, ``auto`` becomes ``nothing``: nobody's face stands in for another's.
        pictures: drawn and judged of every class, at least.

    Raises:
        ConfigError: no such class, or the set has fewer than two; or the judges do not know it.
        DataError: no catalog, or no judges.
    """
    catalog, judges = Path(project.catalog), Path(project.judges)
    concepts = load_concepts(catalog)
    objects, styles = domains(concepts)
    if len(objects) < 2:
        raise ConfigError(f"{catalog} has {len(objects)} class: IRA is of the others, so two are needed at least.")
    check_known(judges, concepts.values(), catalog=catalog)
    pairs = []
    for given in forget or objects:
        name, _, surrogate = given.partition(":")
        concept = find_concept(concepts, name.strip())
        pairs.append((concept.name, surrogate.strip() or _surrogate(concept, concepts)))
    own = EvaluateSettings().seeds
    count = math.ceil(pictures / max(1, len(styles)))
    seeds = [*own, *further_seeds(own, count)][:count]
    # Every class is judged on as many pictures, whatever its figures: the gate draws no more of them.
    same = {"gate.sure": None, "evaluate.seeds": seeds, **(changes or {})}
    cells = plan(pairs, vary={}, changes=same, project=project)
    return Protocol(f"classes-{catalog.name}", cells, judges)


def _surrogate(concept: Concept, concepts: Mapping[str, Concept]) -> str:
    others = [one for one in concepts.values() if one.kind == concept.kind and one != concept and not one.person]
    return AUTO if others else NOTHING


def judges_for(catalog: Path, params: Mapping[str, Any]) -> tuple[Path, Any]:
    """Where the judges of a catalog's pictures lie, and the training that makes them (nothing if they are there).

    The folder is named by the pictures and settings: a set that has grown gets judges of its own.
    """
    out = CLASSIFIERS / f"{catalog.name}-{judges_identity(catalog, dict(params))[:8]}"
    nothing: Sequence[Progress] = ()
    return out, iter(nothing) if (out / "metrics.json").is_file() else train_judges(catalog, out, params=dict(params))


def run_classes(
    protocol: Protocol, *, attacks: Sequence[str] = (), parallel: int = 1, dask: str | None = None
) -> tuple[Study, dict[str, Any]]:
    """Run a protocol; write its study, with ``classes.json``, and give the study and that report.

    The report: ``rows`` (figures of each class, with what the base reaches), ``summary`` (mean and worst of UA and
    IRA, and the pooled interval), ``judges`` (their accuracy on unseen real pictures, None where it is not known).
    """
    study = run_study(protocol.name, protocol.cells, attacks=attacks, parallel=parallel, dask=dask)
    known = protocol.judges / "metrics.json"
    report = {
        "rows": study.rows,
        "summary": class_summary(study.rows),
        "judges": as_json(load(JudgesReport, known)) if known.is_file() else None,
        "failures": study.failures,
    }
    write_json(study.folder / "classes.json", report)
    return study, report


def class_summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and worst over the classes, with the interval of all pictures pooled.

    Raises:
        DataError: no rows.
    """
    if not rows:
        raise DataError("A mean over 0 classes is no figure: no erasure has ended.")
    found: dict[str, Any] = {"classes": len(rows)}
    for name in ("ua", "ira"):
        hits = round(sum(row[name] * row[f"{name}_count"] for row in rows))
        pooled = rate(hits, sum(row[f"{name}_count"] for row in rows))
        values, base = [row[name] for row in rows], [row[f"base_{name}"] for row in rows]
        found[name] = {
            "mean": float(np.mean(values)),
            "worst": min(values),
            "low": pooled.low,
            "high": pooled.high,
            "base": float(np.mean(base)),
        }
    return found
