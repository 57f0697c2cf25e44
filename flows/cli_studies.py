"""Commands that compare many erasures: sweep, benchmark, calibrate."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from tqdm import tqdm

from fade.errors import ConfigError
from flows.console import DaskOption, JsonOption, SetOption, console, guarded, pair, setting, write_figures

if TYPE_CHECKING:
    from flows.studies import Study

app = typer.Typer()
AttackOption = Annotated[
    bool, typer.Option("--attack/--no-attack", help="Also measure how easily inversion brings each concept back.")
]
ParallelOption = Annotated[int, typer.Option(min=1, help="Erasures side by side, each with its own threads.")]


@app.command()
@guarded
def sweep(
    concepts: Annotated[str, typer.Option(help="Concepts, by commas; NAME:SURROGATE names what comes instead.")],
    vary: Annotated[
        list[str], typer.Option("--vary", metavar="NAME=V1,V2", help="Values of a setting, e.g. mask.density=0.1,0.5.")
    ],
    settings_given: SetOption = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds of split, saliency and distillation, by commas.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the study's folder; a hash of what is asked.")] = None,
    attack: AttackOption = False,
    parallel: ParallelOption = 1,
    dask: DaskOption = None,
    json_file: JsonOption = None,
) -> None:
    """Erase concepts under every combination of values, and show what forgetting costs in retention.

    Nothing is registered. Stopped and asked again, it goes on where it was.
    """
    from flows.studies import plan, run_study

    varied = dict(_values(given) for given in vary)
    if seeds is not None:
        varied["seed"] = _listed(seeds, "--seeds")
    changes = dict(setting(given) for given in settings_given or ())
    cells = plan([pair(given) for given in concepts.split(",")], vary=varied, changes=changes)
    asked = json.dumps([[cell.request.id, attack] for cell in cells])
    name = name or "sweep-" + hashlib.sha256(asked.encode()).hexdigest()[:8]
    console.print(f"{len(cells)} erasures, study [bold]{name}[/bold]")
    study = run_study(name, cells, attacked=attack, parallel=parallel, dask=dask)
    _print_means(study, list(varied))
    console.print(f"Picture: {study.folder}/tradeoff.png   table: {study.folder}/table.md")
    write_figures(json_file, {"rows": study.rows, "failures": study.failures, "folder": str(study.folder)})
    _end(study)


@app.command()
@guarded
def benchmark(
    protocol: Annotated[str, typer.Argument(help="canvas: every object and style of the built-in set, each alone.")],
    concepts: Annotated[str | None, typer.Option(help="Only these, by commas.")] = None,
    settings_given: SetOption = None,
    attack: AttackOption = True,
    methods: Annotated[
        str | None, typer.Option(help="Compare these, by commas: ours, ours-deep, ours-closed-form, fade, esd-x ...")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="With --methods: seeds, by commas.")] = None,
    kinds: Annotated[
        str, typer.Option("--attacks", help="With --methods: attacks, by commas.")
    ] = "prompts,noised,inversion,relearning",
    sequential: Annotated[
        bool, typer.Option("--sequential", help="With --methods: twelve concepts live on top of one another.")
    ] = False,
    parallel: ParallelOption = 1,
    dask: DaskOption = None,
    json_file: JsonOption = None,
) -> None:
    """Erase each concept alone with the default settings, and print the table of figures with intervals.

    The whole of it, with defaults (but for threads), is kept under benchmarks/results/. Stopped and
    asked again, it goes on where it was. With --methods, methods are compared on six named concepts (or
    --concepts); --set esd-x.steps=300 changes a baseline's own settings.
    """
    from fade.files import write_json
    from flows.studies import RESULTS, benchmark_report, canvas_pairs, plan, run_study

    if protocol != "canvas":
        raise ConfigError(f"No benchmark {protocol!r}: there is 'canvas'. UnlearnCanvas is `fade unlearncanvas`.")
    changes = dict(setting(given) for given in settings_given or ())
    named = [name.strip() for name in concepts.split(",")] if concepts is not None else None
    if methods is not None:
        attacks = [one.strip() for one in kinds.split(",") if one.strip()] if attack else []
        chosen = [name.strip() for name in methods.split(",")]
        _contest(chosen, named, seeds, changes, attacks, sequential, parallel, dask, json_file)
        return
    cells = plan(canvas_pairs(named), vary={}, changes=changes)
    study = run_study("benchmark-canvas", cells, attacked=attack, parallel=parallel, dask=dask)
    report = benchmark_report(study.rows, cells)
    _print_benchmark(report)
    if named is None and not set(changes) - {"threads"} and not study.failures:
        write_json(RESULTS / "canvas.json", report)
        console.print(f"Kept: {RESULTS}/canvas.json")
    write_figures(json_file, report)
    _end(study)


def _contest(
    methods: list[str],
    concepts: list[str] | None,
    seeds: str | None,
    changes: dict[str, Any],
    attacks: list[str],
    sequential: bool,
    parallel: int,
    dask: str | None,
    json_file: Path | None,
) -> None:
    from fade.steps.baseline import METHODS as BASELINES
    from flows.contest import SEQUENCE, plan_contest, run_contest

    baselines: dict[str, dict[str, Any]] = {}
    for name in [key for key in changes if key.partition(".")[0] in BASELINES]:
        method, _, own = name.partition(".")
        baselines.setdefault(method, {})[own] = changes.pop(name)
    given = concepts or (list(SEQUENCE) if sequential else None)
    entries = plan_contest(
        methods,
        given,
        seeds=_listed(seeds, "--seeds") if seeds else None,
        changes=changes,
        baselines=baselines,
        together=sequential,
    )
    asked = json.dumps([sorted(str(entry.folder) for entry in entries), attacks, sequential])
    name = "contest-" + hashlib.sha256(asked.encode()).hexdigest()[:8]
    console.print(f"{len(entries)} erasures, contest [bold]{name}[/bold]")
    found = run_contest(name, entries, attacks=attacks, parallel=parallel, dask=dask, sequential=sequential)
    console.print(found.markdown, soft_wrap=True, markup=False)
    console.print(f"Kept: {found.folder}/table.md, rows.parquet, scatter.png" + ", sequence.png" * sequential)
    write_figures(json_file, {"rows": found.rows, "failures": found.failures, "folder": str(found.folder)})
    for erasure, reason in found.failures.items():
        console.print(f"[bold red]{erasure}[/bold red]: {reason}", soft_wrap=True)
    if found.failures:
        raise typer.Exit(1)


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
    guidance: Annotated[float, typer.Option(help="9 as published; 7.5 for two of the published methods.")] = 9.0,
    steps: Annotated[int, typer.Option(min=1, help="DDIM steps; 100 as published.")] = 100,
    seed_images: Annotated[
        bool, typer.Option("--seed-images/--no-seed-images", help="Count the theme Seed_Images, as published.")
    ] = True,
    styles: Annotated[str | None, typer.Option(help="Only these, by commas: a look, not the benchmark.")] = None,
    objects: Annotated[str | None, typer.Option(help="Only these, by commas.")] = None,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    parallel: Annotated[int, typer.Option(min=1, help="Shards drawn side by side, a process each.")] = 1,
    dask: DaskOption = None,
    json_file: JsonOption = None,
) -> None:
    """Run the published UnlearnCanvas protocol on a checkpoint: 5100 pictures, two classifiers, UA, IRA, CRA."""
    from flows.unlearncanvas import run_unlearncanvas

    metrics = run_unlearncanvas(
        out, base=base, target=target, classifiers=classifiers, adapter=adapter, real=real, guidance=guidance,
        steps=steps, seed_images=seed_images, styles=styles, objects=objects, batch=batch, shards=parallel, dask=dask,
    )  # fmt: skip
    for name in ("ua", "ira", "cra"):
        rate = metrics[name]
        console.print(f"{name.upper()} {rate['value']:.2%} [{rate['low']:.2%}, {rate['high']:.2%}] of {rate['count']}")
    for name in ("fid_style_classifier", "kid_style_classifier"):
        if name in metrics:
            console.print(f"{name} {metrics[name]:.4g}")
    write_figures(json_file, metrics)


@app.command()
@guarded
def combine(
    names: Annotated[list[str], typer.Argument(metavar="ID...", help="Finished erasures of one base.")],
    json_file: JsonOption = None,
) -> None:
    """Judge several erasures live at once: each was trained against the base alone."""
    from fade.files import read_json
    from fade.steps.combine import combine as judge_together
    from flows.erase import ERASURES, find_folder

    folders = [find_folder(name) for name in names]
    digest = hashlib.sha256("".join(sorted(folder.name for folder in folders)).encode()).hexdigest()
    out = ERASURES.parent / "combinations" / f"c{digest[:11]}"
    with tqdm(desc="pictures", disable=None) as bar:
        for done, total in judge_together(folders, out):
            bar.total = total
            bar.update(done - bar.n)
    metrics = read_json(out / "metrics.json")
    before, after = (metrics["judges"]["report"][when] for when in ("before", "after"))
    table = Table("erased", "UA together", "UA alone")
    alone = {name: value for folder in folders for name, value in _alone(folder).items()}
    for name, found in after["erased"].items():
        rate = found["ua"]
        table.add_row(name, f"{rate['value']:.1%} [{rate['low']:.1%}, {rate['high']:.1%}]", f"{alone[name]:.1%}")
    console.print(table)
    for name in ("ira", "cra"):
        rate, base = after[name], before[name]["value"]
        console.print(f"{name.upper()} {rate['value']:.1%} [{rate['low']:.1%}, {rate['high']:.1%}], base {base:.1%}")
    console.print(f"drift {metrics['drift']:.3f}, {len(folders)} adapters. Sheet: {out}/sheet.png")
    write_figures(json_file, {**metrics, "folder": str(out)})


@app.command()
@guarded
def attack(
    name: Annotated[str, typer.Argument(metavar="ID", help="A finished erasure of one concept.")],
    kind: Annotated[
        list[str] | None,
        typer.Option("--kind", help="prompts, noised, relearning, switch, inversion; several times for several."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every attack; without --kind inversion alone.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Measure how easily the concept is brought back, against the base.

    The figures go to the erasure's run and page in MLflow; the pictures stay in the erasure's folder.
    """
    from fade.config import load_request
    from fade.errors import RegistryError
    from fade.evaluation.gate import verdict
    from fade.files import read_json
    from fade.steps.attacks import KINDS, attack_figures, run
    from flows.erase import find_folder
    from tasks import _tracking

    folder = find_folder(name)
    kinds = list(KINDS) if everything else kind or ["inversion"]
    for one in kinds:
        for _ in tqdm(run(folder, one), desc=one, disable=None):
            pass
    found = attack_figures(folder)
    table = Table("attack", "brings it back in", "on the base")
    for key in [key.removeprefix("base_") for key in found if key.startswith("base_")]:
        low, high = found[f"{key}_low"], found[f"{key}_high"]
        table.add_row(key, f"{found[key]:.0%} [{low:.0%}, {high:.0%}]", f"{found[f'base_{key}']:.0%}")
    console.print(table)
    if "inversion" in kinds:
        console.print(
            f"Inversion brings the concept back in {found['inversion']:.0%} of pictures, "
            f"on the base in {found['base_inversion']:.0%}. Sheet: {folder}/attacks/sheet.png"
        )
    try:
        version = _tracking.find_version(folder.name)
        sheet = folder / "attacks" / "sheet.png"
        _tracking.log_attack(version, found, sheet if sheet.is_file() else None)
        gate = load_request(folder).gate
        if gate.attacks:
            report = read_json(folder / "evaluation" / "metrics.json")["judges"]["report"]
            judged = verdict({**report, "attacks": found}, gate)
            _tracking.say_gate(version, judged["verdict"])
            console.print(f"Gate: {judged['verdict']}. {'; '.join(judged['reasons'])}", soft_wrap=True)
    except RegistryError as error:
        console.print(f"Not noted in MLflow: {error}", soft_wrap=True)
    write_figures(json_file, {**found, "folder": str(folder)})


@app.command()
@guarded
def calibrate(
    concept: Annotated[str, typer.Option(help="What to erase.")],
    surrogate: Annotated[str, typer.Option(help="What its prompts shall give instead.")] = "auto",
    budget: Annotated[float, typer.Option(help="Seconds; what would end later is not begun.")] = 900.0,
    settings_given: SetOption = None,
    json_file: JsonOption = None,
) -> None:
    """Find the smallest adapter, then the fewest steps, with which a concept's erasure passes its gate.

    Nothing is registered; the last line is the command that erases with what was found.
    """
    from dataclasses import asdict

    from flows.calibrate import calibrate as search

    found = search(concept, surrogate, budget, dict(setting(given) for given in settings_given or ()))
    table = Table("within", "rank", "steps", "UA", "IRA", "CRA", "drift", "kB", "s", "passes")
    for probe in found.probes:
        table.add_row(
            *(str(probe["mask.within"]), str(probe["distill.rank"]), str(probe["steps"])),
            *(f"{probe[name]:.1%}" for name in ("ua", "ira", "cra")),
            *(f"{probe['drift']:.3f}", f"{probe['adapter_bytes'] / 1000:.1f}", f"{probe['method_seconds']:.0f}"),
            "yes" if probe["development_passed"] else "no",
        )
    console.print(table)
    if not found.ended:
        console.print("[bold]The budget ran out[/bold]: something smaller may pass too.")
    given = " ".join(f"--set {name}={value}" for name, value in (found.best or {}).items())
    console.print(
        f"fade erase --concept {shlex.quote(concept)} --surrogate {shlex.quote(surrogate)} {given}", soft_wrap=True
    )
    write_figures(json_file, asdict(found))


def _alone(folder: Path) -> dict[str, float]:
    from fade.files import read_json

    after = read_json(folder / "evaluation" / "metrics.json")["judges"]["report"]["after"]
    return {name: found["ua"]["value"] for name, found in after["erased"].items()}


def _values(given: str) -> tuple[str, list[Any]]:
    name, separator, values = given.partition("=")
    if not separator or not values.strip():
        raise ConfigError(f"--vary {given!r} is no list of values: expected NAME=V1,V2, e.g. mask.density=0.1,0.5.")
    return name.strip(), _listed(values, "--vary")


def _listed(values: str, option: str) -> list[Any]:
    return [setting(f"{option}={value}")[1] for value in values.split(",")]


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
            *(f"[bold]{label}[/bold]", "", rates[0], *depth, *rates[1:]),
            *(f"{summary['drift'][key]:.3f}", f"{summary['seconds'][key]:.0f}"),
            f"{summary['adapter_bytes'][key] / 1000:.0f}",
        )
    console.print(table)
    console.print("Rates: report judge; intervals 95 %, Wilson. Inversion: share of pictures in which a search on the")
    console.print("erased weights brings the concept back. Drift: RMS of retained pictures against the base's, 0..1.")


def _print_means(study: Study, varied: Sequence[str]) -> None:
    table = Table(*varied, "UA (worst)", "IRA", "CRA", "drift", "inversion", "s", "kB", "gate")
    for row in study.table.to_dict("records"):
        table.add_row(
            *(str(row[name]) for name in varied),
            f"{row['ua']:.1%} ({row['ua_worst']:.1%})",
            *(f"{row[name]:.1%}" for name in ("ira", "cra")),
            f"{row['drift']:.3f}",
            f"{row['inversion']:.0%}" if "inversion" in row else "not asked",
            *(f"{row['method_seconds']:.0f}", f"{row['adapter_bytes'] / 1000:.0f}", f"{row['passed']:.0%}"),
        )
    console.print(table)


def _end(study: Study) -> None:
    """Say what failed; a study with failures ends with status 1."""
    for erasure, reason in study.failures.items():
        console.print(f"[bold red]{erasure}[/bold red]: {reason}", soft_wrap=True)
    if study.failures:
        raise typer.Exit(1)
