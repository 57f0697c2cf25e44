"""Studies: many erasures compared. ``sweep`` goes over settings, ``benchmark`` over concepts.

A study's erasures are trials under ``data/trials``; one that the same code has finished is not run
again, so a study that was stopped goes on where it was, and studies share what they have in common.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import numpy as np
import pandas as pd
from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.futures import as_completed
from tqdm import tqdm

from fade.asking.prepare import AUTO, prepare_spec
from fade.config import load_settings, one_seed
from fade.data.catalog import load_concepts
from fade.errors import ConfigError, DataError
from fade.evaluation.figures import rate
from fade.evaluation.tradeoff import means, tradeoff_figure
from fade.files import write_json, writing
from fade.lineage import made_on
from fade.models.sharing import bases_shared
from fade.project import Project
from fade.spec import Spec, save_spec
from fade.steps.catalog import ensure_catalog
from fade.studies.trial import TRIALS
from flows.prefect_beside import beside_is_up
from flows.studies.runners import side_by_side
from tasks.mlflow import runs
from tasks.trials import trial

STUDIES = Path("data/studies")
RESULTS = Path("benchmarks/results")
SIX = ("astronaut", "cat", "motorcycle", "neon", "oil", "mosaic")
"""The named concepts where a table over all of them would take too long: a person, an animal, a thing, three styles."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One erasure of a study: its spec, and the values of the settings that the study varies."""

    spec: Spec
    varied: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """Where its trial lies."""
        return TRIALS / self.spec.id


@dataclass(frozen=True, slots=True)
class Study:
    """What a study found.

    Attributes:
        rows: figures of each erasure (``fade.studies.trial.figures``) with the varied settings.
        failures: message by erasure id, for those that ended without figures.
        folder: ``rows.json``, ``table.md``, ``tradeoff.png``.
    """

    rows: list[dict[str, Any]]
    failures: dict[str, str]
    folder: Path
    table: pd.DataFrame


def plan(
    pairs: Sequence[tuple[str, str]],
    *,
    vary: Mapping[str, Sequence[Any]],
    changes: Mapping[str, Any],
    project: Project,
    **asked: Any,
) -> list[Cell]:
    """Every pair of concept and surrogate with every combination of values; all are checked before any runs.

    Args:
        pairs: concept and surrogate (``auto`` chooses one).
        vary: values by dotted setting name; ``seed`` stands for the seeds of split, saliency and distillation.
        changes: settings that are the same in all.
        asked: passed on to ``prepare_spec``.

    Raises:
        ConfigError: a setting, value, concept or surrogate is wrong, or there is nothing to do.
    """
    ensure_catalog(project)
    cells = []
    for values in itertools.product(*vary.values()):
        varied = dict(zip(vary, values, strict=True))
        # What is compared is judged on the same pictures, whenever the gate is sure.
        given = {"evaluate.whole": True, **changes, **varied}
        if "seed" in given:
            given |= one_seed(given.pop("seed"))
        settings = load_settings(project.params, changes=given)
        for concept, surrogate in pairs:
            cells.append(Cell(prepare_spec(concept, surrogate, project=project, settings=settings, **asked), varied))
    if not cells:
        raise ConfigError("A study needs at least one concept and, for each varied setting, one value.")
    if len({cell.spec.id for cell in cells}) < len(cells):
        raise ConfigError("Two erasures of the study are the same: a concept or a value was given twice.")
    return cells


def run_study(
    name: str,
    cells: Sequence[Cell],
    *,
    attacks: Sequence[str] = (),
    parallel: int,
    dask: str | None = None,
    one_base: bool = False,
) -> Study:
    """Run a study's erasures, write its table and picture under ``data/studies/<name>``, log it to MLflow.

    Args:
        parallel: erasures at once on this machine.
        dask: address of a cluster whose workers run them instead; see ``flows.studies.runners``.
        one_base: in this process, all on one copy of the base.

    Raises:
        DataError: not one erasure ended with figures; the first reason is in the message.
    """
    for cell in cells:
        save_spec(cell.spec, cell.folder)
    folders = [cell.folder for cell in cells]
    found = run_trials(name, folders, attacks=attacks, parallel=parallel, dask=dask, one_base=one_base)
    rows, failures = [], {}
    for cell, outcome in zip(cells, found, strict=True):
        if isinstance(outcome, str):
            failures[cell.spec.id] = outcome
        else:
            rows.append({**cell.varied, **outcome, "erasure": cell.spec.id})
    if not rows:
        raise DataError(f"No erasure of the study ended: {next(iter(failures.values()))}")
    varied = list(cells[0].varied)
    table = means(rows, varied)
    folder = STUDIES / name
    with writing(folder) as temporary:
        temporary.mkdir(parents=True)
        write_json(temporary / "rows.json", {"rows": rows, "failures": failures, "made_on": made_on()})
        (temporary / "table.md").write_text(table.to_markdown(index=False, floatfmt=".4g") + "\n", encoding="utf-8")
        tradeoff_figure(rows, varied).savefig(temporary / "tradeoff.png", dpi=130)
    runs.log_study(name, folder, table)
    return Study(rows, failures, folder, table)


def run_trials(
    name: str,
    folders: Sequence[Path],
    *,
    attacks: Sequence[str],
    parallel: int,
    dask: str | None = None,
    one_base: bool = False,
) -> list[dict[str, Any] | str]:
    """Run trials, ``parallel`` at a time or on a Dask cluster; gives each one's figures, or why it has none.

    Raises:
        ConfigError: one copy of the base is asked for on a cluster.
    """
    if one_base and dask is not None:
        raise ConfigError("--one-base is for erasures in one process; --dask gives each a process of its own.")
    beside_is_up()
    run = study.with_options(task_runner=side_by_side(parallel, dask))
    with bases_shared() if one_base else nullcontext():
        return run(name, list(folders), list(attacks), elsewhere=dask is not None, one_base=one_base)


@flow(name="study", flow_run_name="study-{name}")
def study(
    name: str, folders: list[Path], attacks: list[str], elsewhere: bool = False, one_base: bool = False
) -> list[dict[str, Any] | str]:
    """The trials of a sweep, a benchmark or a contest.

    Args:
        elsewhere: they run on other machines, from where their steps cannot be told to the bar.
        one_base: they run in this process.
    """
    with _progress(name, len(folders)) as bar:
        say = None if elsewhere else bar.set_postfix_str
        futures = [trial.submit(folder, attacks=attacks, here=one_base, say=say) for folder in folders]
        for future in as_completed(futures):
            future.wait()
            bar.update()
    outcomes: list[dict[str, Any] | str] = []
    for future in futures:
        outcome = future.result(raise_on_failure=False)
        outcomes.append(str(outcome) if isinstance(outcome, BaseException) else outcome)
    rows = [outcome for outcome in outcomes if not isinstance(outcome, str)]
    if rows:
        shown = pd.DataFrame(rows)[["ua", "ira", "cra", "drift", "adapter_bytes", "method_seconds"]]
        # A key holds small letters, digits and dashes alone; a study's name may hold more.
        key = "study-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        create_markdown_artifact(shown.to_markdown(floatfmt=".4g"), key=key, description="figures")
    return outcomes


class _Bar(tqdm):
    """A bar on a terminal that also moves a Prefect artifact."""

    artifact: UUID

    def update(self, n: float | None = 1) -> bool | None:
        shown: bool | None = super().update(n)
        update_progress_artifact(self.artifact, progress=100.0 * self.n / max(self.total, 1))
        return shown


@contextmanager
def _progress(name: str, total: int) -> Iterator[_Bar]:
    with _Bar(total=total, desc=name, disable=None) as bar:
        bar.artifact = cast("UUID", create_progress_artifact(progress=0.0, description=name))
        yield bar


def all_pairs(project: Project, concepts: Sequence[str] | None) -> list[tuple[str, str]]:
    """Concepts, all of the project's catalog if none are named, each with a surrogate chosen by ``auto``."""
    ensure_catalog(project)
    return [(name, AUTO) for name in concepts or load_concepts(Path(project.catalog))]


def benchmark_report(rows: Sequence[dict[str, Any]], cells: Sequence[Cell]) -> dict[str, Any]:
    """A benchmark's rows and their summary, JSON-ready.

    Each row: concept, kind (``object`` or ``style``), surrogate, ua, ira, cra with ``_low`` and ``_high``
    (fractions of 1; report judge; 95 %, Wilson), base_ira, base_cra, drift, seconds (saliency, mask and
    distillation), adapter_bytes; inversion and base_inversion if attacked. The summary has means and
    worsts; the interval of a mean is that of all its pictures pooled.
    """
    kinds = {cell.spec.id: cell.spec.kind for cell in cells}
    shown = [{**row, "kind": kinds[row["erasure"]], "seconds": row["method_seconds"]} for row in rows]
    summary: dict[str, Any] = {"erasures": len(rows)}
    for name in ("ua", "ira", "cra"):
        count = sum(row[f"{name}_count"] for row in rows)
        pooled = rate(round(sum(row[name] * row[f"{name}_count"] for row in rows)), count)
        summary[name] = {
            "mean": float(np.mean([row[name] for row in rows])),
            "low": pooled.low,
            "high": pooled.high,
            "worst": min(row[name] for row in rows),
        }
    for name in ("ira", "cra"):
        losses = [row[f"base_{name}"] - row[name] for row in rows]
        summary[name] |= {"mean_loss": float(np.mean(losses)), "worst_loss": max(losses)}
    for name in ("drift", "seconds", "adapter_bytes", "inversion", "base_inversion"):
        values = [row[name] for row in shown if name in row]
        if values:
            summary[name] = {"mean": float(np.mean(values)), "worst": max(values)}
    settings = cells[0].spec
    return {
        "rows": shown,
        "summary": summary,
        "seeds": {
            "evaluate": list(settings.evaluate.seeds),
            "split": settings.split.seed,
            "saliency": settings.saliency.seed,
            "distill": settings.distill.seed,
            "inversion": settings.inversion.seed,
        },
        "threads": settings.threads,
        "made_on": made_on(),
    }
