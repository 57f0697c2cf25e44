"""Splits: which pictures to forget, which to keep, which nobody trains on.

forget      pictures of the concept, captioned with one of its names; ``surrogate_caption`` is the same
            sentence with the surrogate's name, and differs in nothing else
surrogate   pictures of the surrogate under the concept's caption: z_t at high noise must turn towards
            the surrogate from either picture (ours)
retain      balanced over every other pair, captioned as they are
holdout     unseen pictures of every pair
held_out    those of them that show the concept, with paired captions: they decide when training may stop
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from fade.concepts import CAPTION_TEMPLATE, PARAPHRASES, Concept, caption
from fade.errors import DataError
from fade.seeding import numpy_generator

SPLIT_NAMES = ("forget", "surrogate", "retain", "holdout", "held_out")


def make_splits(
    table: pd.DataFrame,
    concept: Concept,
    surrogate: Concept,
    *,
    forget_per_pair: int,
    retain_per_pair: int,
    holdout_per_pair: int,
    seed: int,
) -> dict[str, pd.DataFrame]:
    """Cut a catalog's table into the four splits.

    Args:
        table: a catalog's rows; ``split`` says which are train and which holdout.
        forget_per_pair: pictures of the concept (and of the surrogate) for each other-domain concept.

    Raises:
        DataError: the catalog holds no picture of the concept or of the surrogate, or nothing to retain.
    """
    domain = concept.kind
    train = table[table["split"] == "train"]
    shows_concept, shows_surrogate = train[domain] == concept.name, train[domain] == surrogate.name
    for found, name, role in (
        (shows_concept, concept.name, "forget set is empty"),
        (shows_surrogate, surrogate.name, "surrogate has no pictures"),
    ):
        if not found.any():
            raise DataError(
                f"The {role}: the catalog holds 0 training pictures whose {domain} is {name!r}, expected at least 1."
            )
    if shows_concept.all():
        raise DataError(f"The retain set is empty: every picture of the catalog shows the {domain} {concept.name!r}.")
    forget = _draw(train[shows_concept], forget_per_pair, seed, "forget")
    stand_ins = _draw(train[shows_surrogate], forget_per_pair, seed, "surrogate")
    rest = train[~shows_concept & ~train["image_id"].isin(stand_ins["image_id"])]
    retain = _draw(rest, retain_per_pair, seed, "retain")
    holdout = _draw(table[table["split"] == "holdout"], holdout_per_pair, seed, "holdout")
    return {
        "forget": _paired_captions(forget, concept, surrogate, seed),
        "surrogate": _paired_captions(stand_ins, concept, surrogate, seed),
        "retain": _varied_captions(retain, seed),
        "holdout": holdout.reset_index(drop=True),
        "held_out": _paired_captions(holdout[holdout[domain] == concept.name], concept, surrogate, seed),
    }


def _draw(table: pd.DataFrame, per_pair: int, seed: int, purpose: str) -> pd.DataFrame:
    """At most ``per_pair`` rows of each (object, style), without regard to the order of the table."""
    table = table.sort_values("image_id")
    order = numpy_generator(seed, "split", purpose).permutation(len(table))
    shuffled = table.iloc[order]
    return shuffled.groupby(["object", "style"], sort=True).head(per_pair).sort_values("image_id")


def _templates(count: int, seed: int, purpose: str) -> list[str]:
    """Half the rows carry the canonical template, the others a paraphrase."""
    templates = (*[CAPTION_TEMPLATE] * len(PARAPHRASES), *PARAPHRASES)
    return [templates[i] for i in numpy_generator(seed, "captions", purpose).integers(0, len(templates), count)]


def _paired_captions(table: pd.DataFrame, concept: Concept, surrogate: Concept, seed: int) -> pd.DataFrame:
    table = table.reset_index(drop=True)
    names = (*[concept.name] * max(1, 2 * len(concept.aliases)), *concept.aliases)
    draws: np.ndarray = numpy_generator(seed, "names").integers(0, len(names), len(table))
    captions, targets = [], []
    for row, template, draw in zip(
        table.to_dict("records"), _templates(len(table), seed, "forget"), draws, strict=True
    ):
        pair = {"object": row["object"], "style": row["style"]}
        pair[concept.kind] = names[draw]
        captions.append(caption(pair["object"], pair["style"], template))
        pair[concept.kind] = surrogate.name
        targets.append(caption(pair["object"], pair["style"], template))
    return table.assign(caption=captions, surrogate_caption=targets)


def _varied_captions(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    table = table.reset_index(drop=True)
    captions = [
        caption(object_name, style_name, template)
        for object_name, style_name, template in zip(
            table["object"], table["style"], _templates(len(table), seed, "retain"), strict=True
        )
    ]
    return table.assign(caption=captions)
