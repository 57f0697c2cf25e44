"""Bounds that hold at every number of pictures at once, so that one may look after every round.

A confidence sequence is a set that holds the true value *at every number of pictures at once* with probability 1 -
error. A fixed-size interval that is looked at again and again has no such guarantee.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.optimize import brentq
from scipy.special import betaln, gammaln, logsumexp, xlogy

_EDGE = 1e-12
RATE_PRIORS = ((0.5, (50.0, 0.5)), (0.5, (1.0, 1.0)))
"""Shares and beta weights of hits and misses: of most erasures hardly a picture misses, of the others any number may.
Under a uniform prior alone it takes 42 pictures without a miss to be sure of 85 %, under this 24; where one picture in
fourteen misses it takes some twenty more. Whatever the prior, the set misses the true rate no more often than is
stated."""


def confidence_sequence(hits: int, count: int, error: float) -> tuple[float, float]:
    """Lowest and highest rate of a confidence sequence after ``hits`` of ``count``; (0, 1) before the first picture.

    After s hits of n it is the set

        { p :  M / (p^s (1 - p)^(n - s)) < 1 / error }

    M, the average likelihood under the mixture ``RATE_PRIORS``, against that of p is a martingale under p (Ville's
    inequality; Robbins 1970, Howard et al. arXiv:1810.08240).
    """
    if count == 0:
        return 0.0, 1.0
    misses = count - hits
    bar = log_average_rate(hits, misses) + math.log(error)

    def inside(rate: float) -> float:
        """Positive where the rate is in the set."""
        return hits * math.log(rate) + misses * math.log1p(-rate) - bar

    best = min(max(hits / count, _EDGE), 1 - _EDGE)
    low = 0.0 if hits == 0 or inside(_EDGE) > 0 else float(brentq(inside, _EDGE, best))
    high = 1.0 if misses == 0 or inside(1 - _EDGE) > 0 else float(brentq(inside, best, 1 - _EDGE))
    return low, high


def log_average_rate(hits: int, misses: int) -> float:
    """Logarithm of the average likelihood of so many hits and misses, in one order, under ``RATE_PRIORS``."""
    parts = [math.log(share) + betaln(a + hits, b + misses) - betaln(a, b) for share, (a, b) in RATE_PRIORS]
    return float(logsumexp(parts))


PRIORS = ((0.9, (0.5, 0.5, 100.0)), (0.1, (0.5, 0.5, 1.0)))
"""Shares and Dirichlet weights of lost, gained and unchanged: of most erasures one picture in a hundred changes sides,
of some many do. They decide how soon one is sure."""


def loss_bounds(lost: int, gained: int, count: int, error: float) -> tuple[float, float]:
    """Least and most of the accuracy that is truly lost, P(lost) - P(gained), from pictures compared one by one (ours).

    The set

        { d :  M / sup_{l - g = d} l^lost g^gained (1 - l - g)^(count - lost - gained)  <  1 / error }

    holds the true loss *at every number of pictures at once* with probability 1 - error: M, the average likelihood
    under the mixture ``PRIORS``, against that of the true (l, g) is a martingale (Ville's inequality), and the supremum
    can only make the ratio smaller (universal inference, Wasserman et al. arXiv:1912.11436). For given d the supremum
    lies at the root g of  2 n g^2 - [lost (1 - d) + gained (1 - 3 d) - 2 same d] g - gained d (1 - d) = 0.

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
    bar = _log_average_likelihood((lost, gained, same)) + math.log(error)

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


def _log_average_likelihood(seen: Sequence[int]) -> float:
    parts = [
        math.log(share) + _log_beta([w + n for w, n in zip(weights, seen, strict=True)]) - _log_beta(weights)
        for share, weights in PRIORS
    ]
    return float(logsumexp(parts))


def _log_beta(weights: Sequence[float]) -> float:
    """Logarithm of the multivariate beta function."""
    return float(gammaln(weights).sum() - gammaln(sum(weights)))
