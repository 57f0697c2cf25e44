"""``fade erase``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fade.errors import ConfigError, listing
from flows.cli.console import (
    BaseOption,
    CatalogOption,
    JsonOption,
    JudgesOption,
    ProjectOption,
    SetOption,
    chosen,
    console,
    guarded,
    pair,
    setting,
    write_figures,
)
from flows.cli.outcome import run

if TYPE_CHECKING:
    from fade.spec import Spec

app = typer.Typer()


@app.command()
@guarded
def erase(
    concept: Annotated[
        str | None, typer.Option(help="What to erase: an object or style of the catalog, e.g. astronaut.")
    ] = None,
    surrogate: Annotated[
        str,
        typer.Option(
            help="What its prompts shall give instead, e.g. cameraman; nothing: what the empty prompt gives; "
            "auto: the nearest that may."
        ),
    ] = "auto",
    also: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[:SURROGATE]", help="A further concept for the same adapter; repeatable."),
    ] = None,
    concepts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Many at once, by one adapter: a table of concept and, where wanted, surrogate."
        ),
    ] = None,
    of: Annotated[str | None, typer.Option(metavar="ID", help="An erasure of many, to --add to or take from.")] = None,
    add: Annotated[
        list[str] | None, typer.Option(metavar="NAME[:SURROGATE]", help="With --of: one concept more; repeatable.")
    ] = None,
    without: Annotated[list[str] | None, typer.Option(help="With --of: one concept fewer; repeatable.")] = None,
    preview: Annotated[
        bool, typer.Option("--preview", help="Say what would be erased and which kept concepts that endangers.")
    ] = False,
    alias: Annotated[list[str] | None, typer.Option(help="Another name that brings it up; repeatable.")] = None,
    image_id: Annotated[
        list[str] | None, typer.Option(help="Picture of the concept that must be forgotten; repeatable.")
    ] = None,
    subject: Annotated[
        list[str] | None, typer.Option(help="Subject reference whose pictures must be forgotten; repeatable.")
    ] = None,
    overwrite: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Pictures with surrogates of their own: a table of image_id and overwrite."),
    ] = None,
    data_free: Annotated[
        bool, typer.Option("--data-free", help="No pictures are left: the base draws what is forgotten and kept.")
    ] = False,
    by_name: Annotated[
        bool,
        typer.Option("--by-name", help="No catalog, no judges: the name alone. So where a project has no catalog."),
    ] = False,
    kind: Annotated[
        str | None, typer.Option(help="By name: style, person, object or notion; guessed where it is left out.")
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="By name: a name or prompt that must stay as it is; repeatable.")
    ] = None,
    keep_file: Annotated[
        Path | None, typer.Option(metavar="PROMPTS", help="By name: a text file of such prompts, one a line.")
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="By name: the CLIP that judges: a folder or a Hugging Face name; none: nobody.")
    ] = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER[=CLASS]",
            help="By name: a further judge, a classifier in transformers' layout: by one of its classes, or by how "
            "like pictures are in what it sees; repeatable. It decides nothing.",
        ),
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="By name: 5 to 50 pictures of it, where the base hardly knows it."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="By name: small or normal (the default): how many pictures are drawn.")
    ] = None,
    protect: Annotated[list[str] | None, typer.Option(help="Concept that auto must not choose; repeatable.")] = None,
    project: ProjectOption = None,
    base: BaseOption = None,
    base_sha256: Annotated[str | None, typer.Option(help="Refuse a base of another hash.")] = None,
    catalog: CatalogOption = None,
    judges: JudgesOption = None,
    method: Annotated[
        str | None,
        typer.Option(help="What makes the adapter: fade, fade-deep, esd-x, uce ..., or your own as module:NAME."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every draw instead of the one in params.yaml.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the method instead of those in params.yaml.")] = None,
    settings: Annotated[
        str | None,
        typer.Option(
            help="auto: the erasure finds its own, from the closed form on; fixed: those in params.yaml. Left out, "
            "what params.yaml says, or fixed where a method or one of its settings is given."
        ),
    ] = None,
    point: Annotated[
        int | None,
        typer.Option(min=0, help="Another point of those that the same request tried; nothing is trained anew."),
    ] = None,
    settings_given: SetOption = None,
    json_file: JsonOption = None,
) -> None:
    """Erase a concept: splits, validation, what the method takes to make an adapter, evaluation, registration.

    Asking for the same thing again goes on where the last run ended, and gives the same adapter.
    """
    import time

    begun = time.perf_counter()
    if not preview:
        from flows.prefect_beside import prefect_beside

        prefect_beside()
    # What is wrong in the words is said before anything heavy is imported, which takes most of ten seconds.
    from fade.config import load_settings

    changed = _changed(settings_given, method=method, seed=seed, steps=steps, settings=settings)
    asked = chosen(project).at(base=base, catalog=catalog, judges=judges)
    checked = load_settings(asked.params, changes=changed)
    named: dict[str, Any] = {
        **{"kind": kind, "keep": keep, "keep_file": keep_file},
        **{"clip": clip, "judge": judge, "pictures": pictures, "budget": budget},
    }
    by_name = by_name or asked.by_name or any(given is not None for given in named.values())
    _check_known([] if by_name else [concept, *(protect or ())], asked.catalog)
    from fade.asking.by_kind import of_its_kind
    from fade.asking.prepare import prepare_spec
    from fade.asking.tables import read_overwrite
    from fade.models.family import family_of
    from fade.steps.catalog import ensure_catalog
    from flows.cli.together import Together, spec_of
    from flows.cli.together import preview as show_preview
    from flows.erasing.points import other_point

    many = Together(concepts, of, add or (), without or ())
    if many.asked == (concept is not None):
        raise ConfigError("Name what to erase: --concept NAME, or many at once by --concepts FILE or --of ID.")
    if by_name:
        from flows.erasing.by_name import described, prepare

        of_pictures = {"image_id": image_id, "subject": subject, "overwrite": overwrite}
        _refuse_by_name(also=also, concepts=many.asked, point=point is not None, **of_pictures)
        prepared = prepare(
            str(concept),
            project=asked,
            changes=changed,
            surrogate=surrogate,
            aliases=alias or (),
            protected=protect or (),
            expected_base_sha256=base_sha256,
            **{**named, "keep": keep or (), "judge": judge or ()},
        )
        for line in described(prepared):
            console.print(line, highlight=False)
        (_preview_one if preview else partial(run, begun=begun))(prepared.spec, json_file)
        return
    if catalog is None:
        ensure_catalog(asked)
    if many.asked:
        _refuse_with_many(also=also, alias=alias, image_id=image_id, subject=subject, overwrite=overwrite, point=point)
        more = {"expected_base_sha256": base_sha256, "protected": protect or (), "data_free": data_free}
        spec = spec_of(many, asked, changed, method=method, **more)
    else:
        spec = prepare_spec(
            str(concept),
            surrogate,
            project=asked,
            settings=checked,
            expected_base_sha256=base_sha256,
            protected=protect or (),
            also=[pair(given) for given in also or ()],
            aliases=alias or (),
            image_ids=image_id or (),
            subjects=subject or (),
            overwrite=None if overwrite is None else read_overwrite(overwrite),
            data_free=data_free,
        )
    if point is not None:
        spec = other_point(spec, point)
    if preview:
        show_preview(spec, json_file)
        return
    console.print(f"Settings: {'found by the erasure itself' if not spec.why_fixed else f'fixed ({spec.why_fixed})'}")
    if given_by_kind := of_its_kind(spec, family_of(spec.base)):
        console.print("Of the base's kind: " + ", ".join(f"{name}={value}" for name, value in given_by_kind.items()))
    run(spec, json_file, begun=begun)


def _changed(
    given: list[str] | None, *, method: str | None, seed: int | None, steps: int | None, settings: str | None
) -> dict[str, Any]:
    """The settings that a command's options change, by their dotted names."""
    from fade.config import one_seed

    changes: dict[str, Any] = dict(setting(each) for each in given or ())
    if seed is not None:
        changes |= one_seed(seed)
    if steps is not None or method is not None:
        from fade.methods.registry import asking_for, steps_of  # late: it loads torch

        if steps is not None:
            changes |= steps_of(method, steps)
        changes = changes if method is None else asking_for([method], changes)[0]
    return changes if settings is None else {**changes, "settings": settings}


def _refuse_by_name(**of_a_catalog: object) -> None:
    """Nothing that is about a catalog's pictures is taken where a name is all there is."""
    if refused := [f"--{name.replace('_', '-')}" for name, given in of_a_catalog.items() if given]:
        raise ConfigError(f"By its name alone nothing is known that {listing(refused)} could be about: leave it out.")


def _refuse_with_many(**of_one: object) -> None:
    """What is said of one concept is not taken beside many."""
    if refused := [f"--{name.replace('_', '-')}" for name, given in of_one.items() if given not in (None, [])]:
        raise ConfigError(f"With many concepts each has its row: {listing(refused)} is about one. Put it there.")


def _preview_one(spec: Spec, json_file: Path | None) -> None:
    for one in spec.pairs:
        console.print(f"The prompts of {one.concept} would give: {one.surrogate}")
    write_figures(
        json_file,
        {"id": spec.id, "pairs": [{"concept": one.concept, "surrogate": one.surrogate} for one in spec.pairs]},
    )


def _check_known(names: Sequence[str | None], catalog: str) -> None:
    """Whether a catalog that is there knows the names; one that is not is made, or missed, later."""
    from fade.data.catalog import find_concept, load_concepts

    asked = [name for name in names if name is not None]
    if asked and Path(catalog).is_dir():
        concepts = load_concepts(Path(catalog))
        for name in asked:
            find_concept(concepts, name)
