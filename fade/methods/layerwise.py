"""Many concepts at once by least squares, solved layer by layer (``fade.methods.layers``) and no more   (ours)."""

from __future__ import annotations

from collections.abc import Iterator

from fade.methods.layers import LayerwiseSettings, left, placed, solved
from fade.methods.method import Material, Method
from fade.methods.trained_difference import Losses
from fade.models.base import Base


def layerwise(
    base: Base, material: Material, settings: LayerwiseSettings, *, precision: str, seed: int
) -> Iterator[Losses]:
    """Solve; one step, with what is left of both halves. It is solved in float64, of answers in ``precision``.

    Raises:
        NoMatchingModulesError: the base has no cross-attention of the stock kind.
    """
    changes, batch = solved(base, material, settings, precision=precision, seed=seed)
    rank = max((len(one.A) for one in changes.values()), default=1)
    placed(base, changes, [*changes], rank=rank, seed=seed)
    material.notes.update(rank=rank)
    yield left(base, batch, precision)


LAYERWISE = Method("layerwise", layerwise, LayerwiseSettings, "ours", several=True)
