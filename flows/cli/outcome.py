"""An erasure run by a command, and what came of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from flows.cli.console import console, styled, write_figures

if TYPE_CHECKING:
    from fade.spec import Spec


def run(spec: Spec, json_file: Path | None, *, begun: float) -> None:
    """Run an erasure, say what came of it, and what a person may do next.

    Args:
        begun: when the command began, by ``time.perf_counter``.
    """
    from tasks.mlflow.client import tables_beside

    tables_beside()
    from fade.evaluation.verdicts import TO_DECIDE
    from flows.erasing.by_name import judged_by
    from flows.erasing.demo import figures_row
    from flows.erasing.erase import erase as erase_flow
    from flows.erasing.erase import prepare_folder

    folder = prepare_folder(spec)
    for one in spec.pairs:
        console.print(f"The prompts of {one.concept} shall give: {one.surrogate}")
    console.print(styled("Erasure ", (spec.id, "bold"), f", folder {folder}"))
    try:
        version = erase_flow(spec.id)
    except KeyboardInterrupt:
        console.print("Stopped. Asked for again, it goes on where it ended.")
        raise typer.Exit(130) from None
    row = figures_row(spec, folder, version, seconds=time.perf_counter() - begun)
    if said := judged_by(folder):
        console.print(said, highlight=False)
    print_figures([row])
    console.print(f"Before/after: {folder}/evaluation/sheet.png   Data Docs: {folder}/docs/index.html")
    if version.gate == "passed":
        console.print(styled("Look at it, then: ", (f"fade approve {spec.id}", "bold")))
    elif version.gate in TO_DECIDE:
        console.print(styled((version.gate.capitalize(), "bold yellow"), ": " + "; ".join(_reasons(folder))))
        console.print(f"Read {folder}/evaluation/report.html, then: fade approve {spec.id} --because 'your reason'")
    else:
        console.print(styled(("The gate failed", "bold red"), ": " + "; ".join(_reasons(folder))))
    write_figures(json_file, row)


def _reasons(folder: Path) -> tuple[str, ...]:
    from fade.evaluation.measured import Evaluation
    from fade.evaluation.records import load

    return load(Evaluation, folder / "evaluation" / "metrics.json").gate.reasons


def print_figures(rows: list[dict[str, Any]]) -> None:
    """A column an erasure, so that it fits a terminal of 80 characters."""
    table = Table("", *(f"{row['concept']} -> {row['surrogate']}" for row in rows))
    for name in ("ua", "ira", "cra"):
        cells = []
        for row in rows:
            if row[name] is None:
                cells.append("not judged")
                continue
            low, high = row["intervals"][name]
            base = f", base {row[f'base_{name}']:.1%}" if f"base_{name}" in row else ""
            cells.append(f"{row[name]:.1%} [{low:.1%}, {high:.1%}]{base}")
        table.add_row(name.upper(), *cells)
        if name == "ua":
            table.add_row("inversion", *("not measured: fade attack" for _ in rows))
    table.add_row("drift", *(f"{row['drift']:.4f}" for row in rows))
    table.add_row("pictures judged", *(str(row["samples"]) for row in rows))
    table.add_row("adapter made in", *(f"{row['distill_seconds']:.0f} s" for row in rows))
    table.add_row("adapter", *(f"{row['adapter_bytes'] / 1000:.0f} kB" for row in rows))
    table.add_row("gate", *(row["gate"] for row in rows))
    console.print(table)
