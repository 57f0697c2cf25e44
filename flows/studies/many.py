"""The wide benchmark of many at once: methods that erase the same N concepts, each by one adapter.

Each erasure is a process of its own under ``data/trials/many``; what the same code has finished is not run again.
``data/studies/<name>/`` gets rows.json, table.md and many.png.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from fade.asking.concepts import in_order
from fade.asking.prepare import AUTO, Wanted, asked_again, prepare_spec
from fade.config import OUR_METHOD, load_settings
from fade.data.catalog import load_concepts
from fade.errors import ConfigError, DataError
from fade.files import read_json, write_json, writing
from fade.lineage import made_on
from fade.methods.registry import asking_for
from fade.models.sharing import bases_shared
from fade.project import Project
from fade.seeding import derive_seed
from fade.spec import Spec, save_spec
from fade.studies.many import ALONE, FIGURES
from fade.studies.trial import TRIALS
from flows.erasing.many import settings_for_many, spec_for_many
from flows.studies.study import STUDIES
from flows.studies.wide import OURS

ROOT = TRIALS / "many"
LEAST_KEPT = 20
COLUMNS = (
    *("erased", "reachable", "surrogate_share", "reachable_surrogate", "mush", "kept", "base_kept"),
    *("neighbours", "base_neighbours", "others", "base_others", "beside", "base_beside", "drift", "harmonic"),
    *("seconds", "cpu_seconds", "adapter_bytes"),
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One erasure of the benchmark; ``method`` as it was asked for.

    Attributes:
        alone: a spec for each concept where each has an adapter of its own and all are live together; else none.
    """

    method: str
    spec: Spec
    alone: tuple[Spec, ...] = ()

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return ROOT / (f"{self.spec.id}-stacked" if self.alone else self.spec.id)

    def save(self) -> None:
        """Lay its specs down, as ``python -m fade.studies.many`` finds them."""
        save_spec(self.spec, self.folder)
        for one in self.alone:
            save_spec(one, self.folder / ALONE / one.id)


@dataclass(frozen=True, slots=True)
class Many:
    """What the benchmark found: a row a method, and why others have none."""

    rows: list[dict[str, Any]]
    failures: dict[str, str]
    folder: Path

    @property
    def table(self) -> pd.DataFrame:
        """A line a row: the figures alone."""
        lines = [{"method": row["method"], "at_once": row["at_once"]} for row in self.rows]
        for line, row in zip(lines, self.rows, strict=True):
            line |= {name: row[name] for name in COLUMNS if name in row}
        return pd.DataFrame(lines)


def drawn_together(project: Project, count: int, *, seed: int) -> list[str]:
    """Objects of the project's catalog drawn at random, sorted; persons left out.

    Raises:
        ConfigError: fewer than 20 objects would be kept.
    """
    names = sorted(
        one.name
        for one in load_concepts(Path(project.catalog)).values()
        if one.kind == "object" and not one.person and one.name not in project.protected
    )
    if not 1 <= count <= len(names) - LEAST_KEPT:
        raise ConfigError(
            f"--at-once asks for {count} concepts: {project.catalog} has {len(names)} objects, and {LEAST_KEPT} are to "
            "be kept. Ask for fewer."
        )
    return sorted(random.Random(derive_seed(seed, "many at once")).sample(names, count))


def plan_many(
    project: Project,
    methods: Sequence[str],
    concepts: Sequence[str],
    *,
    changes: Mapping[str, Any],
    stacked: bool = False,
) -> list[Entry]:
    """Every method with all of the concepts; all is checked before any runs.

    Args:
        methods: as ``fade benchmark canvas --methods`` takes them; ``ours`` is our own distillation, with the steps and
            batch that several concepts take, unless they are given.
        concepts: names, each alone or with its surrogate after a colon.
        stacked: of each method also an adapter for each concept, with the same surrogates, all of them live together.

    Raises:
        ConfigError: an unknown method, concept or setting; one that is given twice; a surrogate that is erased itself.
    """
    given = [one.partition(":") for one in concepts]
    wanted = in_order(Wanted(name.strip(), surrogate.strip() or AUTO) for name, _, surrogate in given)
    names = [OUR_METHOD if name == OURS else name for name in methods]
    entries: list[Entry] = []
    for method, asked in zip(methods, asking_for(names, changes), strict=True):
        settings = settings_for_many(project, len(wanted), asked, method)
        spec = spec_for_many(wanted, project=project, settings=settings)
        wanted = [asked_again(pair) for pair in spec.pairs]  # `auto` looks once, not for every method
        entries.append(Entry(method, spec))
        if stacked:
            single = load_settings(project.params, changes=asked)
            with bases_shared():
                alone = (prepare_spec(**_named(one), project=project, settings=single) for one in wanted)
                entries.append(Entry(f"{method} stacked", spec, tuple(alone)))
    if len({entry.folder for entry in entries}) < len(entries):
        raise ConfigError("Two erasures of the benchmark are the same: a method was given twice.")
    return entries


def _named(pair: Wanted) -> dict[str, Any]:
    return {part.name: getattr(pair, part.name) for part in fields(pair)}


def run_many_benchmark(name: str, entries: Sequence[Entry], *, say: Callable[[str], None] | None = None) -> Many:
    """Run what is not there yet, one after the other; write the study's folder.

    Raises:
        DataError: not one erasure ended with figures; the first reason is in the message.
    """
    rows: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    for entry in entries:
        entry.save()
        outcome = _run(entry)
        if isinstance(outcome, str):
            failures[entry.method] = outcome
        else:
            rows.append({"method": entry.method, **outcome})
        if say is not None:
            say(f"{entry.method}: {outcome if isinstance(outcome, str) else _shown(outcome)}")
    if not rows:
        raise DataError(f"No erasure of the benchmark ended: {next(iter(failures.values()))}")
    found = Many(rows, failures, STUDIES / name)
    with writing(found.folder) as temporary:
        temporary.mkdir(parents=True)
        write_json(temporary / "rows.json", {"rows": rows, "failures": failures, "made_on": made_on()})
        text = found.table.to_markdown(index=False, floatfmt=".4g")
        (temporary / "table.md").write_text(text + "\n", encoding="utf-8")
        many_plot(rows).savefig(temporary / "many.png", dpi=110, metadata={"Software": None})
    return found


def many_plot(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """What is erased, kept and kept of the neighbours, against how many are erased at once; a line a method."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    shown = {"erased": "erased", "kept": "kept", "neighbours": "neighbours kept"}
    for place, (name, title) in enumerate(shown.items(), start=1):
        axes = figure.add_subplot(1, len(shown), place)
        methods = list(dict.fromkeys(row["method"] for row in rows))
        for number, method in enumerate(methods):
            own = sorted((row for row in rows if row["method"] == method and name in row), key=lambda r: r["at_once"])
            aside = 1 + 0.03 * (number - (len(methods) - 1) / 2)  # so that no mark hides another
            at, values = [aside * row["at_once"] for row in own], [row[name] for row in own]
            spread = [
                [max(0.0, row[name] - row[f"{name}_low"]) for row in own],
                [max(0.0, row[f"{name}_high"] - row[name]) for row in own],
            ]
            axes.errorbar(at, values, yerr=spread, marker="o", capsize=2, label=method)
        axes.set(title=title, xlabel="concepts erased at once", ylim=(0, 1.02), xscale="log")
        counts = sorted({row["at_once"] for row in rows})
        axes.set_xticks(counts, labels=[str(count) for count in counts])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    lines, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=6, fontsize="small")
    return figure


def _shown(row: Mapping[str, Any]) -> str:
    names = ("erased", "reachable", "kept", "base_kept", "neighbours", "base_neighbours")
    parts = [f"{name} {row[name]:.1%}" for name in names if name in row]
    return ", ".join([*parts, f"drift {row['drift']:.3f}", f"{row['seconds']:.1f} s"])


def _run(entry: Entry) -> dict[str, Any] | str:
    """The row of an erasure, made in a process of its own, or why there is none."""
    log = entry.folder.with_suffix(".log")
    with log.open("w", encoding="utf-8") as file:
        command = [sys.executable, "-m", "fade.studies.many", str(entry.folder)]
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if status != 0:
        last = (log.read_text(encoding="utf-8").strip().splitlines() or [f"exit status {status}"])[-1]
        return f"{last} (whole log: {log})"
    return read_json(entry.folder / FIGURES)
