"""Splits: which pictures to forget, which to keep, which nobody trains on.

forget      pictures of the concept, captioned with one of its names; ``surrogate_caption`` is the same
            sentence with the surrogate's name, and differs in nothing else (but in other erased names)
surrogate   pictures of the surrogate under the concept's caption: z_t at high noise must turn towards
            the surrogate from either picture (ours); of ``nothing``, other pictures
retain      balanced over every other pair, captioned as they are
holdout     unseen pictures of every pair
held_out    those of them that show the concept, with paired captions: they decide when training may stop
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType

import numpy as np
import pandas as pd

from fade.concepts import CAPTION_TEMPLATE, PARAPHRASES, Concept, caption
from fade.data.catalog import find_concept
from fade.errors import DataError, listing
from fade.names import mention, name_key
from fade.seeding import numpy_generator
from fade.spec import Pair

NOTHING, NO_CAPTION = "nothing", ""
"""As a surrogate, *nothing* stands for what the empty prompt gives."""
TEMPLATES = (CAPTION_TEMPLATE, *PARAPHRASES)
SPLIT_NAMES = ("forget", "surrogate", "retain", "holdout", "held_out")


def find_pairs(concepts: dict[str, Concept], pairs: Iterable[Pair]) -> list[tuple[Concept, Concept | None]]:
    """Concepts with their surrogates; None is ``nothing``. What a request adds to a concept (names) is the concept's.

    Raises:
        ConfigError: one of them is not in the catalog.
    """
    return [
        (
            replace(find_concept(concepts, pair.concept), aliases=pair.aliases, person=pair.person),
            None if pair.surrogate == NOTHING else find_concept(concepts, pair.surrogate),
        )
        for pair in pairs
    ]


def make_splits(
    table: pd.DataFrame,
    pairs: Sequence[tuple[Concept, Concept | None]],
    *,
    forget_per_pair: int,
    retain_per_pair: int,
    holdout_per_pair: int,
    seed: int,
    templates: Sequence[str] | None = TEMPLATES,
    selected: Mapping[str, frozenset[str]] = MappingProxyType({}),
    overwrite: Mapping[str, Mapping[str, Concept | None]] = MappingProxyType({}),
    spoken: Mapping[str, Sequence[str]] = MappingProxyType({}),
    neighbours: frozenset[str] = frozenset(),
    neighbour_factor: int = 1,
) -> dict[str, pd.DataFrame]:
    """Cut a catalog's table into the splits.

    Args:
        table: a catalog's rows; ``split`` says which are train and which holdout.
        pairs: each concept that is erased with its surrogate, or None for nothing. A picture that shows
            several of them has a target caption in which each gives way to its surrogate; where one gives
            way to nothing, that caption is the empty prompt.
        forget_per_pair: pictures of the concept (and of the surrogate) for each other-domain concept.
        templates: sentences that caption the pictures, the first canonical; None: each keeps its own caption.
        selected: by concept, ids of pictures that must be forgotten: then its forget set is exactly these, and its
            other pictures are in no training set.
        overwrite: by concept, picture ids to what each gives way to instead of the surrogate.
        spoken: by concept, names of it that some caption must have, whatever the draw.
        neighbours: concepts most like those erased; ``neighbour_factor`` times as many of their pictures are
            retained, as an erasure hurts them first.

    Raises:
        DataError: the catalog holds no picture of the concept or of the surrogate, or nothing to retain.
    """
    if named := frozenset().union(*selected.values()):
        table = table.assign(split=table["split"].where(~table["image_id"].isin(named), "train"))
    train, holdout_rows = table[table["split"] == "train"], table[table["split"] == "holdout"]
    holdout = _draw(holdout_rows, holdout_per_pair, seed, "holdout")
    shown = [train[concept.kind] == concept.name for concept, _ in pairs]
    erased = pd.concat(shown, axis=1).any(axis=1) if shown else pd.Series(False, index=train.index)
    parts: dict[str, list[pd.DataFrame]] = {"forget": [], "surrogate": [], "held_out": []}
    for concept, surrogate in pairs:
        captioned = partial(_paired_captions, concept=concept, seed=seed, templates=templates)
        parts["held_out"].append(captioned(holdout[holdout[concept.kind] == concept.name], pairs=pairs))
        own = dict(overwrite.get(concept.name, {}))
        named = selected.get(concept.name, frozenset())
        forget = _forget_rows(train, concept, named, frozenset(own), per_pair=forget_per_pair, seed=seed)
        surrogates = dict.fromkeys((surrogate, *(own[name] for name in sorted(own))))
        others = train[~erased] if templates is not None else _naming(train[~erased], concept.kind)
        stand_ins = _surrogate_rows(others, concept, surrogates, per_pair=forget_per_pair, seed=seed)
        for name, rows in _learnt(forget, stand_ins, concept, pairs, own=own, captioned=captioned).items():
            parts[name].append(_with_every_name(rows, concept, spoken.get(concept.name, ())))
    paired = {
        name: pd.concat(tables, ignore_index=True).drop_duplicates(["image_id", "caption"], ignore_index=True)
        for name, tables in parts.items()
    }
    rest = _rest(train, erased, pairs, taken=paired["surrogate"])
    retain = _draw(rest, retain_per_pair, seed, "retain", more_of=neighbours, factor=neighbour_factor)
    retain = retain.reset_index(drop=True) if templates is None else _varied_captions(retain, seed, templates)
    return {**paired, "retain": retain, "holdout": holdout.reset_index(drop=True)}


def _learnt(
    forget: pd.DataFrame,
    stand_ins: Mapping[Concept | None, pd.DataFrame],
    concept: Concept,
    pairs: Sequence[tuple[Concept, Concept | None]],
    *,
    own: Mapping[str, Concept | None],
    captioned: Callable[..., pd.DataFrame],
) -> dict[str, pd.DataFrame]:
    """Pictures of a concept and of what it gives way to, each with its captions before and after.

    Args:
        stand_ins: pictures of each surrogate of the concept.
        own: picture ids to what each gives way to instead of the concept's surrogate.
    """
    tables: dict[str, list[pd.DataFrame]] = {"forget": [], "surrogate": []}
    surrogate = dict(pairs)[concept]
    for instead, drawn in stand_ins.items():
        changed = [(other, instead if other == concept else its) for other, its in pairs]
        given = [own.get(name, surrogate) == instead for name in forget["image_id"]]
        tables["forget"].append(captioned(forget[given], pairs=changed))
        tables["surrogate"].append(captioned(drawn, pairs=changed))
    return {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()}


def _rest(
    train: pd.DataFrame,
    erased: pd.Series,
    pairs: Sequence[tuple[Concept, Concept | None]],
    *,
    taken: pd.DataFrame,
) -> pd.DataFrame:
    """Training pictures that show nothing that is erased, without those that stand in for it.

    Raises:
        DataError: there are none.
    """
    if erased.all():
        names = ", ".join(repr(concept.name) for concept, _ in pairs)
        raise DataError(f"The retain set is empty: every picture of the catalog shows {names}.")
    return train[~erased & ~train["image_id"].isin(taken["image_id"])]


def _naming(rows: pd.DataFrame, kind: str) -> pd.DataFrame:
    """Those whose own captions name what they show: only there can the concept's name take its place."""
    said = [
        re.search(mention(name), caption) is not None for name, caption in zip(rows[kind], rows["caption"], strict=True)
    ]
    return rows[pd.Series(said, index=rows.index, dtype=bool)]


def _forget_rows(
    train: pd.DataFrame,
    concept: Concept,
    selected: frozenset[str],
    overwritten: frozenset[str],
    *,
    per_pair: int,
    seed: int,
) -> pd.DataFrame:
    """The concept's pictures to forget: all that are selected, or as many as are drawn of each pair.

    Args:
        overwritten: ids of pictures with a surrogate of their own, which are among them whatever the draw.

    Raises:
        DataError: there are none, or what is named does not show the concept.
    """
    shows_it = train[concept.kind] == concept.name
    candidates = train[_selected(train, concept, selected) if selected else shows_it]
    if unknown := sorted(overwritten - set(train[shows_it]["image_id"])):
        raise DataError(
            f"What is overwritten by something of its own does not show {concept.name!r}, or is no training "
            f"picture: {listing(unknown)}."
        )
    _check_shown("forget set is empty", candidates, concept.kind, concept.name)
    drawn = _draw(candidates, max(per_pair, len(selected)), seed, "forget")
    ids = candidates["image_id"]
    further = candidates[ids.isin(overwritten) & ~ids.isin(drawn["image_id"])]
    return pd.concat([drawn, further]).sort_values("image_id") if len(further) else drawn


def _surrogate_rows(
    others: pd.DataFrame, concept: Concept, surrogates: Iterable[Concept | None], *, per_pair: int, seed: int
) -> dict[Concept | None, pd.DataFrame]:
    """Pictures of each surrogate; of nothing, which has none, as many of the others, few of each (object, style).

    Args:
        others: training pictures that show nothing that is erased.

    Raises:
        DataError: a surrogate has no pictures.
    """
    rows = {}
    for surrogate in surrogates:
        shown = others if surrogate is None else others[others[concept.kind] == surrogate.name]
        name = "anything else" if surrogate is None else surrogate.name
        _check_shown("surrogate has no pictures", shown, concept.kind, name)
        rows[surrogate] = _draw(shown, per_pair, seed, "surrogate")
        if surrogate is None:
            other = "style" if concept.kind == "object" else "object"
            order = numpy_generator(seed, "split", "nothing").permutation(len(rows[surrogate]))
            few = rows[surrogate].iloc[order].groupby(other, sort=True).head(per_pair)
            rows[surrogate] = few.sort_values("image_id")
    return rows


def _check_shown(role: str, rows: pd.DataFrame, domain: str, name: str) -> None:
    if rows.empty:
        raise DataError(
            f"The {role}: the catalog holds 0 training pictures whose {domain} is {name!r}, expected at least 1."
        )


def _draw(
    table: pd.DataFrame,
    per_pair: int,
    seed: int,
    purpose: str,
    *,
    more_of: frozenset[str] = frozenset(),
    factor: int = 1,
) -> pd.DataFrame:
    """At most ``per_pair`` rows of each (object, style), without regard to the order of the table.

    Of pairs with a concept of ``more_of`` at most ``factor`` times as many; what is drawn otherwise stays drawn.
    """
    table = table.sort_values("image_id")
    order = numpy_generator(seed, "split", purpose).permutation(len(table))
    shuffled = table.iloc[order]
    number = shuffled.groupby(["object", "style"], sort=True).cumcount()
    near = shuffled["object"].isin(more_of) | shuffled["style"].isin(more_of)
    return shuffled[number < per_pair * near.map({True: factor, False: 1})].sort_values("image_id")


def _selected(train: pd.DataFrame, concept: Concept, selected: frozenset[str]) -> pd.Series:
    """Which rows are selected.

    Raises:
        DataError: one of them is not in the catalog, or does not show the concept.
    """
    rows = train["image_id"].isin(selected)
    if missing := sorted(selected - set(train["image_id"])):
        raise DataError(f"The catalog holds no picture {listing(missing)}: deleted, or of another catalog.")
    if others := train[rows & (train[concept.kind] != concept.name)]["image_id"].tolist():
        raise DataError(f"Pictures to forget do not show the concept: {listing(others)}. Name their concept.")
    return rows


def differs_in_names_alone(said: str, target: str, pairs: Iterable[tuple[Sequence[str], str]]) -> bool:
    """Whether a caption became its target by nothing but erased names that gave way to their surrogates.

    Args:
        pairs: the names of each erased concept, and its surrogate or ``nothing``.
    """
    pairs = list(pairs)
    instead = {name_key(name): surrogate for names, surrogate in pairs for name in names}
    parts = re.split(mention(*(name for names, _ in pairs for name in names)), said)
    if target == NO_CAPTION:
        return any(instead[name_key(name)] == NOTHING for name in parts[1::2])
    # A name may be part of the sentence that stays: "a photo of a cat" where the style photo is erased.
    allowed = [rf"({re.escape(name)}|{re.escape(instead[name_key(name)])})" for name in parts[1::2]]
    between = [re.escape(part) for part in parts[::2]]
    pattern = "".join(text for both in zip(between, [*allowed, ""], strict=True) for text in both)
    return said.lower() != target.lower() and re.fullmatch(pattern, target, re.IGNORECASE) is not None


def _templates(count: int, seed: int, purpose: str, templates: Sequence[str]) -> list[str]:
    """Half the rows carry the canonical template, the others a paraphrase."""
    canonical, *others = templates
    drawn = (*[canonical] * max(1, len(others)), *others)
    return [drawn[i] for i in numpy_generator(seed, "captions", purpose).integers(0, len(drawn), count)]


def _own_captions(
    table: pd.DataFrame, concept: Concept, pairs: Sequence[tuple[Concept, Concept | None]]
) -> pd.DataFrame:
    """Each picture's own caption, and the same with every erased name of its picture given way."""
    table = table.reset_index(drop=True)
    captions: list[str] = table["caption"].tolist()
    targets: list[str] = []
    for row in table.to_dict("records"):
        target, shown = row["caption"], {row["object"], row["style"], concept.name}
        for erased, surrogate in pairs:
            # What the pictures that stand in for the concept are told is the concept's name.
            own = row[concept.kind] if surrogate is None else surrogate.name
            if erased == concept and own in shown and own != erased.name:
                row["caption"] = _renamed(row["caption"], (own,), erased.name)
                captions[len(targets)] = row["caption"]
            if surrogate is None and erased.name in shown:
                target = NO_CAPTION
            elif surrogate is not None:
                target = _renamed(target, (erased.name, *erased.aliases), surrogate.name)
        targets.append(target)
    return table.assign(caption=captions, surrogate_caption=targets)


def _renamed(caption: str, names: Sequence[str], instead: str) -> str:
    return re.sub(mention(*names), lambda _: instead, caption)  # a function: a name may hold a backslash


def _paired_captions(
    table: pd.DataFrame,
    concept: Concept,
    pairs: Sequence[tuple[Concept, Concept | None]],
    seed: int,
    templates: Sequence[str] | None,
) -> pd.DataFrame:
    """Captions that name the concept, and the same with every erased name given way."""
    if templates is None:
        return _own_captions(table, concept, pairs)
    table = table.reset_index(drop=True)
    names = (*[concept.name] * max(1, 2 * len(concept.aliases)), *concept.aliases)
    draws: np.ndarray = numpy_generator(seed, "names").integers(0, len(names), len(table))
    captions, targets = [], []
    for row, template, draw in zip(
        table.to_dict("records"), _templates(len(table), seed, "forget", templates), draws, strict=True
    ):
        said = {"object": row["object"], "style": row["style"], concept.kind: concept.name}
        instead, to_nothing = dict(said), False
        for erased, surrogate in pairs:
            if said[erased.kind] == erased.name:
                to_nothing |= surrogate is None
                instead[erased.kind] = erased.name if surrogate is None else surrogate.name
        said[concept.kind] = names[draw]
        captions.append(caption(said["object"], said["style"], template))
        targets.append(NO_CAPTION if to_nothing else caption(instead["object"], instead["style"], template))
    return table.assign(caption=captions, surrogate_caption=targets)


def _with_every_name(table: pd.DataFrame, concept: Concept, names: Sequence[str]) -> pd.DataFrame:
    """With a row more for each name that no caption has: of few pictures the draw may leave one out."""
    rows = [table]
    for number, name in enumerate(names):
        if any(re.search(mention(name), said) for said in table["caption"]):
            continue
        row = table.iloc[[number % len(table)]]
        said = [_renamed(caption, (concept.name, *concept.aliases), name) for caption in row["caption"]]
        rows.append(row.assign(caption=said))
    return pd.concat(rows, ignore_index=True) if len(rows) > 1 else table


def _varied_captions(table: pd.DataFrame, seed: int, templates: Sequence[str]) -> pd.DataFrame:
    table = table.reset_index(drop=True)
    captions = [
        caption(object_name, style_name, template)
        for object_name, style_name, template in zip(
            table["object"], table["style"], _templates(len(table), seed, "retain", templates), strict=True
        )
    ]
    return table.assign(caption=captions)
