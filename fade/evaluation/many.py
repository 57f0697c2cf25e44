"""Figures of many concepts erased at once: what is gone, what is left, and what lies next to what is gone   (ours).

The yardstick of the field is a hundred celebrities (MACE, arXiv:2403.06135, section 4.2): how often an erased one is
still recognised, how often a kept one is, and the harmonic mean of both. Asked here besides: of the kept ones those
that are neighbours of an erased one, which pay the price; and what of the erased can be reached at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fade.concepts import CAPTION_TEMPLATE, Concept, caption
from fade.errors import DataError
from fade.evaluation.accuracy import drift, scrambled_rate
from fade.evaluation.figures import Rate, rate

LEAST_PROMPTS, ERASED_PROMPTS, KEPT_PROMPTS = 2, 200, 160
"""Prompts of an erased concept at least; about as many of all erased ones, and of all that is kept."""
Pair = tuple[Concept, Concept | None]
Pictures = NDArray[np.uint8]


def many_protocol(
    pairs: Sequence[Pair],
    names: tuple[Sequence[str], Sequence[str]],
    seeds: Sequence[int],
    *,
    neighbours: frozenset[str],
    template: str = CAPTION_TEMPLATE,
) -> dict[str, pd.DataFrame]:
    """The prompts: object, style, seed, prompt, and ``concept``, whose row it is.

    An erased object is asked for in kept styles, which take turns, an erased style of kept objects; so is what is kept.

    Args:
        names: all objects and all styles.
        seeds: of the pictures; the more concepts, the fewer of them are used.
        neighbours: of the kept those that count as neighbours.

    Returns:
        ``erased``; ``instead``, the same prompts with the surrogate's name (``instead`` has no row of *nothing*), with
        the erased concept in ``concept``; ``kept``, with ``near``.

    Raises:
        DataError: no seed, nothing is erased, or of a kind nothing is kept.
    """
    if not seeds or not pairs:
        raise DataError(f"Many at once needs concepts and seeds: got {len(pairs)} and {len(seeds)}.")
    gone = {concept.name for concept, _ in pairs}
    kept = {
        "object": [name for name in names[0] if name not in gone],
        "style": [name for name in names[1] if name not in gone],
    }
    for kind, left in kept.items():
        if not left:
            raise DataError(f"Nothing is kept of the kind {kind}: {len(gone)} concepts are erased. Erase fewer.")
    each = max(LEAST_PROMPTS, ERASED_PROMPTS // len(pairs))
    erased, instead = [], []
    for number, (concept, surrogate) in enumerate(pairs):
        for beside, seed in _turns(kept["style" if concept.kind == "object" else "object"], seeds, each, number):
            erased.append((concept.name, *_placed(concept.name, concept.kind, beside), seed))
            if surrogate is not None:
                instead.append((concept.name, *_placed(surrogate.name, concept.kind, beside), seed))
    kinds = {concept.kind for concept, _ in pairs}
    each = max(1, KEPT_PROMPTS // sum(len(kept[kind]) for kind in kinds))
    others = [
        (name, *_placed(name, kind, beside), seed)
        for kind in sorted(kinds)
        for number, name in enumerate(kept[kind])
        for beside, seed in _turns(kept["style" if kind == "object" else "object"], seeds, each, number)
    ]
    columns = ["concept", "object", "style", "seed"]
    parts = {
        name: pd.DataFrame(rows, columns=columns)
        for name, rows in (("erased", erased), ("instead", instead), ("kept", others))
    }
    parts["kept"]["near"] = parts["kept"]["concept"].isin(neighbours)
    return {
        name: part.assign(prompt=[caption(o, s, template) for o, s in zip(part["object"], part["style"], strict=True)])
        for name, part in parts.items()
    }


def _turns(beside: Sequence[str], seeds: Sequence[int], count: int, number: int) -> list[tuple[str, int]]:
    """``count`` pairs of what stands beside a concept and a seed, evenly spread; every concept begins at another."""
    whole = len(beside) * len(seeds)
    places = [place * whole // min(count, whole) for place in range(min(count, whole))]
    return [(beside[(number + place) % len(beside)], seeds[place // len(beside)]) for place in places]


def _placed(name: str, kind: str, beside: str) -> tuple[str, str]:
    return (name, beside) if kind == "object" else (beside, name)


def many_figures(
    before: Mapping[str, pd.DataFrame],
    after: Mapping[str, pd.DataFrame],
    pictures: tuple[Pictures, Pictures],
    pairs: Sequence[Pair],
) -> dict[str, Any]:
    """A row's figures; shares are fractions of 1.

    Args:
        before: ``instead`` and ``kept`` with ``seen_object`` and ``seen_style``, of the base's own pictures.
        after: ``erased`` and ``kept`` with the adapter.
        pictures: of ``kept``, before and after.

    Returns:
        Each with ``_low``, ``_high`` (95 %, Wilson) and ``_count``, but for the last four:

        - erased: share of the erased concepts' prompts that are *not* called by the concept's name; reachable: the same
          of the base's own pictures of the surrogates, which is the most that can be asked.
        - surrogate_share, reachable_surrogate: prompts that show the surrogate; the surrogate's own that do, by the
          base. mush: erased prompts in which the judge sees nothing it knows.
        - kept, base_kept: kept concepts called by their name; neighbours, others and their ``base_``: of these the
          neighbours of an erased concept, and the rest, where there are any. beside, base_beside: of the same prompts
          the other domain.
        - drift over ``kept``; harmonic: mean of ``erased`` and ``kept``; concepts: by name the share of its prompts
          that is erased; moved: by kept name the drift of its pictures.
    """
    kinds = {concept.name: concept.kind for concept, _ in pairs}
    stand_in = {concept.name: None if other is None else other.name for concept, other in pairs}

    def shown(part: pd.DataFrame, *, beside: bool = False) -> Rate:
        rows = [(row, _kind_of(row) if not beside else _other(_kind_of(row))) for row in part.to_dict("records")]
        return rate(sum(row[f"seen_{kind}"] == row[kind] for row, kind in rows), len(rows))

    def gone(part: pd.DataFrame) -> Rate:
        found = [row[f"seen_{kinds[row['concept']]}"] != row["concept"] for row in part.to_dict("records")]
        return rate(sum(found), len(found))

    def instead(part: pd.DataFrame) -> Rate:
        rows = [row for row in part.to_dict("records") if stand_in[row["concept"]] is not None]
        hits = sum(row[f"seen_{kinds[row['concept']]}"] == stand_in[row["concept"]] for row in rows)
        return rate(hits, len(rows))

    rates = {"erased": gone(after["erased"]), "mush": scrambled_rate(after["erased"])}
    if len(before["instead"]):
        rates |= {"reachable": gone(before["instead"]), "surrogate_share": instead(after["erased"])}
        rates["reachable_surrogate"] = instead(before["instead"])
    for prefix, side in (("", after["kept"]), ("base_", before["kept"])):
        rates |= {f"{prefix}kept": shown(side), f"{prefix}beside": shown(side, beside=True)}
        for name, part in (("neighbours", side[side["near"]]), ("others", side[~side["near"]])):
            if len(part):
                rates[f"{prefix}{name}"] = shown(part)
    row: dict[str, Any] = {}
    for name, found in rates.items():
        row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high, f"{name}_count": found.count}
    row["drift"] = drift(*pictures)
    both = row["erased"], row["kept"]
    row["harmonic"] = 2 / sum(1 / one for one in both) if all(both) else 0.0
    by_name = after["erased"].groupby("concept", sort=False)
    row["concepts"] = {str(name): gone(part).value for name, part in by_name}
    whose = after["kept"]["concept"].to_numpy()
    row["moved"] = {str(name): drift(*(side[whose == name] for side in pictures)) for name in dict.fromkeys(whose)}
    return row


def _kind_of(row: Mapping[Any, Any]) -> str:
    return "object" if row["object"] == row["concept"] else "style"


def _other(kind: str) -> str:
    return "style" if kind == "object" else "object"
