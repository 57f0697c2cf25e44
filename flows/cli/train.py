"""Commands that make a base and its judges from a catalog of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fade.errors import ConfigError
from flows.cli.console import JsonOption, ProjectOption, chosen, console, guarded, show_training, write_figures

app = typer.Typer()
base = typer.Typer(help="A small base model of your own.", no_args_is_help=True)
classifier = typer.Typer(help="Judges of your own.", no_args_is_help=True)
app.add_typer(base, name="base")
app.add_typer(classifier, name="classifier")

CatalogOption = Annotated[Path | None, typer.Option(help="Folder of the catalog; the project's.")]
OutOption = Annotated[
    Path | None, typer.Option("--out", help="New folder, the project's; what is under way is kept beside it.")
]
ThreadsOption = Annotated[int, typer.Option(min=1, help="Processor threads; part of what decides the bytes.")]
SeedOption = Annotated[int | None, typer.Option(help="Seed of every draw instead of the one in params.yaml.")]


@base.command("train")
@guarded
def train_base(
    catalog: CatalogOption = None,
    out: OutOption = None,
    judges: Annotated[
        Path | None, typer.Option(help="Judges of the same catalog: then it ends with recognition figures.")
    ] = None,
    autoencoder_steps: Annotated[int, typer.Option(min=1, help="The canvas base took 9000.")] = 1500,
    denoiser_steps: Annotated[int, typer.Option(min=1, help="The canvas base took 7500.")] = 3000,
    start: Annotated[
        Path | None, typer.Option(help="Base of the same shape whose weights training begins with; else from scratch.")
    ] = None,
    threads: ThreadsOption = 2,
    seed: SeedOption = None,
    project: ProjectOption = None,
    json_file: JsonOption = None,
) -> None:
    """Train a small Stable Diffusion on a catalog's pictures. Cut off and asked again, it goes on.

    Beside the folder, OUT.report holds a sheet of its pictures and, with --judges, how well they are recognised.
    """
    from fade.evaluation.figures import BaseReport, Seen
    from fade.evaluation.judges import JUDGES
    from fade.evaluation.records import as_json, load
    from fade.steps import train
    from tasks.dvc import versioning

    asked = chosen(project)
    catalog, out = catalog or Path(asked.catalog), out or Path(asked.base)
    _refuse_taken(out)
    params = asked.section("base") | {"threads": threads} | ({} if seed is None else {"seed": seed})
    params["autoencoder"]["steps"], params["denoiser"]["steps"] = autoencoder_steps, denoiser_steps
    if start is not None:
        params["start"] = start.as_posix()
    report = out.with_name(f"{out.name}.report")
    show_training(train.train_base(catalog, out, params=params))
    show_training(
        train.report_on(catalog, out, judges, report, params=asked.section("base_report") | {"threads": threads})
    )
    found = load(BaseReport, report / "metrics.json")
    versioning.track(out)
    console.print(f"Base in {out}; look at {report}/sheet.png", highlight=False)
    if judges is None:
        console.print("How well it is recognised: give --judges (fade classifier train).", highlight=False)
    else:
        table = Table("judge", "object recognised", "style recognised", "called scrambled")
        for name in JUDGES:
            seen: Seen = getattr(found, name)
            table.add_row(name, *(f"{share.value:.1%}" for share in (seen.object, seen.style, seen.scrambled)))
        console.print(table)
    write_figures(json_file, {"base": str(out), "report": as_json(found)})


@classifier.command("train")
@guarded
def train_classifier(
    catalog: CatalogOption = None,
    out: OutOption = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of each instead of those in params.yaml.")] = None,
    threads: ThreadsOption = 2,
    project: ProjectOption = None,
    json_file: JsonOption = None,
) -> None:
    """Train the two judges of a catalog, which --judges takes. Cut off and asked again, it goes on."""
    from fade.evaluation.figures import JudgeAccuracy, JudgesReport
    from fade.evaluation.judges import JUDGES
    from fade.evaluation.records import as_json, load
    from fade.steps import train
    from tasks.dvc import versioning

    asked = chosen(project)
    catalog, out = catalog or Path(asked.catalog), out or Path(asked.judges)
    _refuse_taken(out)
    params = asked.section("judges") | {"threads": threads}
    if steps is not None:
        for name in JUDGES:
            params[name]["steps"] = steps
    show_training(train.train_judges(catalog, out, params=params))
    versioning.track(out)
    known = load(JudgesReport, out / "metrics.json")
    table = Table("judge", "object (holdout)", "style (holdout)", "shuffled patches called scrambled", "pictures")
    for name in JUDGES:
        seen: JudgeAccuracy = getattr(known, name)
        shares = (seen.object_accuracy, seen.style_accuracy, seen.shuffled_called_scrambled)
        table.add_row(name, *(f"{share:.1%}" for share in shares), str(seen.holdout_pictures))
    console.print(table)
    write_figures(json_file, {"judges": str(out), **as_json(known)})


def _refuse_taken(out: Path) -> None:
    if out.exists():
        raise ConfigError(f"{out} is there already. Remove it, or choose another --out.")
