"""Figures of one erasure among many concepts: its own prompts, its neighbours', and a sample of all others'   (ours).

Every pair of a hundred objects and more with each seed would take an hour a method and concept. So the concept's own
prompts are drawn in full, its neighbours' once in every style, and of the rest every object in two styles, or in one
where there are more than ``MANY`` objects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fade.concepts import CAPTION_TEMPLATE, Concept, caption
from fade.errors import DataError
from fade.evaluation.accuracy import (
    domain_accuracy,
    drift,
    reachable,
    scrambled_rate,
    split_domains,
    surrogate_rate,
    unlearn_accuracy,
)
from fade.evaluation.figures import rate

PARTS = ("concept", "surrogate", "neighbours", "rest")
MANY = 64
Pictures = NDArray[np.uint8]


def wide_protocol(
    concept: Concept,
    surrogate: Concept | None,
    neighbours: Sequence[str],
    names: tuple[Sequence[str], Sequence[str]],
    seeds: Sequence[int],
    *,
    template: str = CAPTION_TEMPLATE,
) -> dict[str, pd.DataFrame]:
    """The prompts by part: object, style, seed, prompt.

    Of an object its prompts are in every style with every seed, of a style of every object with the first seed; of
    the surrogate the same. Neighbours of an object come once in every style; those of a style take turns over the
    objects, each once. ``rest`` is every object in two styles (of more than ``MANY`` objects in one), which take turns,
    so that it is the same for all concepts; those that name the concept are left out.

    Args:
        names: all objects and all styles.

    Raises:
        DataError: no seed.
    """
    if not seeds:
        raise DataError("The wide protocol needs a seed: got none. Give evaluate.seeds one.")

    objects, styles = names

    def whole(asked: Sequence[str], with_seeds: Sequence[int]) -> list[tuple[str, str, int]]:
        if concept.kind == "object":
            return [(name, style, seed) for seed in with_seeds for name in asked for style in styles]
        return [(one, name, seed) for seed in with_seeds for name in asked for one in objects]

    def beside() -> list[tuple[str, str, int]]:
        if concept.kind == "object" or not neighbours:
            return whole(list(neighbours), seeds[:1])
        return [(one, neighbours[i % len(neighbours)], seeds[0]) for i, one in enumerate(objects)]

    own = list(seeds) if concept.kind == "object" else list(seeds[:1])
    turns = [
        (one, styles[(number + turn * (len(styles) // 2)) % len(styles)], seeds[turn % len(seeds)])
        for turn in range(1 if len(objects) > MANY else 2)
        for number, one in enumerate(objects)
    ]
    rows = {
        "concept": whole([concept.name], own),
        "surrogate": [] if surrogate is None else whole([surrogate.name], own),
        "neighbours": beside(),
        "rest": [row for row in turns if concept.name not in row[:2]],
    }
    columns = ["object", "style", "seed"]
    parts = {name: pd.DataFrame(found, columns=columns) for name, found in rows.items()}
    return {
        name: part.assign(prompt=[caption(o, s, template) for o, s in zip(part["object"], part["style"], strict=True)])
        for name, part in parts.items()
    }


def wide_figures(
    before: Mapping[str, pd.DataFrame],
    after: Mapping[str, pd.DataFrame],
    pictures: tuple[Pictures, Pictures],
    concept: Concept,
    surrogate: Concept | None,
) -> dict[str, Any]:
    """A row's figures; shares are fractions of 1.

    Args:
        before: parts of the protocol with ``seen_object`` and ``seen_style``, of the base's own pictures.
        after: the same with the adapter; of ``surrogate`` only what the base draws is asked.
        pictures: of ``rest``, before and after.

    Returns:
        Each with ``_low``, ``_high`` (95 %, Wilson) and ``_count``, but for the last two:

        - ua, ira, cra, and their ``base_`` (values alone): of ua how often the base's own pictures are not called by
          the concept's name.
        - surrogate_share, mush and base_mush of the concept's prompts; reachable_ua, reachable_surrogate and
          reachable_mush of the base's own pictures of the surrogate (``fade.evaluation.accuracy.reachable``).
        - neighbours, base_neighbours: accuracy on their prompts.
        - drift over ``rest``; harmonic: mean of UA, IRA and CRA.
    """
    kind, (own,), (other,) = concept.kind, *split_domains([concept])
    rates = {
        "ua": unlearn_accuracy(after["concept"], concept),
        "ira": domain_accuracy(after["rest"], [concept], own),
        "cra": domain_accuracy(after["rest"], [concept], other),
        "mush": scrambled_rate(after["concept"]),
        "base_mush": scrambled_rate(before["concept"]),
    }
    if surrogate is not None:
        best = reachable(before["surrogate"], [(concept, surrogate.name)])[concept.name]
        rates["surrogate_share"] = surrogate_rate(after["concept"], concept, surrogate.name)
        rates |= {"reachable_ua": best.ua, "reachable_surrogate": best.surrogate, "reachable_mush": best.mush}
    for name, side in (("neighbours", after), ("base_neighbours", before)):
        part = side["neighbours"]
        if len(part):
            rates[name] = rate(int((part[f"seen_{kind}"] == part[kind]).sum()), len(part))
    row: dict[str, Any] = {}
    for name, found in rates.items():
        row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high, f"{name}_count": found.count}
    row["base_ua"] = unlearn_accuracy(before["concept"], concept).value
    row["base_ira"] = domain_accuracy(before["rest"], [concept], own).value
    row["base_cra"] = domain_accuracy(before["rest"], [concept], other).value
    row["drift"] = drift(*pictures)
    three = [row["ua"], row["ira"], row["cra"]]
    row["harmonic"] = 3 / sum(1 / one for one in three) if all(three) else 0.0
    return row


def wide_scatter(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """What each erasure overwrote against what it cost: a pale dot an erasure, a mark for each method's mean.

    Args:
        rows: as ``wide_figures`` gives them, each with its ``method``.
    """
    table = pd.DataFrame(rows)
    table["overwritten"] = table["surrogate_share"] / table["reachable_surrogate"].clip(lower=1e-9)
    for name in ("neighbours", "ira", "cra"):
        table[name] = 100 * (table[name] - table[f"base_{name}"])
    prices = {"neighbours": "neighbours, points", "ira": "IRA, points", "cra": "CRA, points", "drift": "drift"}
    figure = Figure(figsize=(12.5, 3.8), layout="constrained")
    for panel, (price, label) in zip(figure.subplots(1, len(prices), sharey=True), prices.items(), strict=True):
        for number, (method, own) in enumerate(table.groupby("method", sort=False)):
            panel.scatter(own[price], own["overwritten"], s=14, color=f"C{number}", alpha=0.35)
            panel.scatter(own[price].mean(), own["overwritten"].mean(), s=70, color=f"C{number}", label=str(method))
        panel.set(xlabel=label)
        panel.grid(color="0.92")
        if price == "neighbours":
            panel.set_ylabel("surrogate shown, of the reachable")
            panel.legend(frameon=False, fontsize=8)
    figure.suptitle(f"Overwritten against what it cost, after less before ({len(table)} erasures)", fontsize=11)
    return figure
