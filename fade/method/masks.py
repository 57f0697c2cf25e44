"""Masks: the part of the network that may change."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fade.errors import ConfigError, MaskMismatchError


def module_mask(scores: Mapping[str, float], density: float) -> tuple[str, ...]:
    """The top fraction of modules by score (FADE, stage 1, granularity *module*).

    Exactly max(1, round(density * n)) modules are kept. Equal scores, zeros included, are kept in
    alphabetical order, so the mask is a function of the scores alone.

    Raises:
        ConfigError: density is outside (0, 1].
        MaskMismatchError: there are no modules, or a score is not a number.
    """
    if not 0 < density <= 1:
        raise ConfigError(f"density must be in (0, 1]: got {density}. Set `mask.density` in params.yaml.")
    if not scores:
        raise MaskMismatchError("A mask needs at least one module to choose from: got none.")
    if bad := [name for name, score in scores.items() if math.isnan(score)]:
        raise MaskMismatchError(f"The saliency of {bad[0]} is not a number. Check the pictures and the base.")
    kept = max(1, round(density * len(scores)))
    ranked = sorted(scores, key=lambda name: (-scores[name], name))
    return tuple(sorted(ranked[:kept]))
