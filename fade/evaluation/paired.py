"""Paired tests: the same prompts and seeds before and after, so what changed is not lost among what differs."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from scipy.stats import binomtest

from fade.concepts import Concept
from fade.errors import DataError
from fade.evaluation.accuracy import DOMAINS, domain_of, evenly_drawn, is_mush, naming_none, split_domains
from fade.evaluation.figures import Paired, Retention


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
    return Paired(lost=int(lost), gained=int(gained), count=len(before), p=p)


def paired_retention(
    before: pd.DataFrame, after: pd.DataFrame, erased: Sequence[Concept], neighbours: Sequence[str] = ()
) -> Retention:
    """The test on prompts that name no erased concept; and of each erased concept's own, what became mush.

    Args:
        before, after: samples with ``seen_object`` and ``seen_style``, in the same order.
    """
    rest = naming_none(before, erased)
    later = after.loc[rest.index]
    right = {
        domain: pd.DataFrame(
            {when: seen[f"seen_{domain}"] == seen[domain] for when, seen in (("before", rest), ("after", later))}
        )
        for domain in DOMAINS
    }
    even = evenly_drawn(before, erased).index
    own, other = split_domains(erased)
    near = {}
    for name in neighbours:
        kind = domain_of(name, before)
        near[name] = _test(right[kind][rest[kind] == name])
    return Retention(
        ira=_test(pd.concat([right[domain].loc[even] for domain in own])),
        cra=_test(pd.concat([right[domain].loc[even] for domain in other])),
        neighbours=near,
        clear={
            concept.name: mcnemar(
                *((~is_mush(seen[before[concept.kind] == concept.name])).tolist() for seen in (before, after))
            )
            for concept in erased
        },
    )


def _test(right: pd.DataFrame) -> Paired:
    return mcnemar(right["before"].tolist(), right["after"].tolist())
