"""Paired tests: the same prompts and seeds before and after, so what changed is not lost among what differs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
from scipy.stats import binomtest

from fade.concepts import Concept
from fade.errors import DataError
from fade.evaluation.accuracy import naming_none


@dataclass(frozen=True, slots=True)
class Paired:
    """McNemar's exact test (Psychometrika 12, 1947): of pictures that changed sides, how many were lost.

    Attributes:
        lost: right before, wrong after; ``gained`` the other way round.
        p: two-sided; under no effect either side is as likely.
    """

    lost: int
    gained: int
    count: int
    p: float


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> Paired:
    """The test of right answers, in the same order.

    Raises:
        DataError: the two are of different length, or empty.
    """
    if len(before) != len(after) or len(before) == 0:
        raise DataError(f"A paired test compares the same pictures: got {len(before)} and {len(after)}.")
    lost = sum(b and not a for b, a in zip(before, after, strict=True))
    gained = sum(a and not b for b, a in zip(before, after, strict=True))
    p = float(binomtest(lost, lost + gained, 0.5).pvalue) if lost + gained else 1.0
    return Paired(int(lost), int(gained), len(before), p)


def paired_retention(before: pd.DataFrame, after: pd.DataFrame, erased: Sequence[Concept]) -> dict[str, Any]:
    """The test for each domain on prompts that name no erased concept: ``object`` and ``style``, JSON-ready.

    Args:
        before, after: samples with ``seen_object`` and ``seen_style``, in the same order.
    """
    rest = naming_none(before, erased)
    later = after.loc[rest.index]
    return {
        domain: asdict(
            mcnemar(
                (rest[f"seen_{domain}"] == rest[domain]).tolist(), (later[f"seen_{domain}"] == later[domain]).tolist()
            )
        )
        for domain in ("object", "style")
    }
