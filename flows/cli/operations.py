"""Commands for whoever runs it: doctor, backup, restore."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fade.errors import FadeError
from flows.cli.console import JsonOption, console, guarded, styled, write_figures
from flows.settings import configure

app = typer.Typer()
_COLOUR = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@app.command()
def doctor(
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Look at this base model instead: a folder, a file or a name on the hub."),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Check what a newcomer can get wrong, and say what to do; exit status 1 if something is broken."""
    from flows.operations.doctor import examine
    from flows.operations.doctor_base import examine_base
    from flows.operations.findings import Finding

    json_file = json_file.resolve() if json_file else None
    found: list[Finding] = []
    try:
        configure()
    except FadeError as error:
        # The rest is still worth looking at, from where the command was given.
        found.append(Finding("project", "fail", str(error)))
    found += examine() if base is None else examine_base(base)
    width = max(len(one.check) for one in found)
    for one in found:
        verdict = (f"{one.verdict:4}", _COLOUR[one.verdict])
        console.print(styled(verdict, f" {one.check:{width}} {one.said}"), soft_wrap=True)
        if one.do:
            console.print(f"{'':{width + 5}} -> {one.do}", highlight=False, soft_wrap=True)
    write_figures(json_file, {"findings": [asdict(one) for one in found]})
    if any(one.verdict == "fail" for one in found):
        raise typer.Exit(1)


@app.command()
@guarded
def reconcile(
    register: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Register a finished erasure again, e.g. after its model was deleted."),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Compare what the ledger, the signed manifests and MLflow say, and say what to do; exit status 1 on any."""
    from fade.requests.ledger import Ledger
    from flows.erasing.erase import find_folder
    from flows.releasing.reconcile import compare

    if register:
        from tasks.erasure import lineage_of, register_version

        folder = find_folder(register)
        version = register_version(folder, lineage_of(folder))
        console.print(f"Registered: {version.model} version {version.version}. It waits for: fade approve {register}")
    with Ledger() as ledger:
        found = compare(ledger)
    for one in found:
        colour = "bold red" if one.live else "yellow"
        console.print(styled((one.name, colour), f" {one.said}"), soft_wrap=True)
        console.print(f"    -> {one.do}", highlight=False, soft_wrap=True)
    console.print("Ledger, manifests and MLflow say the same." if not found else f"{len(found)} differences.")
    write_figures(json_file, {"differences": [asdict(one) for one in found]})
    if found:
        raise typer.Exit(1)


DatabaseOption = Annotated[
    list[str] | None,
    typer.Option("--database", metavar="URL", help="A further PostgreSQL database, e.g. MLflow's; repeatable."),
]


@app.command()
@guarded
def backup(
    backup_folder: Annotated[Path, typer.Argument(metavar="DIR", help="New folder that takes the backup.")],
    databases: DatabaseOption = None,
    json_file: JsonOption = None,
) -> None:
    """Copy ledger, MLflow, DVC's cache, erasures, releases and keys, each with its hash; nothing is stopped for it."""
    from flows.operations.backup import backup as run_backup

    made = run_backup(backup_folder, databases=databases or ())
    console.print(
        f"{made.files} files, {made.bytes / 1e6:.1f} MB in {made.folder}. It holds the keys: guard it like them."
    )
    console.print(f"DVC's cache: {made.cached} files from {made.cache}", highlight=False)
    write_figures(json_file, asdict(made))


@app.command()
@guarded
def restore(
    backup_folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that a backup was made to.")],
    force: Annotated[bool, typer.Option("--force", help="Replace state that lies here already.")] = False,
    receipts: Annotated[
        Path | None, typer.Option(help="Folder with newer ID/purge.json, if the machine that had them is lost.")
    ] = None,
    databases: DatabaseOption = None,
    json_file: JsonOption = None,
) -> None:
    """Bring a backup back, check the ledger's chain, and purge again what was purged before or since."""
    from flows.operations.backup import restore as run_restore

    found = run_restore(backup_folder, force=force, receipts=receipts, databases=databases or ())
    console.print(f"{found.files} files are back; the chain holds: {found.rows} rows; purged again: {found.purged}")
    write_figures(json_file, asdict(found))
