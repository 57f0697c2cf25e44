"""The command line ``fade``. Heavy libraries are imported by the commands that need them."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from fade import __version__
from fade.errors import ConfigError
from flows.cli import (
    adapters,
    benchmark,
    data,
    erase,
    from_others,
    operations,
    project,
    proving,
    queue,
    release,
    requests,
    studies,
    train,
)
from flows.cli.console import (
    BaseOption,
    JsonOption,
    ProjectOption,
    chosen,
    console,
    guarded,
    styled,
    write_figures,
)
from flows.cli.outcome import print_figures
from flows.cli.release import named

app = typer.Typer(
    name="fade",
    help="Make a text-to-image diffusion model forget a concept: reversibly, measured, with lineage.\n\n"
    "Begin with [bold]fade demo[/bold]. An erasure ends as a registered adapter that is a [italic]candidate[/italic]; "
    "[bold]fade approve[/bold] (or the alias 'approved' in the MLflow page) makes it live, "
    "[bold]fade rollback[/bold] takes it back.",
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _say_version(asked: bool) -> None:
    if asked:
        console.print(f"fade {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Say the version and end.", is_eager=True, callback=_say_version)
    ] = False,
) -> None:
    """What may be said before a command."""


app.add_typer(erase.app)
app.add_typer(from_others.app)
app.add_typer(project.app)
app.add_typer(adapters.app)
app.add_typer(release.app)
app.add_typer(proving.app)
app.add_typer(studies.app)
app.add_typer(benchmark.app)
app.add_typer(requests.app)
app.add_typer(queue.app)
app.add_typer(data.app)
app.add_typer(train.app)
app.add_typer(operations.app)


@app.command()
@guarded
def generate(
    prompt: Annotated[str, typer.Option(help="e.g. 'a cat image in neon style.'")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Picture to write (.png, .jpg, .webp).")],
    live: Annotated[bool, typer.Option("--live", help="With every approved adapter (the default).")] = False,
    without_erasures: Annotated[bool, typer.Option("--without-erasures", help="The base model alone.")] = False,
    adapter: Annotated[str | None, typer.Option(help="With one registered adapter: its id, or id:version.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first noise.")] = 188,
    project: ProjectOption = None,
    base: BaseOption = None,
    json_file: JsonOption = None,
) -> None:
    """Generate a picture from the base, with one adapter, or with everything that is live."""
    import time

    if sum([live, without_erasures, adapter is not None]) > 1:
        raise ConfigError("Choose one of --live, --without-erasures and --adapter.")
    begun = time.perf_counter()
    from fade.models.source import base_sha256
    from flows.releasing.pictures import draw, live_adapters, load_with, save_picture

    place = chosen(project).at(base=base).base
    if without_erasures:
        stacked = []
    elif adapter is not None:
        stacked = [named(adapter)]
    else:
        stacked = live_adapters(base_sha256(Path(place)))
    save_picture(draw(load_with(place, stacked), [prompt], seed=seed)[0], out)
    names = [f"{version.model}/{version.version}" for version in stacked]
    console.print(f"{out}  ({', '.join(names) or 'base alone'}, seed {seed})")
    write_figures(json_file, {"out": str(out), "adapters": names, "seed": seed, "seconds": time.perf_counter() - begun})


@app.command()
@guarded
def demo(json_file: JsonOption = None) -> None:
    """Erase a person and a style, approve one, use it, roll it back, and prove the base is whole again."""
    import time

    begun = time.perf_counter()
    from flows.prefect_beside import prefect_beside
    from tasks.mlflow.client import tables_beside

    prefect_beside()
    tables_beside()
    from flows.erasing.demo import run_demo

    outcome = run_demo(chosen(None), lambda line: console.print(line, highlight=False))
    print_figures(outcome["erasures"])
    for row in outcome["erasures"]:
        console.print(f"{row['concept']}: {row['folder']}/evaluation/sheet.png, {row['folder']}/docs/index.html")
    console.print(f"approved and rolled back: {outcome['rollback_sheet']}")
    proof = "equal" if outcome["rollback_bits_equal"] else "NOT equal"
    console.print(f"After the rollback, weights and pictures are {proof} to the base's, bit for bit.")
    console.print(styled(f"{time.perf_counter() - begun:.0f} s in all. The pages: ", ("fade ui", "bold")))
    write_figures(json_file, outcome)
    if not outcome["rollback_bits_equal"] or any(row["gate"] != "passed" for row in outcome["erasures"]):
        raise typer.Exit(1)


@app.command()
@guarded
def ui(
    mlflow_port: Annotated[int, typer.Option(help="Port of MLflow's pages.")] = 5000,
    prefect_port: Annotated[int, typer.Option(help="Port of Prefect's pages.")] = 4200,
) -> None:
    """Start MLflow and Prefect on loopback, until Ctrl-C."""
    from flows.services.local import running, told_to_end
    from flows.settings import PREFECT_AUTH

    ports = {"mlflow_port": mlflow_port, "prefect_port": prefect_port}
    with told_to_end() as ended, suppress(KeyboardInterrupt), running(**ports, ended=ended) as services:
        console.print(f"MLflow   {services.mlflow}   adapters: approve and roll back by alias")
        console.print(f"Prefect  {services.prefect}   runs, logs; log in with what is in {PREFECT_AUTH}")
        console.print("Ctrl-C stops both.")
        ended.wait()
    console.print("Stopped.")


if __name__ == "__main__":
    sys.exit(app())
