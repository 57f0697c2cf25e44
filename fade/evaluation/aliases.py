"""Further names of an erased concept, given by whoever asked for it: their prompts are judged as the concept's.

The protocol's prompts use the names of the catalog. A name that a request brings is asked in sentences of its own, with
the same seeds, and its UA stands by itself: pooled, one that the base never knew would make the others look better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd

from fade.concepts import Concept, caption
from fade.evaluation.figures import OfName, rate


def alias_samples(
    names: Sequence[tuple[Concept, str]],
    objects: Sequence[str],
    styles: Sequence[str],
    seeds: Sequence[int],
    *,
    template: str,
    say: Callable[[str, str, str], str] = caption,
) -> pd.DataFrame:
    """One row a picture, as the protocol's: object and style are what the picture must no longer show, or keep.

    ``concept`` and ``name`` say which of the names the prompt uses.

    Args:
        say: fills an object and a style into the template.
    """
    rows = []
    for concept, name in names:
        for other in styles if concept.kind == "object" else objects:
            named = (name, other) if concept.kind == "object" else (other, name)
            shown = (concept.name, other) if concept.kind == "object" else (other, concept.name)
            rows += [
                {"object": shown[0], "style": shown[1], "seed": seed, "prompt": say(*named, template)}
                | {"kind": concept.kind, "concept": concept.name, "name": name}
                for seed in seeds
            ]
    return pd.DataFrame(rows)


def alias_figures(seen: pd.DataFrame) -> dict[str, OfName]:
    """UA of each name: the share of its pictures that a judge does not take for the concept."""
    found = {}
    for (kind, concept, name), rows in seen.groupby(["kind", "concept", "name"], sort=False):
        ua = rate(int((rows[f"seen_{kind}"] != concept).sum()), len(rows))
        found[str(name)] = OfName(ua=ua)
    return found
