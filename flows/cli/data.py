"""Commands about pictures: catalogs of any set, and their DVC remotes."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from fade.errors import ConfigError, listing
from flows.cli.console import JsonOption, console, guarded, write_figures

if TYPE_CHECKING:
    from collections.abc import Iterator

app = typer.Typer()
catalog = typer.Typer(help="Take picture sets in, look at them, check them.", no_args_is_help=True)
data = typer.Typer(
    help="Send catalogs, splits and adapters to a DVC remote, and bring them back.", no_args_is_help=True
)
app.add_typer(catalog, name="catalog")
app.add_typer(data, name="data")

KindArgument = Annotated[
    str, typer.Argument(help="folder, unlearncanvas, imagenette, lfw, breeds, sun, webdataset, hub, stamps or canvas.")
]
SizeOption = Annotated[int | None, typer.Option(min=16, help="Cut to a square of this side; the base's size.")]
DomainOption = Annotated[str, typer.Option(help="What the subjects of a plain folder are: object, person, scene ...")]
BitsOption = Annotated[
    int | None, typer.Option(min=8, max=16, help="Of 16-bit grey files: how many bits hold the picture, such as 12.")
]
WorkersOption = Annotated[int | None, typer.Option(min=1, help="Processes that decode; one for each core.")]


@catalog.command()
@guarded
def build(
    kind: KindArgument,
    source: Annotated[Path, typer.Argument(help="Folder of the set, or a tar file; params.yaml for the canvas.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the new catalog.")],
    size: SizeOption = None,
    domain: DomainOption = "object",
    workers: WorkersOption = None,
    bits: BitsOption = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse the set if one picture is set aside.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Build a catalog of a picture set: table, pictures of one size, concepts, contact sheet, what was set aside."""
    from fade.data import intake
    from fade.data.loaders.canvas import canvas
    from fade.files import read_yaml
    from fade.steps.catalog import open_set

    if (out / "catalog.parquet").exists():
        raise ConfigError(f"{out} is a catalog already. Use `fade catalog add`, or another --out.")
    now: datetime | None = datetime.now(UTC).replace(microsecond=0)
    if kind == "canvas":
        pictures, now = canvas(read_yaml(source)["catalog"]), None
    else:
        pictures = open_set(kind, source, domain=domain)
        # What is rendered has the same bytes whenever it is.
        now = None if kind == "stamps" else now
    done = intake.build(out, pictures, size=size, added_at=now, workers=workers, bits=bits, strict=strict)
    _taken_in(out, done, json_file)


@catalog.command()
@guarded
def add(
    folder: Annotated[Path, typer.Argument(help="Folder of the catalog.")],
    kind: KindArgument,
    source: Annotated[Path, typer.Argument(help="Folder of the set, or a tar file.")],
    size: SizeOption = None,
    domain: DomainOption = "object",
    workers: WorkersOption = None,
    bits: BitsOption = None,
    json_file: JsonOption = None,
) -> None:
    """Add a picture set to a catalog; what was deleted from it does not come back."""
    from fade.data import intake
    from fade.steps.catalog import open_set

    now = datetime.now(UTC).replace(microsecond=0)
    pictures = open_set(kind, source, domain=domain)
    done = intake.add(folder, pictures, size=size, added_at=now, workers=workers, bits=bits)
    _taken_in(folder, done, json_file)


@catalog.command()
@guarded
def delete(
    folder: Annotated[Path, typer.Argument(help="Folder of the catalog.")],
    image_id: Annotated[list[str] | None, typer.Option(help="Picture to delete; repeatable.")] = None,
    subject: Annotated[list[str] | None, typer.Option(help="Subject whose pictures to delete; repeatable.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Delete pictures and their copies: the files go, also from DVC's cache and remotes; their rows stay with the date.

    They never enter a split again.
    """
    from fade.data.deletion import delete, find
    from tasks.dvc import objects, versioning

    image_ids, subjects = image_id or (), subject or ()
    copies = 0
    found = find(folder, image_ids=image_ids, subjects=subjects)
    if found and Path(".dvc").is_dir():
        with objects.stores() as stores:
            # Before the files go: cut off in between, the command finds the pictures again. The sheet shows them, too.
            going = [*(one.path for one in found), folder / "sheet.png"]
            for md5 in {objects.md5_of(path) for path in going if path.is_file()}:
                for place, _ in stores.places(md5):
                    stores.delete(md5, place)
                    copies += 1
    count = delete(folder, image_ids=image_ids, subjects=subjects, at=datetime.now(UTC).replace(microsecond=0))
    versioning.track(folder)
    console.print(f"{count} pictures deleted from {folder}, {copies} copies from DVC's cache and remotes")
    write_figures(json_file, {"deleted": count, "copies": copies})


@catalog.command()
@guarded
def show(
    folder: Annotated[Path, typer.Argument(help="Folder of the catalog.")],
    json_file: JsonOption = None,
) -> None:
    """Show how many pictures a catalog holds of each subject and style."""
    from fade.data.catalog import count_rows

    counts = count_rows(folder)
    table = Table("object", "domain", "style", "train", "holdout", "deleted")
    for row in counts:
        table.add_row(*(str(value) for value in row.values()))
    console.print(table)
    console.print(f"Look at {folder}/sheet.png")
    write_figures(json_file, {"counts": counts})


@catalog.command()
@guarded
def check(
    folder: Annotated[Path, typer.Argument(help="Folder of the catalog.")],
    files: Annotated[bool, typer.Option("--files/--no-files", help="Also decode and hash every picture.")] = True,
    json_file: JsonOption = None,
) -> None:
    """Judge a catalog with Great Expectations; the pages lie under docs/ beside it."""
    from fade.data.catalog import scarce_concepts
    from tasks.expectations.validation import validate_catalog

    held = validate_catalog(folder, files=files)
    console.print(f"{len(held)} expectations hold. Pages: {folder}.docs/index.html")
    if scarce := scarce_concepts(folder):
        console.print(
            f"{len(scarce)} concepts have fewer than two training pictures: of these, erase pictures (--image-id) or "
            "subjects (--subject), or add some."
        )
    write_figures(json_file, {"expectations": held, "scarce": len(scarce)})


RemoteOption = Annotated[str | None, typer.Option(help="DVC remote by name; the default one if left out.")]


@data.command()
@guarded
def push(remote: RemoteOption = None, json_file: JsonOption = None) -> None:
    """Send to the remote what DVC knows: catalogs with their pictures, splits, adapters, evaluations."""
    from tasks.dvc import versioning

    sent = versioning.push(remote)
    console.print(f"{sent} files sent")
    write_figures(json_file, {"sent": sent})


@data.command()
@guarded
def pull(remote: RemoteOption = None, json_file: JsonOption = None) -> None:
    """Bring back from the remote what the .dvc and lock files name; what was purged stays away."""
    from tasks.dvc import versioning

    found = versioning.pull(remote)
    changes = ", ".join(f"{count} {name}" for name, count in found.items() if name != "fetched")
    console.print(f"{found['fetched']} files fetched; in the work tree: {changes}")
    write_figures(json_file, found)


def _taken_in(folder: Path, done: Iterator[int], json_file: Path | None) -> None:
    from tqdm import tqdm

    from fade.files import read_json
    from tasks.dvc import versioning

    with tqdm(desc="pictures", unit="", disable=None) as bar:
        total = 0
        for count in done:
            bar.update(count - total)
            total = count
    rejected = read_json(folder / "rejected.json")["rejected"]
    tracked = versioning.track(folder)
    console.print(f"{total} pictures in {folder}; {len(rejected)} set aside", highlight=False)
    if tracked:
        console.print(f"DVC: {folder}.dvc has its hash. Commit it; fade data push sends the pictures.", highlight=False)
    if rejected:
        shown = listing([f"{entry['name']}: {entry['reason']}" for entry in rejected])
        console.print(f"{folder}/rejected.json: {shown}", highlight=False)
    write_figures(json_file, {"pictures": total, "set_aside": len(rejected), "folder": str(folder)})
