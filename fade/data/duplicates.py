"""Near-duplicates: pictures whose perceptual hashes differ in few bits, found by an index.

Two 64-bit hashes that differ in at most d bits agree in at least one of d + 1 bands of bits. So only
pictures that share a band are compared, not all pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

DISTANCE = 4
"""Bits of 64. A copy that was scaled or stored again as JPEG differs in fewer."""
SAME_LOOK = 0.03
"""Largest RMS difference, 0..1, of two pictures that look the same: a copy stored as JPEG has about 0.01."""
_BLOCK = 4_000_000


def as_bits(hashes: Sequence[str]) -> NDArray[np.uint64]:
    """Hashes of 16 hexadecimal digits as 64-bit numbers."""
    return np.array([int(each, 16) for each in hashes], dtype=np.uint64)


def near_pairs(one: NDArray[np.uint64], other: NDArray[np.uint64], *, distance: int = DISTANCE) -> NDArray[np.int64]:
    """Pairs of positions (P, 2) whose hashes differ in at most ``distance`` bits, sorted.

    Equal hashes are compared once: give unique ones where many pictures may be alike.
    """
    found = [np.empty((0, 2), dtype=np.int64)]
    edges = np.linspace(0, 64, distance + 2).round().astype(int)
    for low, high in pairwise(edges):
        mask = np.uint64((1 << int(high - low)) - 1)
        found += _in_band(one, other, (one >> np.uint64(low)) & mask, (other >> np.uint64(low)) & mask, distance)
    return np.unique(np.concatenate(found), axis=0)


def _in_band(
    one: NDArray[np.uint64],
    other: NDArray[np.uint64],
    keys: NDArray[np.uint64],
    other_keys: NDArray[np.uint64],
    distance: int,
) -> list[NDArray[np.int64]]:
    """Pairs that agree in a band and are near."""
    order, other_order = np.argsort(keys, kind="stable"), np.argsort(other_keys, kind="stable")
    values, starts = np.unique(keys[order], return_index=True)
    ends = np.append(starts[1:], len(keys))
    firsts = np.searchsorted(other_keys[other_order], values, side="left")
    lasts = np.searchsorted(other_keys[other_order], values, side="right")
    found = []
    for start, end, first, last in zip(starts, ends, firsts, lasts, strict=True):
        rows, against = order[start:end], other_order[first:last]
        if len(against) == 0:
            continue
        step = max(1, _BLOCK // len(against))
        for begin in range(0, len(rows), step):
            part = rows[begin : begin + step]
            bits = np.bitwise_count(one[part][:, None] ^ other[against][None, :])
            left, right = np.nonzero(bits <= distance)
            found.append(np.stack([part[left], against[right]], axis=1))
    return found


def leaked(forget: pd.DataFrame, retain: pd.DataFrame, *, pictures: Path, kinds: set[str]) -> pd.DataFrame:
    """Rows of the retain set that are near-duplicates of a picture to forget.

    Of a style, the same photograph in another style is no leak but what must stay: there, a pair counts
    only where the two look the same as well.

    Args:
        forget: rows with ``path`` and ``phash``, as ``retain``.
        kinds: the axes that are erased, ``object`` or ``style``.
    """
    pairs = near_pairs(as_bits(forget["phash"].tolist()), as_bits(retain["phash"].tolist()))
    rows = {
        right
        for left, right in pairs.tolist()
        if kinds != {"style"}
        or look_the_same(pictures / forget["path"].iloc[left], pictures / retain["path"].iloc[right])
    }
    return retain.iloc[sorted(rows)]


def look_the_same(one: Path, other: Path) -> bool:
    """Whether two pictures differ by no more than a copy that was scaled or stored again does."""
    with Image.open(one) as first, Image.open(other) as second:
        pixels = np.asarray(first.convert("RGB"), dtype=np.float32)
        against = np.asarray(second.convert("RGB").resize(first.size), dtype=np.float32)
    return float(np.sqrt(((pixels - against) ** 2).mean())) / 255.0 <= SAME_LOOK


def conflicting(table: pd.DataFrame, *, pictures: Path, distance: int = DISTANCE) -> list[tuple[str, str]]:
    """Ids of pictures that look the same and that a catalog labels as different objects."""
    bits = as_bits(table["phash"].tolist())
    unique, where = np.unique(bits, return_inverse=True)
    labels = table.assign(bits=where).groupby("bits")["object"]
    first, ids = labels.first(), table.assign(bits=where).groupby("bits")["image_id"].first()
    found = [(ids[i], _other(table, where, i, first[i])) for i in labels.nunique().loc[lambda n: n > 1].index]
    pairs = near_pairs(unique, unique, distance=distance)
    pairs = pairs[pairs[:, 0] < pairs[:, 1]]
    names, idents = first.to_numpy(), ids.to_numpy()
    paths = dict(zip(table["image_id"], table["path"], strict=True))
    differ = names[pairs[:, 0]] != names[pairs[:, 1]]
    found += [(str(idents[a]), str(idents[b])) for a, b in pairs[differ].tolist()]
    return [(a, b) for a, b in found if look_the_same(pictures / paths[a], pictures / paths[b])]


def _other(table: pd.DataFrame, where: NDArray[np.int64], number: int, label: str) -> str:
    rows = table[where == number]
    return str(rows[rows["object"] != label]["image_id"].iloc[0])


class NearDuplicates:
    """Pictures by style and perceptual hash, to ask of another whether it is near one of them.

    Of a style, since the same photograph in another style has a near hash and is another picture.
    """

    def __init__(self) -> None:
        self._hashes: dict[str, list[str]] = {}
        self._bits: dict[str, NDArray[np.uint64]] = {}

    def add(self, style: str, phash: str) -> None:
        """Remember a picture."""
        self._hashes.setdefault(style, []).append(phash)
        self._bits.pop(style, None)

    def near(self, style: str, phash: str, *, distance: int = DISTANCE) -> bool:
        """Whether a picture of this style differs from a remembered one in at most ``distance`` bits."""
        if style not in self._hashes:
            return False
        if style not in self._bits:
            self._bits[style] = as_bits(self._hashes[style])
        return bool((np.bitwise_count(self._bits[style] ^ np.uint64(int(phash, 16))) <= distance).any())
