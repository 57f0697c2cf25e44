"""Neighbours: the concepts most alike another one in text space."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from fade.concepts import PLAIN_STYLE, Concept, caption
from fade.errors import ConfigError
from fade.models.base import Base


def by_nearness(base: Base, concept: Concept, others: Sequence[Concept]) -> list[Concept]:
    """Others of the concept's kind, the nearest first: by cosine of the mean text states   (ours)."""
    same = [other for other in others if other.kind == concept.kind and other.name != concept.name]
    if not same:
        return []

    def sentence(name: str) -> str:
        return caption(name, PLAIN_STYLE) if concept.kind == "object" else caption("picture", name)

    states = base.encode_prompts([sentence(concept.name), *(sentence(other.name) for other in same)]).mean()
    nearness = torch.nn.functional.cosine_similarity(states[:1], states[1:])
    return [same[i] for i in nearness.argsort(descending=True, stable=True).tolist()]


def find_neighbours(
    base: Base, concept: Concept, surrogate: Concept | None, concepts: Iterable[Concept], *, count: int = 3
) -> list[str]:
    """The concepts an erasure is most likely to hurt; never the surrogate.

    Of a person: every other person. Of a concept that the catalog puts into a group: the nearest of that group. Else
    the nearest of its domain.
    """
    others = [other for other in concepts if surrogate is None or other.name != surrogate.name]
    persons = [other.name for other in others if other.person and other.name != concept.name]
    if concept.person and persons:
        return persons
    alike = [other for other in others if concept.group is not None and other.group == concept.group]
    alike = [other for other in alike if other.name != concept.name]
    return [other.name for other in by_nearness(base, concept, alike or others)[:count]]


def surrogates(base: Base, concept: Concept, concepts: Iterable[Concept], *, protected: Iterable[str]) -> list[Concept]:
    """The concepts of its kind that are nobody's face and not protected, the nearest first; at least one.

    Raises:
        ConfigError: none is left.
    """
    kept = set(protected)
    allowed = [other for other in concepts if not other.person and other.name not in kept]
    found = by_nearness(base, concept, allowed)
    if not found:
        raise ConfigError(
            f"No surrogate for {concept.name!r}: every other {concept.kind} of the catalog is a person or protected "
            f"({', '.join(sorted(kept)) or 'none by name'}). Name one with --surrogate."
        )
    return found


def choose_surrogate(base: Base, concept: Concept, concepts: Iterable[Concept], *, protected: Iterable[str]) -> Concept:
    """The nearest of ``surrogates``.

    Raises:
        ConfigError: none is left.
    """
    return surrogates(base, concept, concepts, protected=protected)[0]
