"""Paired tests: the same prompts and seeds before and after, so what changed is not lost among what differs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
from scipy.optimize import brentq
from scipy.special import gammaln, xlogy
from scipy.stats import binomtest

from fade.concepts import Concept
from fade.errors import DataError
from fade.evaluation.accuracy import DOMAINS, domain_of, is_mush, naming_none, split_domains
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


PRIOR = (0.5, 0.5, 20.0)
"""Dirichlet weights of lost, gained and unchanged: few pictures change sides. They decide how soon one is sure."""
_EDGE = 1e-12


def loss_bounds(lost: int, gained: int, count: int, error: float) -> tuple[float, float]:
    """Least and most of the accuracy that is truly lost, P(lost) - P(gained), from pictures compared one by one (ours).

    The set

        { d :  M / sup_{l - g = d} l^lost g^gained (1 - l - g)^(count - lost - gained)  <  1 / error }

    holds the true loss *at every number of pictures at once* with probability 1 - error: M, the average likelihood
    under ``PRIOR``, against that of the true (l, g) is a martingale (Ville's inequality), and the supremum can only
    make the ratio smaller (universal inference, Wasserman et al. arXiv:1912.11436). For given d the supremum lies at
    the root g of  2 n g^2 - [lost (1 - d) + gained (1 - 3 d) - 2 same d] g - gained d (1 - d) = 0.

    What no change moved costs little here, however seldom the base is right; bounds of two accuracies by themselves
    would be as wide as if other pictures had been looked at.

    Args:
        lost: right before and wrong after; ``gained`` the other way round; ``count`` all that were compared.
        error: share of runs in which the set may once miss the true loss, 0 to 1.

    Returns:
        Fractions of 1, negative for a gain; (-1, 1) before the first picture.
    """
    if count == 0:
        return -1.0, 1.0
    same = count - lost - gained
    weights = tuple(prior + seen for prior, seen in zip(PRIOR, (lost, gained, same), strict=True))
    bar = _log_beta(weights) - _log_beta(PRIOR) + math.log(error)

    def inside(loss: float) -> float:
        """Positive where the loss is in the set."""
        return _best_likelihood(lost, gained, same, loss) - bar

    best = min(max((lost - gained) / count, -1 + _EDGE), 1 - _EDGE)
    low = -1.0 if inside(-1 + _EDGE) > 0 else float(brentq(inside, -1 + _EDGE, best))
    high = 1.0 if inside(1 - _EDGE) > 0 else float(brentq(inside, best, 1 - _EDGE))
    return low, high


def _best_likelihood(lost: int, gained: int, same: int, loss: float) -> float:
    """Logarithm of the greatest likelihood with P(lost) - P(gained) = loss."""
    if loss < 0:
        return _best_likelihood(gained, lost, same, -loss)
    count = lost + gained + same
    slope = lost * (1 - loss) + gained * (1 - 3 * loss) - 2 * same * loss
    root = math.sqrt(slope**2 + 8 * count * gained * loss * (1 - loss))
    # Of the two forms of the root the one without a difference of nearly equal numbers.
    gain = (slope + root) / (4 * count) if slope > 0 else 2 * gained * loss * (1 - loss) / max(root - slope, _EDGE)
    return float(xlogy(lost, gain + loss) + xlogy(gained, gain) + xlogy(same, max(1 - loss - 2 * gain, 0.0)))


def _log_beta(weights: Sequence[float]) -> float:
    """Logarithm of the multivariate beta function."""
    return float(gammaln(weights).sum() - gammaln(sum(weights)))


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
    own, other = split_domains(erased)
    near = {}
    for name in neighbours:
        kind = domain_of(name, before)
        near[name] = _test(right[kind][rest[kind] == name])
    return Retention(
        ira=_test(pd.concat([right[domain] for domain in own])),
        cra=_test(pd.concat([right[domain] for domain in other])),
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
