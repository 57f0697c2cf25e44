"""What all commands share: the console, entering the project, errors as one line, figures as JSON."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from fade import logs
from fade.errors import ConfigError, FadeError, listing
from fade.files import write_json
from flows.settings import configure

if TYPE_CHECKING:
    from fade.project import Project, Projects

plain = functools.partial(Console, markup=False, emoji=False)
"""What is shown may be a stranger's (a request's number, a file's name): brackets and colons in it are shown as they
are, and never read as styles. Our own styles are said by `styled`."""
console = plain()
styled = Text.assemble
"""A line from strings, and from pairs of a string and its style."""


def look_at_streams() -> None:
    """Fit the console to this process' streams: at the start, and in a process that was given other ones since."""
    # In a log or a pipe, whose width nobody knows, a table is not squeezed into 80 columns.
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    vars(console).update(vars(plain(width=None if known else 160)))


look_at_streams()
Result = TypeVar("Result")
JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures as JSON.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any other setting, e.g. mask.granularity=weight."),
]
DaskOption = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Run on a Dask cluster's workers instead, e.g. tcp://127.0.0.1:8786."),
]
ProjectOption = Annotated[
    Path | None,
    typer.Option("--project", metavar="FILE", help="params.yaml of the project, or its folder; FADE_PROJECT."),
]
ServedOption = Annotated[
    list[Path] | None,
    typer.Option("--project", metavar="FILE", help="A project to serve, as params.yaml or its folder; repeatable."),
]
BaseOption = Annotated[
    str | None,
    typer.Option(
        help="Another base than the project's: a diffusers folder, a .safetensors file, or a Hugging Face name."
    ),
]
CatalogOption = Annotated[str | None, typer.Option(help="Another catalog than the project's: its folder.")]
JudgesOption = Annotated[str | None, typer.Option(help="Other judges than the project's: their folder.")]


def guarded(command: Callable[..., Result]) -> Callable[..., Result]:
    """Enter the project, and turn an error raised on purpose into one line and exit status 1."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> Result:
        try:
            json_file = options.get("json_file")
            if json_file is not None:
                options["json_file"] = json_file.resolve()
            for name in ("out", "backup_folder", "receipts"):
                if isinstance(options.get(name), Path):
                    options[name] = options[name].resolve()
            configure()
            logs.set_up(command.__name__.replace("_", "-"))
            return command(*arguments, **options)
        except FadeError as error:
            show_error(error)
            raise typer.Exit(1) from None

    return run


def listed_rows(rows: Sequence[Mapping[str, str | Text | None]]) -> RenderableType:
    """A table of those columns that say something; a paragraph a row where the console is too narrow for it.

    Nothing is cut: the first column names what other commands ask for.
    """
    said = [name for name in rows[0] if any(row[name] for row in rows)]
    table = Table(*said)
    for row in rows:
        table.add_row(*(row[name] for name in said))
    whole = Measurement.get(console, console.options.update(width=10_000), table).maximum
    if whole <= console.width:
        return table
    return Group(*(part for row in rows for part in _paragraph(row, said)))


def _paragraph(row: Mapping[str, str | Text | None], said: Sequence[str]) -> tuple[Text, Padding]:
    """The first column's value, and under it the others by name."""
    parts = [part for name in said[1:] if (value := row[name]) for part in (", ", f"{name} ", value)]
    return Text(str(row[said[0]]), "bold"), Padding(Text.assemble(*parts[1:]), (0, 0, 0, 4))


def detailed(content: Mapping[str, str]) -> Table:
    """Names and values under one another; of a long value nothing is cut."""
    table = Table(Column(), Column(overflow="fold"), show_header=False)
    for name, value in content.items():
        table.add_row(name, value)
    return table


def show_error(error: FadeError) -> None:
    """One line on standard error."""
    plain(stderr=True).print(styled(("Error:", "bold red"), f" {error}"), soft_wrap=True)


def served(given: list[Path] | None = None) -> Projects:
    """The projects that ``--project`` names, else those of FADE_PROJECT."""
    from fade.environment import environment
    from fade.project import load_projects

    return load_projects(given or environment().projects)


def chosen(given: Path | None) -> Project:
    """The one project that a command is about: that of ``--project``, else the one of FADE_PROJECT.

    Raises:
        ConfigError: FADE_PROJECT names several.
    """
    from fade.project import load_project

    if given is not None:
        return load_project(given)
    found = served()
    if len(found.served) > 1:
        said = listing(f"--project {one.params}" for one in found.served)
        raise ConfigError(f"FADE_PROJECT names {len(found.served)} projects. Say which this is about: {said}.")
    return found.served[0]


def setting(given: str) -> tuple[str, Any]:
    """``NAME=VALUE``, the value read as YAML."""
    import yaml

    name, separator, value = given.partition("=")
    if not separator or not name.strip():
        raise ConfigError(f"--set {given!r} is no setting: expected NAME=VALUE, e.g. mask.density=0.1.")
    try:
        return name.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {given!r}: the value is not YAML ({error}).") from None


def listed(values: str, option: str) -> list[Any]:
    """Values by commas, each read as YAML."""
    return [setting(f"{option}={value}")[1] for value in values.split(",")]


def pair(given: str) -> tuple[str, str]:
    """``NAME`` or ``NAME:SURROGATE``; without one the surrogate is chosen."""
    concept, _, surrogate = given.partition(":")
    return concept.strip(), surrogate.strip() or "auto"


def rated(figure: float | None) -> str:
    """A version's figure for a table; of what is unjudged there is none."""
    return "unjudged" if figure is None else f"{figure:.2%}"


def write_figures(json_file: Path | None, content: dict[str, Any]) -> None:
    """Write what ``--json`` asks for."""
    if json_file is not None:
        write_json(json_file, json.loads(json.dumps(content)))


def show_training(progress: Iterator[tuple[str, int, int, float | None]]) -> None:
    """A bar a part, with a running mean of its loss."""
    from tqdm import tqdm

    bar: Any = None
    mean = 0.0
    for name, done, of, loss in progress:
        if bar is None or bar.desc != name:
            if bar is not None:
                bar.close()
            bar, mean = tqdm(total=of, initial=done - 1, desc=name, mininterval=2), loss or 0.0
        if loss is not None:
            mean = 0.99 * mean + 0.01 * loss
            bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
        bar.update(done - bar.n)
    if bar is not None:
        bar.close()
