"""Whether figures can be those of an evaluation: nothing is absent, uncounted or does not fit its count.

The gate judges figures that lay in a file since they were measured. What it asks is asked of counted pictures: a
figure without a count, or one that no count of pictures gives, is refused and never read as a good one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fade.errors import DataError
from fade.evaluation.accuracy import rate

ROUNDING = 1e-9
"""How far a stored fraction may lie from the one that its counts give."""


def check_figures(figures: Any) -> None:
    """Refuse a judge's figures that no evaluation has given; concepts are called by number.

    Every rate is ``hits / count`` of at least one picture, with the interval of these; before and after are of as
    many pictures; the pooled UA is that of the concepts; what changed sides is what the rates differ by.

    Raises:
        DataError: names the first figure at fault, what it is and what was expected.
    """
    before, after, paired = (_part(figures, name, "") for name in ("before", "after", "paired"))
    erased = [_part(side, "erased", name) for side, name in ((before, "before"), (after, "after"))]
    near = [_part(side, "neighbours", name) for side, name in zip((before, after, paired), _SIDES, strict=True)]
    if not erased[1]:
        raise _fault("after.erased", "nothing", "each erased concept's UA")
    _alike("erased", erased)
    _alike("neighbours", near)
    for side, concepts, name in zip((before, after), erased, _SIDES[:2], strict=True):
        parts = [
            hits_of(_part(found, "ua", f"{name}.erased {number}"), f"{name}.ua of concept {number}")
            for number, found in enumerate(concepts.values(), start=1)
        ]
        pooled = hits_of(_part(side, "ua", name), f"{name}.ua")
        if pooled != tuple(map(sum, zip(*parts, strict=True))):
            raise _fault(f"{name}.ua", f"{pooled[0]} of {pooled[1]}", "the sum of the erased concepts'")
    for number, key in enumerate(erased[0], start=1):
        counts = [side[key]["ua"]["count"] for side in erased]
        if counts[0] != counts[1]:
            raise _fault(f"ua of concept {number}", f"{counts[0]} and {counts[1]} pictures", "as many before as after")
    _check_names([side.get("names", {}) for side in (before, after)])
    for name in ("ira", "cra"):
        _check_retained(
            name, *(_part(side, name, at) for side, at in zip((before, after, paired), _SIDES, strict=True))
        )
    for number, key in enumerate(near[0], start=1):
        _check_retained(f"neighbour {number}", *(side[key] for side in near))


def _check_names(parts: Sequence[Any]) -> None:
    """Further names of the concepts: the same before and after, of as many pictures."""
    if not all(isinstance(part, Mapping) for part in parts):
        raise _fault("names", "no figures", "figures")
    _alike("names", parts)
    for number, name in enumerate(parts[0], start=1):
        where = f"ua of name {number}"
        counts = [hits_of(_part(part[name], "ua", where), where)[1] for part in parts]
        if counts[0] != counts[1]:
            raise _fault(where, f"{counts[0]} and {counts[1]} pictures", "as many before as after")


_SIDES = ("before", "after", "paired")


def check_attacks(found: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse figures of attacks that no run has given: NAME with ``_low``, ``_high`` and ``_count``.

    Args:
        names: the attacks that are asked for; one that was not run is no fault here.

    Raises:
        DataError: as ``check_figures``.
    """
    for name in names:
        ends = ("", "_low", "_high", "_count")
        if not any(f"{name}{end}" in found for end in ends):
            continue
        one = {key: found.get(f"{name}{end}") for key, end in zip(("value", "low", "high", "count"), ends, strict=True)}
        hits_of(one, f"the attack {name}")


def hits_of(found: Any, where: str) -> tuple[int, int]:
    """Hits and count of a stored rate, once value, count and interval are found to fit one another.

    Raises:
        DataError: as ``check_figures``.
    """
    values = {name: _number(_part(found, name, where, mapping=False), f"{where}: {name}") for name in _RATE}
    count = _counted(values["count"], f"{where}: count", least=1)
    hits = round(values["value"] * count)
    if not 0 <= hits <= count or abs(values["value"] - hits / count) > ROUNDING:
        raise _fault(where, f"{values['value']} of {count} pictures", "hits / count, from 0 to 1")
    expected = rate(hits, count)
    if abs(values["low"] - expected.low) > ROUNDING or abs(values["high"] - expected.high) > ROUNDING:
        raise _fault(
            where,
            f"the interval {values['low']} to {values['high']}",
            f"{expected.low:.6f} to {expected.high:.6f} of {hits} in {count}",
        )
    return hits, count


_RATE = ("value", "low", "high", "count")


def _check_retained(name: str, before: Any, after: Any, paired: Any) -> None:
    """A retained rate and its pairs: of the same pictures, and what was lost less what was gained is the difference."""
    was, now = hits_of(before, f"before.{name}"), hits_of(after, f"after.{name}")
    lost, gained, count = (
        _counted(_number(_part(paired, part, f"paired.{name}", mapping=False), f"paired.{name}: {part}"),
                 f"paired.{name}: {part}", least=part == "count")
        for part in ("lost", "gained", "count")
    )  # fmt: skip
    if not was[1] == now[1] == count:
        raise _fault(f"paired.{name}", f"{was[1]}, {now[1]} and {count} pictures", "the same pictures before and after")
    if lost > was[0] or gained > count - was[0] or was[0] - now[0] != lost - gained:
        raise _fault(
            f"paired.{name}", f"{lost} lost and {gained} gained", f"what leads from {was[0]} to {now[0]} of {count}"
        )


def _alike(what: str, parts: Sequence[Mapping[str, Any]]) -> None:
    if any(set(part) != set(parts[0]) for part in parts):
        raise _fault(what, f"{' and '.join(str(len(part)) for part in parts)} of other names", "the same in every part")


def _part(found: Any, name: str, where: str, *, mapping: bool = True) -> Any:
    path = f"{where}.{name}" if where else name
    if not isinstance(found, Mapping) or name not in found or found[name] is None:
        raise _fault(path, "nothing", "a figure")
    if mapping and not isinstance(found[name], Mapping):
        raise _fault(path, type(found[name]).__name__, "figures")
    return found[name]


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _fault(where, value if isinstance(value, float) else type(value).__name__, "a finite number")
    return float(value)


def _counted(value: float, where: str, *, least: int) -> int:
    if value != int(value) or value < least:
        raise _fault(where, value, f"a whole number, at least {int(least)}")
    return int(value)


def _fault(where: str, got: object, expected: str) -> DataError:
    return DataError(
        f"These are no figures of an evaluation: {where} is {got}, expected {expected}. They were changed, or measured "
        "by something else: evaluate the erasure again."
    )
