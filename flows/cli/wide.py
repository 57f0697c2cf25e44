"""The wide benchmark's tables: concepts erased one by one, and many at once."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from fade.errors import ConfigError
from flows.cli.console import console, listed, styled, write_figures

if TYPE_CHECKING:
    from fade.project import Project


def one_by_one(
    project: Project,
    methods: str | None,
    concepts: str | None,
    random: int | None,
    seeds: str | None,
    changes: dict[str, Any],
    parallel: int,
    json_file: Path | None,
) -> None:
    """Each concept alone: the table of methods, and where it is kept."""
    from flows.studies.wide import COLUMNS, OURS, drawn_concepts, plan_wide, run_wide_benchmark

    if (concepts is None) == (random is None):
        raise ConfigError("The wide benchmark takes either --concepts a,b or --random COUNT: give one of them.")
    seed = listed(seeds, "--seeds")[0] if seeds else 0
    drawn = [] if random is None else drawn_concepts(project, random, seed=seed)
    named = drawn if concepts is None else [one.strip() for one in concepts.split(",")]
    compared = [name.strip() for name in (methods or OURS).split(",")]
    entries = plan_wide(project, compared, named, changes=changes)
    asked = json.dumps(sorted(entry.spec.id for entry in entries))
    name = f"wide-{project.name}-" + hashlib.sha256(asked.encode()).hexdigest()[:8]
    console.print(styled(f"{len(entries)} erasures, study ", (name, "bold")))
    found = run_wide_benchmark(name, entries, parallel=parallel, say=lambda line: console.print(line, highlight=False))
    table = Table("method", "erasures", *(column for column in COLUMNS if column in found.table))
    for row in found.table.to_dict("records"):
        figures = [f"{row[column]:.4g}" for column in COLUMNS if column in found.table]
        table.add_row(str(row["method"]), str(row["erasures"]), *figures)
    console.print(table)
    console.print(f"Kept: {found.folder}/rows.json, table.md")
    write_figures(json_file, {"rows": found.rows, "failures": found.failures, "folder": str(found.folder)})
    for erasure, reason in found.failures.items():
        console.print(styled((erasure, "bold red"), f": {reason}"), soft_wrap=True)
    if found.failures:
        raise typer.Exit(1)


def many_at_once(
    project: Project,
    methods: str | None,
    concepts: str | None,
    at_once: int,
    seeds: str | None,
    changes: dict[str, Any],
    sequential: bool,
    json_file: Path | None,
) -> None:
    """All concepts by one adapter of each method. Of one method the file is its row, of several a list of rows."""
    from fade.asking.concepts import MANY
    from flows.studies.many import COLUMNS, drawn_together, plan_many, run_many_benchmark

    seed = listed(seeds, "--seeds")[0] if seeds else 0
    if concepts is None:
        named = drawn_together(project, at_once, seed=seed)
    else:
        named = [one.strip() for one in concepts.split(",")]
        if len(named) != at_once:
            raise ConfigError(f"--at-once {at_once} with --concepts: got {len(named)} names. Give as many.")
    compared = [name.strip() for name in (methods or MANY).split(",")]
    entries = plan_many(project, compared, named, changes=changes, stacked=sequential)
    asked = json.dumps(sorted(entry.folder.name for entry in entries))
    name = f"many-{project.name}-{at_once}-" + hashlib.sha256(asked.encode()).hexdigest()[:8]
    console.print(styled(f"{at_once} concepts at once by {len(entries)} methods, study ", (name, "bold")))
    found = run_many_benchmark(name, entries, say=lambda line: console.print(line, highlight=False))
    lines = found.table.to_dict("records")
    table = Table("", *(str(line["method"]) for line in lines))
    for column in (column for column in COLUMNS if column in found.table):
        table.add_row(column, *(f"{line[column]:.4g}" for line in lines))
    console.print(table)
    console.print(f"Kept: {found.folder}/rows.json, table.md, many.png")
    kept = {"failures": found.failures, "folder": str(found.folder), "drawn_by": seed}
    write_figures(json_file, {**(found.rows[0] if len(found.rows) == 1 else {"rows": found.rows}), **kept})
    for method, reason in found.failures.items():
        console.print(styled((method, "bold red"), f": {reason}"), soft_wrap=True)
    if found.failures:
        raise typer.Exit(1)
