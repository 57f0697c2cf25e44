"""UA, IRA and CRA with intervals, drift, and the neighbours, on the canvas protocol.

The protocol is UnlearnCanvas' (arXiv:2402.11846, section 4): every pair of object and style, each with
the same seeds, the generator re-seeded for each picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fade.concepts import CAPTION_TEMPLATE, Concept, caption
from fade.errors import DataError
from fade.evaluation.figures import Accuracies, OfConcept, Rate, Reachable, pooled, rate

DOMAINS = ("object", "style")


def canvas_protocol(
    objects: Sequence[str],
    styles: Sequence[str],
    seeds: Sequence[int],
    *,
    template: str = CAPTION_TEMPLATE,
    say: Callable[[str, str, str], str] = caption,
) -> pd.DataFrame:
    """One row a picture to generate: object, style, seed, prompt.

    Args:
        say: fills an object and a style into the template.
    """
    rows = [
        {"object": o, "style": s, "seed": seed, "prompt": say(o, s, template)}
        for seed in seeds
        for o in objects
        for s in styles
    ]
    return pd.DataFrame(rows)


def unlearn_accuracy(samples: pd.DataFrame, concept: Concept) -> Rate:
    """UA = 1 - accuracy on the erased concept's prompts: the share not named as the concept."""
    erased = samples[samples[concept.kind] == concept.name]
    return rate(int((erased[f"seen_{concept.kind}"] != concept.name).sum()), len(erased))


def naming_none(samples: pd.DataFrame, erased: Sequence[Concept]) -> pd.DataFrame:
    """The samples whose prompts name none of the erased concepts."""
    for concept in erased:
        samples = samples[samples[concept.kind] != concept.name]
    return samples


def evenly_drawn(samples: pd.DataFrame, erased: Sequence[Concept]) -> pd.DataFrame:
    """Of these, those that were drawn evenly: all but what was drawn for single neighbours' sake.

    Samples of an evaluation in rounds say which, in the column ``part`` (``fade.evaluation.rounds``).
    """
    rest = naming_none(samples, erased)
    return rest[rest["part"] != "near"] if "part" in rest else rest


def split_domains(erased: Sequence[Concept]) -> tuple[list[str], list[str]]:
    """The domains of the erased concepts, which IRA is of, and those other than theirs, which CRA is of."""
    own = list(dict.fromkeys(concept.kind for concept in erased))
    return own, ["style" if kind == "object" else "object" for kind in own]


def domain_of(name: str, samples: pd.DataFrame) -> str:
    """The domain in which the samples' prompts have a name."""
    return next(domain for domain in DOMAINS if (samples[domain] == name).any())


def domain_accuracy(samples: pd.DataFrame, erased: Sequence[Concept], domain: str) -> Rate:
    """Accuracy of a domain on the prompts that name no erased concept.

    In the erased concept's own domain this is IRA, in the other one CRA.
    """
    rest = evenly_drawn(samples, erased)
    return rate(int((rest[f"seen_{domain}"] == rest[domain]).sum()), len(rest))


def is_mush(samples: pd.DataFrame) -> pd.Series:
    """Which pictures the judge calls scrambled, by object or style."""
    found: pd.Series = (samples["seen_object"] == "scrambled") | (samples["seen_style"] == "scrambled")
    return found


def scrambled_rate(samples: pd.DataFrame) -> Rate:
    """Share of pictures the judge calls scrambled, by object or style."""
    return rate(int(is_mush(samples).sum()), len(samples))


def reachable(samples: pd.DataFrame, pairs: Sequence[tuple[Concept, str | None]]) -> dict[str, Reachable]:
    """What the best erasure can reach: its prompts would give the base's own pictures of the surrogate   (ours).

    Args:
        samples: of the base alone.
        pairs: as ``summary`` has them; without a surrogate that a judge knows, or pictures of it, there is none.
    """
    found = {}
    for concept, surrogate in pairs:
        own = samples[samples[concept.kind] == surrogate]
        if surrogate is not None and len(own) > 0:
            seen = own[f"seen_{concept.kind}"]
            found[concept.name] = Reachable(
                ua=rate(int((seen != concept.name).sum()), len(own)),
                surrogate=rate(int((seen == surrogate).sum()), len(own)),
                mush=scrambled_rate(own),
            )
    return found


def surrogate_rate(samples: pd.DataFrame, concept: Concept, surrogate: str) -> Rate:
    """Share of the erased concept's prompts that now show the surrogate."""
    erased = samples[samples[concept.kind] == concept.name]
    return rate(int((erased[f"seen_{concept.kind}"] == surrogate).sum()), len(erased))


def drift(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> float:
    """Root mean square difference of pictures at equal prompts and seeds, 0..1.

    Accuracies saturate; this does not. Mean over pictures of each picture's RMS   (ours).
    """
    if before.shape != after.shape or len(before) == 0:
        raise DataError(f"Drift compares equal, non-empty sets: got {before.shape} and {after.shape}.")
    difference = (before.astype(np.float32) - after.astype(np.float32)) / 255.0
    return float(np.sqrt((difference**2).mean(axis=(1, 2, 3))).mean())


def summary(
    samples: pd.DataFrame, pairs: Sequence[tuple[Concept, str | None]], neighbours: Sequence[str]
) -> Accuracies:
    """All accuracies of one judge over one set of samples; IRA and CRA pool domains.

    Args:
        pairs: each erased concept with the name of its surrogate, or None if that is nothing a judge knows:
            then it has no ``surrogate``.
    """
    erased = [concept for concept, _ in pairs]
    own, other = split_domains(erased)
    ua = {concept.name: unlearn_accuracy(samples, concept) for concept in erased}
    shown = {
        concept.name: surrogate_rate(samples, concept, surrogate)
        for concept, surrogate in pairs
        if surrogate is not None
    }
    near = {}
    for name in neighbours:
        kind = domain_of(name, samples)
        rows = naming_none(samples, erased)
        rows = rows[rows[kind] == name]
        near[name] = rate(int((rows[f"seen_{kind}"] == name).sum()), len(rows))
    return Accuracies(
        ua=pooled(list(ua.values())),
        ira=pooled([domain_accuracy(samples, erased, domain) for domain in own]),
        cra=pooled([domain_accuracy(samples, erased, domain) for domain in other]),
        scrambled=scrambled_rate(samples),
        surrogate=pooled(list(shown.values())) if shown else None,
        erased={
            concept.name: OfConcept(
                ua=ua[concept.name],
                surrogate=shown.get(concept.name),
                mush=scrambled_rate(samples[samples[concept.kind] == concept.name]),
            )
            for concept in erased
        },
        neighbours=near,
    )
