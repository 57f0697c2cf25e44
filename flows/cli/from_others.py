"""Adapters made from others: ``fade consolidate`` and ``fade import``."""

from __future__ import annotations

import time
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.console import (
    BaseOption,
    CatalogOption,
    JsonOption,
    JudgesOption,
    ProjectOption,
    SetOption,
    chosen,
    guarded,
    setting,
)
from flows.cli.outcome import run

app = typer.Typer()


@app.command()
@guarded
def consolidate(
    names: Annotated[list[str], typer.Argument(metavar="ID...", help="Finished erasures.")],
    steps: Annotated[int | None, typer.Option(help="Distillation steps; more than one erasure's by default.")] = None,
    project: ProjectOption = None,
    settings_given: SetOption = None,
    json_file: JsonOption = None,
) -> None:
    """Distil several erasures into one adapter, all their concepts at once.

    It is an erasure of its own: judged, registered, approved and rolled back like any other.
    """
    begun = time.perf_counter()
    from flows.prefect_beside import prefect_beside

    prefect_beside()
    from fade.asking.prepare import prepare_spec
    from fade.config import load_settings
    from fade.spec import load_spec
    from flows.erasing.erase import asked_together, find_folder, for_several

    specs = [load_spec(find_folder(name)) for name in names]
    pairs, data_free = asked_together(specs)
    first = specs[0]
    asked = chosen(project).at(base=first.base, catalog=first.catalog, judges=first.judges)
    settings = load_settings(asked.params, changes=dict(setting(given) for given in settings_given or ()))
    distill = for_several(settings.distill, len(pairs), steps=steps)
    settings = settings.model_copy(update={"distill": distill})
    spec = prepare_spec(
        **{part.name: getattr(pairs[0], part.name) for part in fields(pairs[0])},
        project=asked,
        settings=settings,
        expected_base_sha256=first.base_sha256,
        also=pairs[1:],
        data_free=data_free,
    )
    run(spec, json_file, begun=begun)


@app.command("import")
@guarded
def import_foreign(
    source: Annotated[
        Path, typer.Argument(help="LoRA of diffusers, peft or kohya, or a difference: a .safetensors file or a folder.")
    ],
    concept: Annotated[str, typer.Option(help="What it is said to erase: an object or style of the catalog.")],
    surrogate: Annotated[
        str, typer.Option(help="What its prompts shall give instead; nothing if that is not known.")
    ] = "nothing",
    project: ProjectOption = None,
    base: BaseOption = None,
    catalog: CatalogOption = None,
    judges: JudgesOption = None,
    settings_given: SetOption = None,
    json_file: JsonOption = None,
) -> None:
    """Take in another tool's adapter: judged by the same gate, registered, approved and rolled back like any other."""
    import tempfile

    begun = time.perf_counter()
    from fade.steps.foreign import foreign_sha256, lay_foreign, take_in

    imported = foreign_sha256(source)
    from flows.prefect_beside import prefect_beside

    prefect_beside()
    from fade.asking.prepare import prepare_spec
    from fade.config import load_settings
    from fade.models.family import load_base
    from fade.steps.catalog import ensure_catalog
    from flows.erasing.erase import prepare_folder

    asked = chosen(project).at(base=base, catalog=catalog, judges=judges)
    if catalog is None:
        ensure_catalog(asked)
    settings = load_settings(asked.params, changes=dict(setting(given) for given in settings_given or ()))
    spec = prepare_spec(concept, surrogate, project=asked, settings=settings)
    with tempfile.TemporaryDirectory() as place:  # a wrong one is refused here
        take_in(source, load_base(asked.base, expected_sha256=spec.base_sha256), Path(place) / "adapter", {})
    spec = spec.model_copy(update={"imported": imported})
    lay_foreign(source, prepare_folder(spec))
    run(spec, json_file, begun=begun)
