"""Many concepts to erase by one adapter: read from a file, checked against each other, and changed one by one.

Whatever order they were given in, they stand in the order of their names: so an erasure to which one was added, or
from which one was taken, is the same one (by its id, and bit for bit) as if it had been asked for so from the start.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from fade.asking.prepare import AUTO, Wanted, asked_again
from fade.asking.tables import read_table
from fade.errors import ConfigError, listing
from fade.names import name_key
from fade.spec import Pair

MANY = "layerwise-tuned"
"""The method that many concepts are erased by, unless another one is named."""
COLUMNS = ("concept", "surrogate", "aliases", "kind")


def read_concepts(path: Path) -> list[Wanted]:
    """What is to be erased: a table (CSV, JSON or JSON lines), a row each, in the order of the names.

    Columns are ``concept``, and where wanted ``surrogate`` (``auto`` where it is empty), ``aliases`` (split at ``|``)
    and ``kind``.

    Raises:
        ConfigError: it is no such table, a row has no concept, or rows contradict each other; names all of them.
    """
    table = read_table(path)
    if unknown := sorted(set(map(str, table.columns)) - set(COLUMNS)):
        raise ConfigError(f"{path} has the column {listing(unknown)}: known are {', '.join(COLUMNS)}.")
    if "concept" not in table or table.empty:
        raise ConfigError(f"{path} names no concept: expected a column concept, and a row for each.")
    rows = table.reindex(columns=[*COLUMNS]).map(lambda cell: cell.strip() if isinstance(cell, str) else cell)
    wanted = []
    for number, row in enumerate(rows.to_dict("records"), start=1):
        given = {name: str(value) for name, value in row.items() if isinstance(value, str) and value}
        if "concept" not in given:
            raise ConfigError(f"{path}: row {number} names no concept.")
        aliases = tuple(one.strip() for one in given.get("aliases", "").split("|") if one.strip())
        wanted.append(Wanted(given["concept"], given.get("surrogate", AUTO), aliases=aliases, kind=given.get("kind")))
    return in_order(wanted)


def in_order(wanted: Iterable[Wanted]) -> list[Wanted]:
    """By name, once it is sure that they do not contradict each other.

    Raises:
        ConfigError: a concept is there twice, or is what another one gives way to; names every such row.
    """
    found = sorted(wanted, key=lambda one: name_key(one.concept))
    names = {name_key(name): one.concept for one in found for name in (one.concept, *one.aliases)}
    count = Counter(name_key(name) for one in found for name in {name_key(n): n for n in (one.concept, *one.aliases)})
    faults = [f"{names[key]} is there more than once" for key, number in sorted(count.items()) if number > 1]
    faults += [
        f"{one.concept} is to give {one.surrogate}, which is erased itself"
        for one in found
        if name_key(one.surrogate) in names
    ]
    if faults:
        raise ConfigError(f"These concepts cannot be erased together: {'; '.join(faults)}. Name other surrogates.")
    return found


def changed(pairs: Sequence[Pair], *, add: Sequence[Wanted] = (), without: Sequence[str] = ()) -> list[Wanted]:
    """All that an erasure was asked of its concepts, with some more and without some.

    Raises:
        ConfigError: one to leave out is not among them, none would be left, or they contradict each other.
    """
    known = {name_key(name): pair.concept for pair in pairs for name in pair.names}
    if missing := [name for name in without if name_key(name) not in known]:
        raise ConfigError(
            f"The erasure has no concept {listing(missing)}: it erases {listing(sorted(known.values()))}."
        )
    gone = {known[name_key(name)] for name in without}
    left = [asked_again(pair) for pair in pairs if pair.concept not in gone]
    if not [*left, *add]:
        raise ConfigError("Nothing would be left to erase: roll the erasure back instead (fade rollback).")
    return in_order([*left, *add])
