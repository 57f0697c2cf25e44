"""The wide benchmark: methods x concepts of a catalog with hundreds of them, each erased alone.

Each erasure is a process of its own under ``data/trials/wide``; what the same code has finished is not run again.
``data/studies/<name>/`` gets rows.json, table.md and, where all have a surrogate, tradeoff.png.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from fade.asking.prepare import AUTO, prepare_spec
from fade.config import OUR_METHOD, load_settings
from fade.data.catalog import load_concepts
from fade.errors import ConfigError, DataError
from fade.evaluation.wide import wide_scatter
from fade.files import read_json, write_json, writing
from fade.lineage import made_on
from fade.methods.registry import asking_for
from fade.project import Project
from fade.seeding import derive_seed
from fade.spec import Spec, save_spec
from fade.studies.trial import TRIALS
from fade.studies.wide import FIGURES
from flows.studies.study import STUDIES

OURS = "ours"
"""The method whose settings are the project's own, as they come."""
ROOT = TRIALS / "wide"
COLUMNS = (
    *("ua", "reachable_ua", "surrogate_share", "reachable_surrogate", "mush", "base_mush"),
    *("neighbours", "base_neighbours", "ira", "base_ira", "cra", "base_cra", "drift", "harmonic"),
    *("method_seconds", "adapter_bytes", "tries"),
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One erasure of the benchmark; ``method`` as it was asked for."""

    method: str
    spec: Spec

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return ROOT / self.spec.id


@dataclass(frozen=True, slots=True)
class Wide:
    """What the benchmark found: a row an erasure, a line a method, and why others have none."""

    rows: list[dict[str, Any]]
    table: pd.DataFrame
    failures: dict[str, str]
    folder: Path


def drawn_concepts(project: Project, count: int, *, seed: int) -> list[str]:
    """Concepts of the project's catalog drawn at random without repetition, persons left out.

    Raises:
        ConfigError: there are not as many.
    """
    names = sorted(one.name for one in load_concepts(Path(project.catalog)).values() if not one.person)
    if not 1 <= count <= len(names):
        raise ConfigError(f"--random asks for {count} concepts: {project.catalog} has {len(names)}. Ask for fewer.")
    return random.Random(derive_seed(seed, "wide benchmark")).sample(names, count)


def plan_wide(
    project: Project, methods: Sequence[str], concepts: Sequence[str], *, changes: Mapping[str, Any]
) -> list[Entry]:
    """Every method with every concept; all are checked before any runs.

    A surrogate that is not given is found as ``ours`` finds it, once for all methods: it is no part of a method, and a
    better one makes any of them better.

    Args:
        methods: ``ours`` for the project's settings as they come, or as ``fade benchmark canvas --methods`` takes them.
        concepts: names, each alone or with its surrogate after a colon.

    Raises:
        ConfigError: an unknown method, concept or setting, or one given twice.
    """
    names = [OUR_METHOD if name == OURS else name for name in methods]
    asked_of = asking_for(names, changes)
    *_, ours = asking_for([*names, OUR_METHOD], changes)
    for method, asked in [*zip(methods, asked_of, strict=True), (OURS, ours)]:
        if method == OURS:
            del asked["method"]  # whoever names a method takes its settings as they stand
    *of_method, finding = (load_settings(project.params, changes=one) for one in [*asked_of, ours])
    given = [tuple(part.strip() for part in one.partition(":")[::2]) for one in concepts]
    pairs = [
        (concept, surrogate or prepare_spec(concept, AUTO, project=project, settings=finding).surrogate)
        for concept, surrogate in given
    ]
    entries = [
        Entry(method, prepare_spec(concept, surrogate, project=project, settings=settings))
        for method, settings in zip(methods, of_method, strict=True)
        for concept, surrogate in pairs
    ]
    if len({entry.spec.id for entry in entries}) < len(entries):
        raise ConfigError("Two erasures of the benchmark are the same: a method or a concept was given twice.")
    return entries


def run_wide_benchmark(
    name: str, entries: Sequence[Entry], *, parallel: int = 1, say: Callable[[str], None] | None = None
) -> Wide:
    """Run what is not there yet; write the study's folder.

    Raises:
        DataError: not one erasure ended with figures; the first reason is in the message.
    """

    def one(entry: Entry) -> dict[str, Any] | str:
        found = _run(entry)
        if say is not None:
            say(f"{entry.method} {entry.spec.concept}: {found if isinstance(found, str) else _shown(found)}")
        return found

    for entry in entries:
        save_spec(entry.spec, entry.folder)
    with ThreadPoolExecutor(max_workers=parallel) as pool:
        outcomes = list(pool.map(one, entries))
    rows, failures = [], {}
    for entry, outcome in zip(entries, outcomes, strict=True):
        if isinstance(outcome, str):
            failures[f"{entry.method} {entry.spec.concept}"] = outcome
        else:
            rows.append({"method": entry.method, **outcome})
    if not rows:
        raise DataError(f"No erasure of the benchmark ended: {next(iter(failures.values()))}")
    table = wide_table(rows)
    folder = STUDIES / name
    with writing(folder) as temporary:
        temporary.mkdir(parents=True)
        write_json(temporary / "rows.json", {"rows": rows, "failures": failures, "made_on": made_on()})
        (temporary / "table.md").write_text(table.to_markdown(index=False, floatfmt=".4g") + "\n", encoding="utf-8")
        if all({"surrogate_share", "neighbours"} <= set(row) for row in rows):
            wide_scatter(rows).savefig(temporary / "tradeoff.png", dpi=110, metadata={"Software": None})
    return Wide(rows, table, failures, folder)


def wide_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """A line a method: how many erasures, the mean of each figure, and the worst UA of what is reachable."""
    single = pd.DataFrame(rows)
    lines = []
    for method, own in single.groupby("method", sort=False):
        line: dict[str, Any] = {"method": method, "erasures": len(own)}
        line |= {name: float(own[name].mean()) for name in COLUMNS if name in own and own[name].notna().any()}
        if "reachable_ua" in own:
            line["worst_ua_of_reachable"] = float((own["ua"] / own["reachable_ua"].clip(lower=1e-9)).min())
        lines.append(line)
    return pd.DataFrame(lines)


def _shown(row: Mapping[str, Any]) -> str:
    parts = [f"{name} {row[name]:.1%}" for name in ("ua", "surrogate_share", "neighbours", "ira", "cra") if name in row]
    return ", ".join([*parts, f"drift {row['drift']:.3f}"])


def _run(entry: Entry) -> dict[str, Any] | str:
    """The row of an erasure, made in a process of its own, or why there is none."""
    log = entry.folder.with_suffix(".log")
    command = [sys.executable, "-m", "fade.studies.wide", str(entry.folder)]
    with log.open("w", encoding="utf-8") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if status != 0:
        last = (log.read_text(encoding="utf-8").strip().splitlines() or [f"exit status {status}"])[-1]
        return f"{last} (whole log: {log})"
    return read_json(entry.folder / FIGURES)
