"""What is known to be impossible before anything expensive: of a base, a catalog's pictures, a gate, a disk."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pandas as pd

from fade.concepts import Concept
from fade.config import Settings
from fade.data.catalog import load_concepts, load_pictures, load_templates
from fade.errors import BaseModelError, ConfigError, DataError, ResourceError, listing
from fade.evaluation.power import without_power
from fade.models.prompts import Reader, names_unread, readers
from fade.models.source import BaseSource, find_base, identity
from fade.models.tensors import check_weights
from fade.spec import Spec

NEEDED_BYTES = 200 * 2**20
"""Free disk an erasure asks for: DVC's copies, MLflow's artifacts and the base's pictures."""


def checked_base(place: str, expected: str | None) -> tuple[BaseSource, tuple[Reader, ...], str]:
    """A base that can be loaded, what reads its prompts, and its identity."""
    source = find_base(place)
    check_weights(source)
    return source, readers(source), _checked_identity(source, expected)


def _checked_identity(source: BaseSource, expected: str | None) -> str:
    found = identity(source)
    if expected is not None and found != expected:
        raise BaseModelError(
            f"The base model in {source.path} is another one: its hash is {found[:12]}, expected {expected[:12]}. "
            "Restore that base, or ask for this one."
        )
    return found


def check_size(source: BaseSource, table: pd.DataFrame, catalog: str) -> None:
    """Before training: pictures of another size than the base draws."""
    found = _size_of(Path(catalog), table)
    if source.picture_size is not None and found != (source.picture_size, source.picture_size):
        raise DataError(
            f"The pictures of {catalog} are {found[0]} x {found[1]}; the base in {source.path} draws "
            f"{source.picture_size} x {source.picture_size}. Resize the catalog to that, or take another base."
        )


def _size_of(catalog: Path, table: pd.DataFrame) -> tuple[int, ...]:
    if table.empty:
        raise DataError(
            f"{catalog} holds no pictures that are not deleted. Add some, or let the base draw: --data-free."
        )
    return load_pictures(catalog, table.head(1)).shape[1:3]


def check_captions(reading: Sequence[Reader], table: pd.DataFrame, erased: Sequence[Concept], catalog: str) -> None:
    """Before training: captions of one's own that name the concept where no text encoder reads on."""
    if load_templates(Path(catalog)) is not None:
        return
    for one in erased:
        mine = table[table[one.kind] == one.name]
        unread = names_unread(reading, mine["caption"].astype(str).tolist(), (one.name, *one.aliases))
        if unread:
            raise DataError(
                f"{len(unread)} of {len(mine)} captions name the concept only after the {reading[0].length} tokens "
                f"that the base reads, so that it would be taught nothing of it: pictures "
                f"{listing(mine['image_id'].iloc[unread])} of {catalog}. Shorten them, or name the concept sooner."
            )


def check_attacks(settings: Settings, erased: Sequence[Concept]) -> None:
    """Before training: attacks that the gate asks for and that cannot be run."""
    asked = settings.gate.attacks or {}
    if asked and len(erased) > 1:
        raise ConfigError(
            f"gate.attacks asks for {listing(sorted(asked))}, and an attack is of one concept: {len(erased)} are "
            "erased together. Erase each by itself, or leave gate.attacks out."
        )
    if "synonym" in asked and not (erased[0].aliases or settings.attacks.names):
        raise ConfigError(
            "gate.attacks asks for the attack synonym, and the concept has no other name. Give words: attacks.names."
        )


def gate_without_power(spec: Spec) -> list[str]:
    """What the gate asks of an erasure that it can never decide, by the most pictures that it may draw; no names."""
    names = Counter(concept.kind for concept in load_concepts(Path(spec.catalog)).values())
    erased = Counter(pair.kind for pair in spec.pairs)
    other: dict[str, Literal["object", "style"]] = {"object": "style", "style": "object"}
    sure = spec.gate.sure
    seeds = max(len(spec.evaluate.seeds), 0 if sure is None else sure.most)
    rest = (names["object"] - erased["object"]) * (names["style"] - erased["style"])
    counts = {
        "ua": min(names[other[kind]] for kind in erased),
        "ira": rest * len(erased),
        "cra": rest * len(erased),
        "neighbour": min(names[other[kind]] - erased[other[kind]] for kind in erased),
    }
    return without_power(spec.gate, {name: seeds * count for name, count in counts.items()})


def check_disk(folder: Path, *, needed: int = NEEDED_BYTES) -> None:
    """Raise ResourceError if less than ``needed`` bytes are free where ``folder`` lies."""
    free = shutil.disk_usage(folder.resolve()).free
    if free < needed:
        raise ResourceError(
            f"Too little free disk for an erasure: {free // 2**20} MiB free in {folder.resolve()}, "
            f"{needed // 2**20} MiB needed. Free some, or move the project."
        )
