"""Commands that prove what was done: audit, purge, evidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fade.errors import ConfigError, listing
from flows.cli.console import JsonOption, console, guarded, show_error, styled, write_figures
from flows.cli.release import named

if TYPE_CHECKING:
    from flows.proving.purge import Receipt

app = typer.Typer()


@app.command()
@guarded
def audit(
    name: Annotated[str, typer.Argument(help="Erasure id, or id:version.")], json_file: JsonOption = None
) -> None:
    """Make an erasure again from its recorded commit in a clean clone, and compare every hash."""
    from flows.erasing.erase import find_folder
    from flows.proving.audit import AUDITS
    from flows.proving.audit import audit as run_audit

    version = named(name)
    report = run_audit(version, find_folder(version.model))
    console.print(f"{report['compared']} hashes compared, {report['different']} differ.")
    if report["taken_as_recorded"]:
        console.print(
            f"The catalog has changed since: {' and '.join(report['taken_as_recorded'])} were taken as recorded, and "
            "held against their hashes."
        )
    for row in report["rows"]:
        if not row["equal"] and row["path"] not in report["catalog_changed"]:
            much = f", by at most {row['largest_difference']:.3g}" if row.get("largest_difference") else ""
            console.print(styled(("differs", "bold red"), f" {row['path']}{much}"))
    if not report["commit_holds_all_the_code"]:
        console.print("The adapter was made with changes that its commit does not hold.")
    console.print(f"Report: {AUDITS}/{report['erasure']}/report.md")
    write_figures(json_file, report)
    if not report["equal"]:
        raise typer.Exit(1)


@app.command()
@guarded
def purge(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="ID...", help="Erasures; those purged before if none.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would go, and remove nothing.")] = False,
    audited: Annotated[bool, typer.Option("--audited", help="Only what `fade audit` found equal.")] = False,
    scan: Annotated[
        bool, typer.Option("--scan", help="Remove nothing: look for names and pictures that a purge left.")
    ] = False,
    json_file: JsonOption = None,
) -> None:
    """Remove the forget data and what was made from it everywhere; receipts and hashes stay.

    Without an ID it purges again what was purged before, and ends what was cut off: run it after a backup was restored.
    """
    from fade.files import read_json
    from fade.requests.ledger import Ledger
    from flows.proving.audit import AUDITS
    from flows.proving.purge import purge as run_purge
    from flows.proving.purge import purged_before
    from flows.proving.traces import RECEIPTS_NAME
    from flows.settings import ERASURES

    asked = names or purged_before()
    if not asked:
        console.print("Nothing was purged yet. See what would go: fade purge ID --dry-run")
    if scan:
        _scan(asked, json_file)
        return
    found = {}
    with Ledger() as ledger:
        for name in asked:
            version = named(name)
            erasure = version.model.removeprefix("erasure-")
            report = AUDITS / erasure / "report.json"
            if audited and not (report.is_file() and read_json(report)["equal"]):
                raise ConfigError(f"{erasure} has no audit that found every hash equal. Run: fade audit {erasure}")
            receipts = run_purge(version, ERASURES / erasure, ledger, dry_run=dry_run)
            found[erasure] = [asdict(one) for one in receipts]
            gone = [one for one in receipts if one.removed]
            said = "would be removed" if dry_run else "removed"
            console.print(f"{erasure}: {len(gone)} objects {said} ({sum(one.bytes for one in gone) / 1e6:.1f} MB)")
            _print_receipts([one for one in receipts if dry_run or not one.removed])
    if found:
        also = "" if dry_run else f"; signed, {RECEIPTS_NAME} in each erasure's folder"
        console.print(f"Object by object: --json FILE{also}.")
    write_figures(json_file, {"dry_run": dry_run, "receipts": found})


def _print_receipts(receipts: Sequence[Receipt]) -> None:
    """A line for all that lie in one folder of one place and share a reason: there may be hundreds of pictures."""
    groups: dict[tuple[str, str, str, str], list[Receipt]] = {}
    for one in receipts:
        folder, slash, _ = one.name.rpartition("/")
        what = "out " if one.removed else "kept"
        groups.setdefault((what, one.place, folder + slash, one.reason), []).append(one)
    for (what, place, folder, reason), ones in groups.items():
        names = listing(dict.fromkeys(one.name.removeprefix(folder) for one in ones), 2)
        many = f"{len(ones)}{f' in {folder}' if folder else ''}: " if len(ones) > 1 else folder
        console.print(f"  {what}  {place}: {many}{names}" + (f"; {reason}" if reason else ""), soft_wrap=True)


def _scan(names: list[str], json_file: Path | None) -> None:
    from flows.proving.scan import scan_erasure
    from flows.settings import ERASURES

    found = {name: scan_erasure(ERASURES / name.removeprefix("erasure-")) for name in names}
    for name, left in found.items():
        console.print(f"{name}: {len(left)} findings outside the places that docs/security.md lists")
        for one in left:
            console.print(f"  {one.what}: {one.where}", highlight=False)
    write_figures(json_file, {"left": {name: [asdict(one) for one in left] for name, left in found.items()}})
    if any(found.values()):
        raise typer.Exit(1)


evidence = typer.Typer(help="Signed evidence of an erasure: seal it, verify it offline.", no_args_is_help=True)
app.add_typer(evidence, name="evidence")


@evidence.command("seal")
@guarded
def seal_evidence(
    name: Annotated[str, typer.Argument(help="A request's id in the ledger, or an erasure's id.")],
    json_file: JsonOption = None,
) -> None:
    """Write evidence.json, signed, and evidence.html, the same for people to read."""
    from fade.requests.ledger import Ledger
    from flows.proving.evidence import seal_evidence as run_seal

    with Ledger() as ledger:
        folder, content = run_seal(name, ledger)
    console.print(f"Evidence: {folder}/evidence.html   check it: fade evidence verify {folder}")
    write_figures(json_file, {"folder": str(folder), **content})


@evidence.command("verify")
def verify_evidence(
    bundle: Annotated[Path, typer.Argument(help="Folder with evidence.json and evidence.html, or that evidence.json.")],
    public_key: Annotated[Path, typer.Option(help="PEM file of the key that signs.")] = Path(".fade/keys/public.pem"),
) -> None:
    """Check a bundle with the public key alone, offline; needs no project."""
    from fade.errors import FadeError
    from fade.requests.evidence import verify_evidence as check
    from fade.signing import public_key as load_key

    try:
        content = check(bundle, load_key(public_key))
    except FadeError as error:
        show_error(error)
        raise typer.Exit(1) from None
    chain = content["chain"]
    console.print(f"Genuine and unchanged: erasure {content['erasure']['id']}, sealed {content['sealed_at']}.")
    console.print(f"{len(chain['rows'])} rows of a log of {chain['rows_in_all']}, whose end is {chain['head'][:16]}.")
