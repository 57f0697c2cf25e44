"""Commands that look for settings or at single erasures: sweep, calibrate, attack, combine."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fade.errors import ConfigError
from flows.cli.benchmark import AttackOption, OneBaseOption, ParallelOption, end_study
from flows.cli.console import (
    DaskOption,
    JsonOption,
    ProjectOption,
    SetOption,
    chosen,
    console,
    guarded,
    listed,
    pair,
    setting,
    styled,
    write_figures,
)

if TYPE_CHECKING:
    from flows.studies.study import Study

app = typer.Typer()


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
    one_base: OneBaseOption = False,
    dask: DaskOption = None,
    project: ProjectOption = None,
    json_file: JsonOption = None,
) -> None:
    """Erase concepts under every combination of values, and show what forgetting costs in retention.

    Nothing is registered. Stopped and asked again, it goes on where it was.
    """
    from flows.prefect_beside import prefect_beside

    prefect_beside()
    from flows.studies.study import plan, run_study

    varied = dict(_values(given) for given in vary)
    if seeds is not None:
        varied["seed"] = listed(seeds, "--seeds")
    changes = dict(setting(given) for given in settings_given or ())
    cells = plan([pair(given) for given in concepts.split(",")], vary=varied, changes=changes, project=chosen(project))
    asked = json.dumps([[cell.spec.id, attack] for cell in cells])
    name = name or "sweep-" + hashlib.sha256(asked.encode()).hexdigest()[:8]
    console.print(styled(f"{len(cells)} erasures, study ", (name, "bold")))
    attacks = ["inversion"] * attack
    study = run_study(name, cells, attacks=attacks, parallel=parallel, dask=dask, one_base=one_base)
    _print_means(study, list(varied))
    console.print(f"Picture: {study.folder}/tradeoff.png   table: {study.folder}/table.md")
    write_figures(json_file, {"rows": study.rows, "failures": study.failures, "folder": str(study.folder)})
    end_study(study)


@app.command()
@guarded
def combine(
    names: Annotated[list[str], typer.Argument(metavar="ID...", help="Finished erasures of one base.")],
    json_file: JsonOption = None,
) -> None:
    """Judge several erasures live at once: each was trained against the base alone."""
    from tqdm import tqdm

    from fade.evaluation.measured import Combination
    from fade.evaluation.records import as_json, load
    from fade.steps.combine import combine as judge_together
    from flows.erasing.erase import find_folder
    from flows.settings import ERASURES

    folders = [find_folder(name) for name in names]
    digest = hashlib.sha256("".join(sorted(folder.name for folder in folders)).encode()).hexdigest()
    out = ERASURES.parent / "combinations" / f"c{digest[:11]}"
    with tqdm(desc="pictures", disable=None) as bar:
        for done, total in judge_together(folders, out):
            bar.total = total
            bar.update(done - bar.n)
    metrics = load(Combination, out / "metrics.json")
    before, after = metrics.report.before, metrics.report.after
    table = Table("erased", "UA together", "UA alone")
    alone = {name: value for folder in folders for name, value in _alone(folder).items()}
    for name, found in after.erased.items():
        ua = found.ua
        table.add_row(name, f"{ua.value:.1%} [{ua.low:.1%}, {ua.high:.1%}]", f"{alone[name]:.1%}")
    console.print(table)
    for name, rate, base in (("IRA", after.ira, before.ira), ("CRA", after.cra, before.cra)):
        console.print(f"{name} {rate.value:.1%} [{rate.low:.1%}, {rate.high:.1%}], base {base.value:.1%}")
    console.print(f"drift {metrics.drift:.3f}, {len(folders)} adapters. Sheet: {out}/sheet.png")
    write_figures(json_file, {**as_json(metrics), "folder": str(out)})


@app.command()
@guarded
def attack(
    name: Annotated[str, typer.Argument(metavar="ID", help="A finished erasure of one concept.")],
    kind: Annotated[
        list[str] | None,
        typer.Option(
            "--kind", help="prompts, noised, inpainted, relearning, switch, inversion; several times for several."
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every attack; without --kind inversion alone.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Measure how easily the concept is brought back, against the base.

    The figures go to the erasure's run and page in MLflow; the pictures stay in the erasure's folder.
    """
    from tqdm import tqdm

    from fade.errors import LineageError, RegistryError
    from fade.steps.attacks import KINDS, attack_figures, run
    from flows.erasing.erase import find_folder
    from flows.releasing.approval import note_attacks

    folder = find_folder(name)
    kinds = list(KINDS) if everything else kind or ["inversion"]
    for one in kinds:
        for _ in tqdm(run(folder, one), desc=one, disable=None):
            pass
    found = attack_figures(folder)
    table = Table("attack", "brings it back in", "on the base")
    for attacked, success in found.root.items():
        interval = f"[{success.low:.0%}, {success.high:.0%}]"
        table.add_row(attacked, f"{success.value:.0%} {interval}", f"{success.base:.0%}")
    console.print(table)
    if (inversion := found.get("inversion")) is not None and "inversion" in kinds:
        console.print(
            f"Inversion brings the concept back in {inversion.value:.0%} of pictures, "
            f"on the base in {inversion.base:.0%}. Sheet: {folder}/attacks/sheet.png"
        )
    try:
        if (judged := note_attacks(folder, found)) is not None:
            console.print(f"Gate: {judged.verdict}. {'; '.join(judged.reasons)}", soft_wrap=True)
    except (RegistryError, LineageError) as error:
        console.print(f"Not logged: {error}", soft_wrap=True)
    write_figures(json_file, {**found.flat(), "folder": str(folder)})


@app.command()
@guarded
def calibrate(
    concept: Annotated[str, typer.Option(help="What to erase.")],
    surrogate: Annotated[str, typer.Option(help="What its prompts shall give instead.")] = "auto",
    budget: Annotated[float, typer.Option(help="Seconds; what would end later is not begun.")] = 900.0,
    project: ProjectOption = None,
    settings_given: SetOption = None,
    json_file: JsonOption = None,
) -> None:
    """Find the smallest adapter, then the fewest steps, with which a concept's erasure passes its gate.

    Nothing is registered; the last line is the command that erases with what was found.
    """
    from dataclasses import asdict

    from flows.prefect_beside import beside_is_up, prefect_beside

    prefect_beside()
    from flows.studies.calibrate import calibrate as search

    changes = dict(setting(given) for given in settings_given or ())
    beside_is_up()
    found = search(concept, surrogate, budget, changes, project=chosen(project))
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
        console.print(styled(("The budget ran out", "bold"), ": something smaller may pass too."))
    given = " ".join(f"--set {name}={value}" for name, value in {**changes, **(found.best or {})}.items())
    console.print(
        f"fade erase --concept {shlex.quote(concept)} --surrogate {shlex.quote(surrogate)} {given}", soft_wrap=True
    )
    write_figures(json_file, asdict(found))


def _alone(folder: Path) -> dict[str, float]:
    from fade.evaluation.measured import Evaluation
    from fade.evaluation.records import load

    after = load(Evaluation, folder / "evaluation" / "metrics.json").report.after
    return {name: found.ua.value for name, found in after.erased.items()}


def _values(given: str) -> tuple[str, list[Any]]:
    name, separator, values = given.partition("=")
    if not separator or not values.strip():
        raise ConfigError(f"--vary {given!r} is no list of values: expected NAME=V1,V2, e.g. mask.density=0.1,0.5.")
    return name.strip(), listed(values, "--vary")


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
