"""Commands on registered adapters: list them, show one, write one for other tools."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.console import (
    JsonOption,
    ProjectOption,
    chosen,
    console,
    detailed,
    guarded,
    listed_rows,
    rated,
    write_figures,
)
from flows.cli.release import named

app = typer.Typer()


@app.command("list")
@guarded
def list_adapters(json_file: JsonOption = None) -> None:
    """List every registered adapter; seen: how much of the concept the judge names in the base's own pictures."""
    from tasks.mlflow import tracking

    found = tracking.versions()
    rows = []
    for version in found:
        depth = "not measured" if version.inversion is None else f"{version.inversion:.0%}"
        seen = "not measured" if version.recognised is None else f"{version.recognised:.0%}"
        rows.append(
            {
                **{"adapter": version.model, "version": str(version.version), "kind": version.kind},
                **{"gate": version.gate, "seen": seen, "UA": rated(version.ua), "inversion": depth},
                **{"IRA": rated(version.ira), "CRA": rated(version.cra), "drift": f"{version.drift:.4f}"},
                "aliases": ", ".join(version.aliases),
            }
        )
    console.print(listed_rows(rows) if found else "No adapter is registered yet. Begin with: fade demo")
    write_figures(json_file, {"adapters": [asdict(version) for version in found]})


@app.command()
@guarded
def show(name: Annotated[str, typer.Argument(help="Erasure id, or id:version.")], json_file: JsonOption = None) -> None:
    """Show one adapter: figures, hashes and where its files are."""
    from flows.settings import ERASURES
    from tasks.mlflow.tracking import MODEL_PREFIX

    version = named(name)
    folder = ERASURES / version.model.removeprefix(MODEL_PREFIX)
    details = {**asdict(version), "folder": str(folder) if folder.is_dir() else "not on this machine"}
    console.print(
        detailed({key: ", ".join(one) if isinstance(one, tuple) else str(one) for key, one in details.items()})
    )
    write_figures(json_file, details)


@app.command()
@guarded
def export(
    name: Annotated[str, typer.Argument(help="Erasure id, or id:version.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="File (kohya, difference: .safetensors) or new folder.")],
    layout: Annotated[str, typer.Option(help="diffusers, peft, kohya, difference or merged.")] = "diffusers",
    strength: Annotated[float, typer.Option(help="Factor on the adapter's change.")] = 1.0,
    base: Annotated[
        Path | None, typer.Option(help="The adapter's base; the one its erasure names if left out.")
    ] = None,
    project: ProjectOption = None,
    check: Annotated[
        bool,
        typer.Option(help="Load it back by stock diffusers or peft and compare what they predict."),
    ] = True,
    json_file: JsonOption = None,
) -> None:
    """Write a registered adapter for other tools: a LoRA, a full difference, or a merged model."""
    import shutil
    from typing import cast

    from fade.adapters.exports import Layout, export_adapter
    from fade.adapters.stock import deviation
    from fade.errors import AdapterFormatError
    from tasks.mlflow import tracking

    version = named(name)
    base = base or _base_of(version.erasure) or Path(chosen(project).base)
    given = base if layout in ("merged", "difference") else None
    folder = tracking.fetch_adapter(version)
    written = export_adapter(folder, out, layout=cast("Layout", layout), base=given, strength=strength)
    console.print(f"{version.model} version {version.version} as {layout}: {written}")
    figures = {"out": str(written), "layout": layout, "strength": strength, "deviation": None}
    if check:
        try:
            off = deviation(written, layout=cast("Layout", layout), adapter=folder, base=base, strength=strength)
        except AdapterFormatError:
            shutil.rmtree(written) if written.is_dir() else written.unlink()
            raise
        figures["deviation"] = off
        console.print(f"Loaded back by stock libraries it is off by {off:.2%} of the adapter's change.")
    write_figures(json_file, {**figures, **asdict(version)})


def _base_of(erasure: str) -> Path | None:
    """The base that an erasure was made on, as its spec names it; None if it is not on this machine."""
    from fade.spec import load_spec
    from flows.settings import ERASURES

    folder = ERASURES / erasure
    return Path(load_spec(folder).base) if (folder / "spec.yaml").is_file() else None
