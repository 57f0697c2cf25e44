"""The command that begins a project: params.yaml for a model of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.console import JsonOption, console, guarded, styled, write_figures

app = typer.Typer()


@app.command()
@guarded
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the project, e.g. projects/mine.")],
    base: Annotated[
        str, typer.Option(help="Your model: a diffusers folder, a .safetensors file, or a Hugging Face name.")
    ],
    catalog: Annotated[str | None, typer.Option(help="Folder of its pictures; data/catalog/NAME.")] = None,
    judges: Annotated[str | None, typer.Option(help="Folder of judges that know them; data/judges-NAME.")] = None,
    clip: Annotated[
        str | None, typer.Option(help="A CLIP, to erase by name alone: a folder or a Hugging Face name.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What messages call the project; the folder's name.")] = None,
    protect: Annotated[list[str] | None, typer.Option(help="Concept that auto must not choose; repeatable.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Write DIR/params.yaml for a model of your own: the section project, and settings to begin with."""
    from fade.project import PARAMS
    from flows.operations.init import next_commands, picture_size, write_params

    project, settings = write_params(
        folder,
        name=name or folder.resolve().name,
        base=base,
        catalog=catalog,
        judges=judges,
        clip=clip,
        protected=protect or (),
    )
    console.print(
        styled("Project ", (project.name, "bold"), f" in {folder / PARAMS}: look through it, then commit it.")
    )
    if settings:
        console.print("Settings for a large base: " + ", ".join(f"{key}={value}" for key, value in settings.items()))
    for command in next_commands(project, folder, size=picture_size(base)):
        console.print(f"    {command}", highlight=False, soft_wrap=True)
    write_figures(json_file, {**project.model_dump(mode="json"), "params": str(project.params), "settings": settings})
