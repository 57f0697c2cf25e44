"""Contest: methods x concepts x seeds on one protocol, as a study that goes on where it was stopped.

Each erasure is a trial in a process of its own; what the same code has finished is not run again.
``data/studies/<name>/`` gets rows.parquet, table.md, scatter.png, summary.json and, with ``sequential``,
sequence.parquet and sequence.png.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.task_runners import ThreadPoolTaskRunner

from fade.asking.prepare import AUTO, prepare_spec
from fade.config import OUR_METHOD, load_settings, one_seed
from fade.data.catalog import load_concepts
from fade.errors import ConfigError, DataError, nearest
from fade.evaluation.contest import COLUMNS, contest_markdown, contest_table, scatter_figure, sequence_figure
from fade.evaluation.measured import Combination
from fade.evaluation.records import load
from fade.files import read_json, write_json, writing
from fade.lineage import made_on
from fade.methods.registry import PRESETS, asking_for
from fade.project import Project
from fade.spec import Spec, save_spec
from fade.steps.alike import COMBINATIONS
from fade.steps.attacks import KINDS
from fade.steps.catalog import ensure_catalog
from fade.studies.trial import TRIALS
from flows.studies.study import SIX, STUDIES, run_trials
from tasks.mlflow import runs
from tasks.trials import TrialError

SEQUENCE = (
    *("astronaut", "neon", "cat", "oil", "motorcycle", "mosaic"),
    *("coffee", "sketch", "rocket", "thermal", "retina", "emboss"),
)
"""Twelve concepts of both domains in turn, for the experiment of one erasure on top of another."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One erasure of a contest."""

    method: str
    seed: int | None
    spec: Spec
    folder: Path


def plan_contest(
    methods: Sequence[str],
    concepts: Sequence[str] | None,
    *,
    seeds: Sequence[int] | None = None,
    changes: Mapping[str, Any] | None = None,
    together: bool = False,
    project: Project,
) -> list[Entry]:
    """Every method with every concept and seed; all are checked before any runs.

    Args:
        methods: by the registry's names, or ``module:NAME`` of one's own.
        concepts: names, each alone or with its surrogate after a colon; of the canvas six named ones (twelve if
            ``together``), of another project all, if None.
        changes: settings that are the same for all methods, e.g. ``threads``; ``esd-x.steps`` is a method's own.
        together: the erasures will be live at once: ``auto`` takes none of their concepts for a surrogate.

    Raises:
        ConfigError: an unknown method, concept or setting, or one given twice.
    """
    ensure_catalog(project)
    entries = []
    given_concepts = concepts or _named_concepts(project, together=together)
    # One that is erased too may not be what another gives way to, or its own erasure would come undone.
    protected = [given.partition(":")[0].strip() for given in given_concepts] if together else []
    wanted: Sequence[int | None] = seeds or [None]
    for seed in wanted:
        # Every method is judged on the same pictures, whatever its figures: the gate draws no more of them.
        same = {"gate.sure": None, **(changes or {})}
        if seed is not None:
            same |= one_seed(seed)
        # A method's concepts in turn, not a concept's methods: side by side, two of one concept would both draw what
        # the attacks ask of the base, which the next that comes to it finds.
        for method, asked in zip(methods, asking_for(methods, same), strict=True):
            settings = load_settings(project.params, changes=asked)
            for given in given_concepts:
                concept, _, surrogate = given.partition(":")
                spec = prepare_spec(
                    concept.strip(), surrogate.strip() or AUTO, project=project, settings=settings, protected=protected
                )
                save_spec(spec, TRIALS / spec.id)
                entries.append(Entry(method, seed, spec, TRIALS / spec.id))
    if len({entry.folder for entry in entries}) < len(entries):
        raise ConfigError("Two erasures of the contest are the same: a method, concept or seed was given twice.")
    return entries


def _named_concepts(project: Project, *, together: bool) -> Sequence[str]:
    if project.render == "canvas":
        return SEQUENCE if together else SIX
    return list(load_concepts(Path(project.catalog)))


@dataclass(frozen=True, slots=True)
class Contest:
    """What a contest found; ``markdown`` is the table with the text under it."""

    rows: list[dict[str, Any]]
    failures: dict[str, str]
    folder: Path
    markdown: str


def run_contest(
    name: str,
    entries: Sequence[Entry],
    *,
    attacks: Sequence[str],
    parallel: int,
    dask: str | None = None,
    sequential: bool = False,
) -> Contest:
    """Run a contest, write its folder, log it to MLflow's experiment ``studies``.

    Raises:
        ConfigError: no such attack.
        DataError: not one erasure ended with figures.
    """
    if unknown := [kind for kind in attacks if kind not in KINDS]:
        raise ConfigError(f"No attack {unknown[0]!r}. {nearest(unknown[0], KINDS)}")
    outcomes = run_trials(name, [entry.folder for entry in entries], attacks=attacks, parallel=parallel, dask=dask)
    rows, failures = [], {}
    for entry, outcome in zip(entries, outcomes, strict=True):
        if isinstance(outcome, str):
            failures[_named(entry)] = outcome
        else:
            named = {"method": entry.method, "seed": entry.spec.distill.seed, "erasure": entry.folder.name}
            rows.append({**named, **outcome})
    if not rows:
        raise DataError(f"No erasure of the contest ended: {next(iter(failures.values()))}")
    points = None
    if sequential and (chains := _chains(entries, failures)):
        runner: Any = ThreadPoolTaskRunner(max_workers=parallel)
        points = pd.DataFrame(sequence.with_options(task_runner=runner)(name, chains))
    base = {key: _mean(rows, f"base_{key}") for key in COLUMNS if any(f"base_{key}" in row for row in rows)}
    base = {key: value for key, value in base.items() if key != "relearning"}
    table = contest_table(rows)
    markdown = contest_markdown(
        table, ours=[method for method in (OUR_METHOD, *PRESETS) if method in set(table["method"])], base=base
    )
    folder = STUDIES / name
    with writing(folder) as temporary:
        temporary.mkdir(parents=True)
        pd.DataFrame(rows).to_parquet(temporary / "rows.parquet", index=False)
        (temporary / "table.md").write_text(markdown, encoding="utf-8")
        scatter_figure(rows).savefig(temporary / "scatter.png", dpi=130)
        write_json(temporary / "summary.json", {
            "table": [_known(row) for row in table.to_dict("records")],
            "base": base, "failures": failures, "made_on": made_on(),
        })  # fmt: skip
        if points is not None:
            points.to_parquet(temporary / "sequence.parquet", index=False)
            sequence_figure(points).savefig(temporary / "sequence.png", dpi=130)
    runs.log_study(name, folder, table)
    return Contest(rows, failures, folder, markdown)


def _known(row: Mapping[Any, Any]) -> dict[str, Any]:
    """A row without what was not measured: JSON has no such number."""
    return {str(key): value for key, value in row.items() if pd.notna(value)}


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    values = [row[key] for row in rows if key in row]
    return float(sum(values) / len(values))


def _chains(entries: Sequence[Entry], failures: Mapping[str, str]) -> dict[str, list[Path]]:
    """By method, the folders of its erasures of the first seed, in order; a method of which one failed has none."""
    first = entries[0].seed
    chains: dict[str, list[Path]] = {}
    broken = {entry.method for entry in entries if _named(entry) in failures}
    for entry in entries:
        if entry.seed == first and entry.method not in broken:
            chains.setdefault(entry.method, []).append(entry.folder)
    return chains


def _named(entry: Entry) -> str:
    return f"{entry.method} {entry.spec.concept}" + ("" if entry.seed is None else f" seed {entry.seed}")


@flow(name="sequence", flow_run_name="sequence-{name}")
def sequence(name: str, chains: dict[str, list[Path]]) -> list[dict[str, Any]]:
    """Erasures live on top of one another, one more each time, judged together.

    Each was made against the base alone, by ours and by published methods: differences are added, none is trained on
    top of another. A published method that edits the edited model again may fare otherwise.
    """
    asked = [(method, folders[:n]) for method, folders in chains.items() for n in range(1, len(folders) + 1)]
    futures = [together.submit(folders) for _, folders in asked]
    points = []
    for (method, folders), future in zip(asked, futures, strict=True):
        points.append({"method": method, "erased": len(folders), **future.result()})
    return points


@task(name="together", cache_policy=NO_CACHE)
def together(folders: list[Path]) -> dict[str, Any]:
    """UA (of all that is erased), IRA and CRA of erasures live together; measured once.

    Raises:
        TrialError: the combination could not be judged, with its reason.
    """
    # The adapters' hashes name it: a trial that other code made anew is another combination.
    hashes = [read_json(folder / "adapter" / "card.json")["adapter_sha256"] for folder in folders]
    out = COMBINATIONS / f"t{hashlib.sha256(''.join(hashes).encode()).hexdigest()[:15]}"
    if not (out / "metrics.json").is_file():
        command = [sys.executable, "-m", "fade.steps.combine", str(out), *map(str, folders)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise TrialError(f"{len(folders)} erasures could not be judged together: {last}")
    after = load(Combination, out / "metrics.json").report.after
    return {name: found.value for name, found in after.rates.items()}
