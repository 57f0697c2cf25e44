"""Step ``generate``: where no pictures are left, the base itself draws what shall be forgotten and kept   (ours).

The pictures become a catalog in the erasure's folder, ``generated/``, by the code that takes any other set
in; the splits are cut from it. Its rows say in ``source`` which base drew them. What a base draws of a person
is personal data like the pictures it learnt from: ``fade purge`` removes it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

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
from fade.steps.given import drawn_from, load_given
from fade.words import PLAIN, SCENE, sentence


@dataclass(frozen=True, slots=True)
class Wanted:
    """One picture that the base shall draw.

    Attributes:
        prompt: None: the catalog's own sentence captions it.
        begin: number of the given picture that it is drawn from; None: from noise.
    """

    object: str
    style: str
    split: str
    index: int
    prompt: str | None = None
    begin: int | None = None


def generate_catalog(folder: Path) -> Iterator[tuple[int, int]]:
    """Write ``generated/``; yields (pictures drawn, of all) now and then.

    Deterministic: a picture is a function of the base, its prompt, the seed of the splits and its number.
    """
    spec = load_spec(folder)
    torch.set_num_threads(spec.threads)
    sd = load_base(spec.base, expected_sha256=spec.base_sha256, weights=spec.weights)
    content = read_concepts_file(Path(spec.catalog))
    concepts = load_concepts(Path(spec.catalog))
    wanted = list(named(spec, content) if spec.by_name else _wanted(spec, concepts))
    templates = load_templates(Path(spec.catalog)) or _templates(concepts)
    pictures = PictureSet(
        _items(sd, spec, wanted, templates[0], concepts, given=content.get("given")),
        generated_by(spec.base_sha256),
        templates=templates,
        own_captions=spec.by_name,
        licence="made by the base model",
        concepts=tuple(content["concepts"]),
    )
    for done in build(folder / GENERATED, pictures, workers=1):
        yield done, len(wanted)


def _templates(concepts: dict[str, Concept]) -> tuple[str, ...]:
    """Sentences for a catalog whose pictures bring their own, none of which is left."""
    styles = [concept for concept in concepts.values() if concept.kind == "style"]
    return STYLE_TEMPLATES if len(styles) > 1 else PHOTO_TEMPLATES


def _wanted(spec: Spec, concepts: dict[str, Concept]) -> Iterator[Wanted]:
    """Every picture that the splits will ask for."""
    settings = spec.split
    for one in (concept for concept in concepts.values() if concept.kind == "object"):
        for style in (concept for concept in concepts.values() if concept.kind == "style"):
            count = _count(spec, {one.name, style.name})
            for split, number in (("train", count), ("holdout", settings.holdout_per_pair)):
                for index in range(number):
                    yield Wanted(one.name, style.name, split, index)


def _count(spec: Spec, shown: set[str]) -> int:
    """Training pictures of a pair."""
    settings = spec.split
    erased = {pair.concept for pair in spec.pairs}
    stand_ins = {pair.surrogate for pair in spec.pairs}
    retained = settings.retain_per_pair * (settings.neighbour_factor if shown & {*spec.neighbours} else 1)
    if shown & erased:
        return settings.forget_per_pair
    if shown & stand_ins:
        return retained + settings.forget_per_pair
    # Any may stand in for nothing, but few of each pair do.
    return retained + (NOTHING in stand_ins)


def named(spec: Spec, content: Mapping[str, Any]) -> Iterator[Wanted]:
    """What an erasure by name has drawn: pairs by the plan's sentences in turn, the concept alone, what is kept.

    The concept's other names take turns with its own, and so do given pictures of it where there are some: a base that
    hardly knows the name would draw anything by it. What names only one of subject and style has ``(scene)`` or
    ``(plain)`` in the other's place; of what is kept few have the same subject, so that the splits leave none out.
    """
    concept, both = spec.pairs[0], content["sentences"]["both"]
    spoken = {concept.concept: [*[concept.concept] * max(1, 2 * len(concept.aliases)), *concept.aliases]}
    by_kind = {
        kind: [one["name"] for one in content["concepts"] if one["kind"] == kind] for kind in ("object", "style")
    }
    turn, own = itertools.count(), {concept.concept, concept.surrogate}
    begins = itertools.cycle(range(len(content["given"]["sha256"]) if "given" in content else 0))
    for one in by_kind["object"]:
        for style in by_kind["style"]:
            # Nothing is measured on pictures that the base drew but when training may stop, which the concept's say.
            unseen = spec.split.holdout_per_pair if {one, style} & own else 0
            for split, number in (("train", _count(spec, {one, style})), ("holdout", unseen)):
                for index in range(number):
                    at = next(turn)
                    said = {"object": one, "style": style}
                    if concept.concept in said.values():
                        said[concept.kind] = spoken[concept.concept][at % len(spoken[concept.concept])]
                    # Half of the sentences are the one that is judged by.
                    template = both[0] if at % 2 == 0 else both[at // 2 % len(both)]
                    begin = next(begins, None) if concept.concept in (one, style) else None
                    yield Wanted(one, style, split, index, sentence(template, **said), begin)
    for name in (concept.concept, *([] if concept.surrogate == NOTHING else [concept.surrogate])):
        names = spoken.get(name, [name])
        alone = content["sentences"]["alone"]
        for index in range(content["alone"] if alone else 0):
            said = {concept.kind: names[index % len(names)]}
            begin = next(begins, None) if name == concept.concept else None
            prompt = sentence(alone[index % len(alone)], **said)
            # The splits take so many of a pair: what is more stands beside another number.
            which = f" {index // spec.split.forget_per_pair}"
            pair = {"object": SCENE + which, "style": PLAIN + which} | {concept.kind: name}
            yield Wanted(**pair, split="train", index=index, prompt=prompt, begin=begin)
    for index, prompt in enumerate(content["kept"]):
        yield Wanted(f"(kept {index:03d})", PLAIN, "train", 0, prompt)


def _items(
    base: Base,
    spec: Spec,
    wanted: list[Wanted],
    template: str,
    concepts: dict[str, Concept],
    *,
    given: Mapping[str, Any] | None = None,
) -> Iterator[Item]:
    drawing: dict[str, Any] = spec.evaluate.model_dump(include=set(DRAWN_BY))

    def prompts(some: Sequence[Wanted]) -> list[str]:
        return [caption(one.object, one.style, template) if one.prompt is None else one.prompt for one in some]

    def item(one: Wanted, pixels: NDArray[np.uint8]) -> Item:
        name = f"{slug(one.style)}/{slug(one.object)}/{one.split}-{one.index:03d}"
        person = one.object in concepts and concepts[one.object].person
        place = f"generated/{name}"
        return Item(name, place, pixels, one.object, one.style, split=one.split, caption=one.prompt, person=person)

    from_noise = [one for one in wanted if one.begin is None]
    seeds = [
        derive_seed(spec.split.seed, "data-free", one.object, one.style, one.split, one.index) for one in from_noise
    ]
    start = 0
    for batch in generate(base, prompts(from_noise), seeds, **drawing):
        yield from map(item, from_noise[start : start + len(batch)], batch)
        start += len(batch)
    rest = [(one, one.begin) for one in wanted if one.begin is not None]
    if given is not None and rest:
        ones, begins = [one for one, _ in rest], [begin for _, begin in rest]
        pictures = load_given(given, size=base.picture_size)
        found = drawn_from(base, pictures, prompts(ones), begins, drawing=drawing, seed=spec.split.seed)
        yield from map(item, ones, found)
