"""Step ``generate``: where no pictures are left, the base itself draws what shall be forgotten and kept   (ours).

The pictures become a catalog in the erasure's folder, ``generated/``, by the code that takes any other set
in; the splits are cut from it. Its rows say in ``source`` which base drew them. What a base draws of a person
is personal data like the pictures it learnt from: ``fade purge`` removes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fade.concepts import Concept, caption, slug
from fade.config import DRAWN_BY
from fade.data.catalog import load_concepts, load_templates, read_concepts_file
from fade.data.intake import build
from fade.data.sets import PHOTO_TEMPLATES, STYLE_TEMPLATES, Item, PictureSet, generated_by
from fade.data.splits import NOTHING
from fade.models.base import Base
from fade.models.family import load_base
from fade.models.generate import generate
from fade.seeding import derive_seed
from fade.spec import GENERATED, Spec, load_spec


def generate_catalog(folder: Path) -> Iterator[tuple[int, int]]:
    """Write ``generated/``; yields (pictures drawn, of all) now and then.

    Deterministic: a picture is a function of the base, its prompt, the seed of the splits and its number.
    """
    spec = load_spec(folder)
    torch.set_num_threads(spec.threads)
    sd = load_base(spec.base, expected_sha256=spec.base_sha256, weights=spec.weights)
    concepts = load_concepts(Path(spec.catalog))
    wanted = list(_wanted(spec, concepts))
    templates = load_templates(Path(spec.catalog)) or _templates(concepts)
    pictures = PictureSet(
        _items(sd, spec, wanted, templates[0], concepts),
        generated_by(spec.base_sha256),
        templates=templates,
        licence="made by the base model",
        concepts=tuple(read_concepts_file(Path(spec.catalog))["concepts"]),
    )
    for done in build(folder / GENERATED, pictures, workers=1):
        yield done, len(wanted)


def _templates(concepts: dict[str, Concept]) -> tuple[str, ...]:
    """Sentences for a catalog whose pictures bring their own, none of which is left."""
    styles = [concept for concept in concepts.values() if concept.kind == "style"]
    return STYLE_TEMPLATES if len(styles) > 1 else PHOTO_TEMPLATES


def _wanted(spec: Spec, concepts: dict[str, Concept]) -> Iterator[tuple[str, str, str, int]]:
    """Object, style, split and number of every picture that the splits will ask for."""
    settings = spec.split
    erased = {pair.concept for pair in spec.pairs}
    stand_ins = {pair.surrogate for pair in spec.pairs}
    for one in (concept for concept in concepts.values() if concept.kind == "object"):
        for style in (concept for concept in concepts.values() if concept.kind == "style"):
            shown = {one.name, style.name}
            retained = settings.retain_per_pair * (settings.neighbour_factor if shown & {*spec.neighbours} else 1)
            if shown & erased:
                count = settings.forget_per_pair
            elif shown & stand_ins:
                count = retained + settings.forget_per_pair
            else:  # any may stand in for nothing, but few of each pair do
                count = retained + (NOTHING in stand_ins)
            for split, number in (("train", count), ("holdout", settings.holdout_per_pair)):
                for index in range(number):
                    yield one.name, style.name, split, index


def _items(
    base: Base,
    spec: Spec,
    wanted: list[tuple[str, str, str, int]],
    template: str,
    concepts: dict[str, Concept],
) -> Iterator[Item]:
    drawn: dict[str, Any] = spec.evaluate.model_dump(include=set(DRAWN_BY))
    prompts = [caption(one, style, template) for one, style, _, _ in wanted]
    seeds = [derive_seed(spec.split.seed, "data-free", *which) for which in wanted]
    start = 0
    for batch in generate(base, prompts, seeds, **drawn):
        for (one, style, split, index), pixels in zip(wanted[start:], batch, strict=False):
            name = f"{slug(style)}/{slug(one)}/{split}-{index:03d}"
            yield Item(name, f"generated/{name}", pixels, one, style, split=split, person=concepts[one].person)
        start += len(batch)
