"""Commands that compare methods or concepts on a published protocol: benchmark, unlearncanvas."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fade.errors import ConfigError
from flows.cli.console import (
    BaseOption,
    DaskOption,
    JsonOption,
    ProjectOption,
    SetOption,
    chosen,
    console,
    guarded,
    listed,
    setting,
    show_training,
    styled,
    write_figures,
)

if TYPE_CHECKING:
    from fade.project import Project
    from flows.studies.study import Study

app = typer.Typer()
AttackOption = Annotated[
    bool, typer.Option("--attack/--no-attack", help="Also measure how easily inversion brings each concept back.")
]
ParallelOption = Annotated[int, typer.Option(min=1, help="Erasures side by side, each with its own threads.")]
OneBaseOption = Annotated[
    bool, typer.Option("--one-base", help="Those side by side in this process, on one copy of the base: for a GPU.")
]


@app.command()
@guarded
def benchmark(
    protocol: Annotated[
        str,
        typer.Argument(
            help="canvas: every object and style of the project's catalog, each alone; classes: those of labels; wide: "
            "of a catalog with hundreds, judged on its own prompts, its neighbours' and a sample of the rest."
        ),
    ],
    concepts: Annotated[str | None, typer.Option(help="Only these, by commas.")] = None,
    settings_given: SetOption = None,
    attack: AttackOption = True,
    random: Annotated[int | None, typer.Option(min=1, help="wide: as many concepts, drawn at random.")] = None,
    at_once: Annotated[
        int | None, typer.Option(min=1, help="wide: so many objects, drawn at random, erased by one adapter.")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Compare these, by commas: fade, fade-deep, plain-fade, esd-x, uce, or your own module:NAME ..."
        ),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="With --methods: seeds, by commas.")] = None,
    kinds: Annotated[
        str, typer.Option("--attacks", help="With --methods: attacks, by commas.")
    ] = "prompts,noised,inversion,relearning",
    sequential: Annotated[
        bool,
        typer.Option(
            "--sequential",
            help="With --methods: twelve concepts live on top of one another; with --at-once: all of them, each by an "
            "adapter of its own, beside the one for all.",
        ),
    ] = False,
    project: ProjectOption = None,
    catalog: Annotated[str | None, typer.Option(help="classes: another catalog than the project's.")] = None,
    base: BaseOption = None,
    forget: Annotated[
        str | None, typer.Option(help="classes: only these, by commas; NAME:SURROGATE names what comes instead.")
    ] = None,
    judges: Annotated[
        str | None,
        typer.Option(help="classes: judges that know --catalog; trained on its pictures if left out."),
    ] = None,
    pictures: Annotated[int, typer.Option(min=1, help="classes: pictures that each class is judged by.")] = 50,
    parallel: ParallelOption = 1,
    one_base: OneBaseOption = False,
    dask: DaskOption = None,
    json_file: JsonOption = None,
) -> None:
    """Erase each concept alone with the default settings, and print the table of figures with intervals.

    The whole of it, with defaults (but for threads), is kept under benchmarks/results/. Stopped and
    asked again, it goes on where it was. With --methods, methods are compared on six named concepts (or
    --concepts); --set esd-x.steps=300 changes a method's own settings. `classes` does the same on a
    catalog of labelled pictures: Imagenette, faces, dog breeds, scenes ...
    """
    from fade.files import write_json
    from flows.prefect_beside import prefect_beside

    if protocol != "wide":  # whose trials are no flow
        prefect_beside()
    from flows.studies.study import RESULTS, all_pairs, benchmark_report, plan, run_study

    if one_base and (methods is not None or protocol != "canvas"):
        raise ConfigError("--one-base is for the canvas without --methods: else each erasure is a process of its own.")
    changes = dict(setting(given) for given in settings_given or ())
    asked = chosen(project).at(base=base, catalog=catalog, judges=judges)
    if protocol == "classes":
        wanted = None if forget is None else forget.split(",")
        train = catalog is not None and judges is None
        _classes(asked, wanted, train, pictures, changes, attack, parallel, dask, json_file)
        return
    if protocol == "wide":
        from flows.cli.wide import many_at_once, one_by_one

        if at_once is not None:
            many_at_once(asked, methods, concepts, at_once, seeds, changes, sequential, json_file)
        else:
            one_by_one(asked, methods, concepts, random, seeds, changes, parallel, json_file)
        return
    if protocol != "canvas":
        raise ConfigError(
            f"No benchmark {protocol!r}: there are 'canvas', 'wide' and 'classes'. UnlearnCanvas is `fade "
            "unlearncanvas`."
        )
    named = [name.strip() for name in concepts.split(",")] if concepts is not None else None
    if methods is not None:
        attacks = [one.strip() for one in kinds.split(",") if one.strip()] if attack else []
        compared = [name.strip() for name in methods.split(",")]
        _contest(
            asked, compared, named, seeds, changes, attacks, sequential, parallel, dask, _other(asked, base), json_file
        )
        return
    cells = plan(all_pairs(asked, named), vary={}, changes=changes, project=asked)
    kinds_asked = ["inversion"] * attack
    study = run_study(
        f"benchmark-{asked.name}" + _other(asked, base) * (base is not None),
        cells,
        attacks=kinds_asked,
        parallel=parallel,
        dask=dask,
        one_base=one_base,
    )
    report = benchmark_report(study.rows, cells)
    _print_benchmark(report)
    if asked.render == "canvas" and named is None and not set(changes) - {"threads"} and not study.failures:
        write_json(RESULTS / f"canvas{_other(asked, base)}.json", report)
        console.print(f"Kept: {RESULTS}/canvas{_other(asked, base)}.json")
    write_figures(json_file, report)
    end_study(study)


def _other(project: Project, base: str | None) -> str:
    """What kept results are marked with that are of another base than the canvas' first: ``-flow``."""
    called = project.name if base is None else Path(base).name
    return "" if called == "canvas" else f"-{called.removeprefix('canvas-')}"


def _contest(
    project: Project,
    methods: list[str],
    concepts: list[str] | None,
    seeds: str | None,
    changes: dict[str, Any],
    attacks: list[str],
    sequential: bool,
    parallel: int,
    dask: str | None,
    other: str,
    json_file: Path | None,
) -> None:
    from fade.files import read_json, write_json
    from flows.studies.contest import plan_contest, run_contest
    from flows.studies.study import RESULTS

    entries = plan_contest(
        methods,
        concepts,
        seeds=listed(seeds, "--seeds") if seeds else None,
        changes=changes,
        project=project,
        together=sequential,
    )
    asked = json.dumps([sorted(str(entry.folder) for entry in entries), attacks, sequential])
    name = "contest-" + hashlib.sha256(asked.encode()).hexdigest()[:8]
    console.print(styled(f"{len(entries)} erasures, contest ", (name, "bold")))
    found = run_contest(name, entries, attacks=attacks, parallel=parallel, dask=dask, sequential=sequential)
    console.print(found.markdown, soft_wrap=True)
    console.print(f"Kept: {found.folder}/table.md, rows.parquet, scatter.png" + ", sequence.png" * sequential)
    whole = concepts is None and not set(changes) - {"threads"} and not found.failures and not sequential
    if whole and project.render == "canvas":
        kept = RESULTS / f"contest{other}.json"
        write_json(kept, {**read_json(found.folder / "summary.json"), "rows": found.rows})
        console.print(f"Kept: {kept}")
    write_figures(json_file, {"rows": found.rows, "failures": found.failures, "folder": str(found.folder)})
    for erasure, reason in found.failures.items():
        console.print(styled((erasure, "bold red"), f": {reason}"), soft_wrap=True)
    if found.failures:
        raise typer.Exit(1)


def _classes(
    project: Project,
    forget: list[str] | None,
    train: bool,
    pictures: int,
    changes: dict[str, Any],
    attack: bool,
    parallel: int,
    dask: str | None,
    json_file: Path | None,
) -> None:
    from flows.studies.classes import judges_for, plan_classes, run_classes

    if train:
        known, training = judges_for(Path(project.catalog), project.section("judges"))
        show_training(training)
        project = project.at(judges=str(known))
    planned = plan_classes(project, forget, pictures=pictures, changes=changes)
    study, report = run_classes(planned, attacks=["inversion"] * attack, parallel=parallel, dask=dask)
    attacked = ["inversion (base)"] if all("inversion" in row for row in study.rows) else []
    table = Table("erased", "instead", "UA (base)", *attacked, "IRA (base)", "drift")
    for row in study.rows:
        depth = [f"{row['inversion']:.0%} ({row['base_inversion']:.0%})"] if attacked else []
        rates = [f"{_rate(row, name)} ({row[f'base_{name}']:.1%})" for name in ("ua", "ira")]
        table.add_row(row["concept"], row["surrogate"], rates[0], *depth, rates[1], f"{row['drift']:.3f}")
    console.print(table)
    found = report["judges"]
    seen = "not known" if found is None else f"{found['report']['object_accuracy']:.1%} of unseen real pictures"
    console.print(f"Judges in {planned.judges}: the class recognised in {seen}. Kept: {study.folder}/classes.json")
    write_figures(json_file, {**report, "folder": str(study.folder)})
    end_study(study)


@app.command()
@guarded
def unlearncanvas(
    base: Annotated[str, typer.Option(help="The unlearned checkpoint: a folder in diffusers layout, or as --base.")],
    target: Annotated[str, typer.Option(help="What was erased, as UnlearnCanvas calls it: Van_Gogh, Cats ...")],
    classifiers: Annotated[
        Path, typer.Option(help="Folder with the style and the object classifier.", resolve_path=True)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the pictures and figures; goes on where it was.")],
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of an adapter of this library on the base.", resolve_path=True)
    ] = None,
    real: Annotated[
        Path | None, typer.Option(help="The data set's folder: adds FID and KID.", resolve_path=True)
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(help="Extractor of FID and KID: TorchScript, or a classifier's folder.", resolve_path=True),
    ] = None,
    clip: Annotated[Path | None, typer.Option(help="A CLIP's folder: adds its score.", resolve_path=True)] = None,
    guidance: Annotated[float, typer.Option(help="9 as published; 7.5 for two of the published methods.")] = 9.0,
    steps: Annotated[int, typer.Option(min=1, help="DDIM steps; 100 as published.")] = 100,
    seed_images: Annotated[
        bool, typer.Option("--seed-images/--no-seed-images", help="Count the theme Seed_Images, as published.")
    ] = True,
    styles: Annotated[str | None, typer.Option(help="Only these, by commas: a look, not the benchmark.")] = None,
    objects: Annotated[str | None, typer.Option(help="Only these, by commas.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures drawn at a time.")] = 1,
    parallel: Annotated[int, typer.Option(min=1, help="Shards drawn side by side, a process each.")] = 1,
    dask: DaskOption = None,
    json_file: JsonOption = None,
) -> None:
    """Run the published UnlearnCanvas protocol on a checkpoint: 5100 pictures, two classifiers, UA, IRA, CRA."""
    from fade.evaluation.records import as_json
    from flows.prefect_beside import prefect_beside

    prefect_beside()
    from flows.studies.unlearncanvas import run_unlearncanvas

    metrics = run_unlearncanvas(
        out, base=base, target=target, classifiers=classifiers, adapter=adapter, real=real, features=features,
        clip=clip, guidance=guidance, steps=steps, seed_images=seed_images, styles=styles, objects=objects,
        batch=batch, shards=parallel, dask=dask,
    )  # fmt: skip
    for name, rate in metrics.rates.items():
        console.print(f"{name.upper()} {rate.value:.2%} [{rate.low:.2%}, {rate.high:.2%}] of {rate.count}")
    for name, value in metrics.distances().items():
        console.print(f"{name} {value:.4g}")
    write_figures(json_file, as_json(metrics))


def _rate(row: dict[str, Any], name: str) -> str:
    return f"{row[name]:.1%} [{row[f'{name}_low']:.1%}, {row[f'{name}_high']:.1%}]"


def _print_benchmark(report: dict[str, Any]) -> None:
    attacked = "inversion" in report["summary"]
    table = Table("erased", "instead", "UA", *(["inversion (base)"] if attacked else []), "IRA (base)", "CRA (base)")
    for heading in ("drift", "s", "kB"):
        table.add_column(heading, justify="right")
    for row in report["rows"]:
        depth = [f"{row['inversion']:.0%} ({row['base_inversion']:.0%})"] if attacked else []
        table.add_row(
            *(row["concept"], row["surrogate"], _rate(row, "ua"), *depth),
            *(f"{row[name]:.1%} ({row[f'base_{name}']:.1%})" for name in ("ira", "cra")),
            *(f"{row['drift']:.3f}", f"{row['seconds']:.0f}", f"{row['adapter_bytes'] / 1000:.0f}"),
        )
    table.add_section()
    summary = report["summary"]
    for label, key in (("mean", "mean"), ("worst", "worst")):
        depth = []
        if attacked:
            depth = [
                f"{summary['inversion'][key]:.0%}" + (f" ({summary['base_inversion']['mean']:.0%})" * (key == "mean"))
            ]
        rates = [
            f"{summary[name][key]:.2%}"
            + (f" [{summary[name]['low']:.2%}, {summary[name]['high']:.2%}]" if key == "mean" and name == "ua" else "")
            for name in ("ua", "ira", "cra")
        ]
        table.add_row(
            styled((label, "bold")),
            *("", rates[0], *depth, *rates[1:]),
            *(f"{summary['drift'][key]:.3f}", f"{summary['seconds'][key]:.0f}"),
            f"{summary['adapter_bytes'][key] / 1000:.0f}",
        )
    console.print(table)
    console.print("Rates: report judge; intervals 95 %, Wilson. Inversion: share of pictures in which a search on the")
    console.print("erased weights brings the concept back. Drift: RMS of retained pictures against the base's, 0..1.")


def end_study(study: Study) -> None:
    """Say what failed; a study with failures ends with status 1."""
    for erasure, reason in study.failures.items():
        console.print(styled((erasure, "bold red"), f": {reason}"), soft_wrap=True)
    if study.failures:
        raise typer.Exit(1)
