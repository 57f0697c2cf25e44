"""UA, IRA and CRA with intervals, drift, and the neighbours, on the canvas protocol.

The protocol is UnlearnCanvas' (arXiv:2402.11846, section 4): every pair of object and style, each with
the same seeds, the generator re-seeded for each picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import binomtest

from fade.concepts import Concept, caption
from fade.errors import DataError


@dataclass(frozen=True, slots=True)
class Rate:
    """A share of ``count`` pictures with its 95 % Wilson score interval, fractions of 1."""

    value: float
    low: float
    high: float
    count: int


def rate(hits: int, count: int) -> Rate:
    """The share of hits and its Wilson interval.

    Raises:
        DataError: nothing was counted; there is no figure then, not even zero.
    """
    if count == 0:
        raise DataError("A rate over 0 pictures is no figure: the protocol has no prompt of this kind.")
    interval = binomtest(hits, count).proportion_ci(confidence_level=0.95, method="wilson")
    return Rate(hits / count, float(interval.low), float(interval.high), count)


def canvas_protocol(objects: Sequence[str], styles: Sequence[str], seeds: Sequence[int]) -> pd.DataFrame:
    """One row a picture to generate: object, style, seed, prompt."""
    rows = [
        {"object": o, "style": s, "seed": seed, "prompt": caption(o, s)}
        for seed in seeds
        for o in objects
        for s in styles
    ]
    return pd.DataFrame(rows)


def unlearn_accuracy(samples: pd.DataFrame, concept: Concept) -> Rate:
    """UA = 1 - accuracy on the erased concept's prompts: the share not named as the concept."""
    erased = samples[samples[concept.kind] == concept.name]
    return rate(int((erased[f"seen_{concept.kind}"] != concept.name).sum()), len(erased))


def in_domain_retain_accuracy(samples: pd.DataFrame, concept: Concept) -> Rate:
    """IRA: accuracy on the other concepts of the erased one's domain."""
    kept = samples[samples[concept.kind] != concept.name]
    return rate(int((kept[f"seen_{concept.kind}"] == kept[concept.kind]).sum()), len(kept))


def cross_domain_retain_accuracy(samples: pd.DataFrame, concept: Concept) -> Rate:
    """CRA: accuracy of the other domain, on the prompts that do not name the erased concept."""
    other = "style" if concept.kind == "object" else "object"
    kept = samples[samples[concept.kind] != concept.name]
    return rate(int((kept[f"seen_{other}"] == kept[other]).sum()), len(kept))


def scrambled_rate(samples: pd.DataFrame) -> Rate:
    """Share of pictures the judge calls scrambled, by object or style."""
    mush = (samples["seen_object"] == "scrambled") | (samples["seen_style"] == "scrambled")
    return rate(int(mush.sum()), len(samples))


def surrogate_rate(samples: pd.DataFrame, concept: Concept, surrogate: str) -> Rate:
    """Share of the erased concept's prompts that now show the surrogate."""
    erased = samples[samples[concept.kind] == concept.name]
    return rate(int((erased[f"seen_{concept.kind}"] == surrogate).sum()), len(erased))


def neighbour_accuracy(samples: pd.DataFrame, concept: Concept, neighbours: Sequence[str]) -> dict[str, Rate]:
    """Accuracy on each neighbour: the concepts an erasure is most likely to hurt."""
    found = {}
    for name in neighbours:
        rows = samples[samples[concept.kind] == name]
        found[name] = rate(int((rows[f"seen_{concept.kind}"] == name).sum()), len(rows))
    return found


def drift(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> float:
    """Root mean square difference of pictures at equal prompts and seeds, 0..1.

    Accuracies saturate; this does not. Mean over pictures of each picture's RMS   (ours).
    """
    if before.shape != after.shape or len(before) == 0:
        raise DataError(f"Drift compares equal, non-empty sets: got {before.shape} and {after.shape}.")
    difference = (before.astype(np.float32) - after.astype(np.float32)) / 255.0
    return float(np.sqrt((difference**2).mean(axis=(1, 2, 3))).mean())


def summary(samples: pd.DataFrame, concept: Concept, surrogate: str, neighbours: Sequence[str]) -> dict[str, Any]:
    """All accuracies of one judge over one set of samples, JSON-ready."""
    return {
        "ua": asdict(unlearn_accuracy(samples, concept)),
        "ira": asdict(in_domain_retain_accuracy(samples, concept)),
        "cra": asdict(cross_domain_retain_accuracy(samples, concept)),
        "scrambled": asdict(scrambled_rate(samples)),
        "surrogate": asdict(surrogate_rate(samples, concept, surrogate)),
        "neighbours": {name: asdict(r) for name, r in neighbour_accuracy(samples, concept, neighbours).items()},
    }
