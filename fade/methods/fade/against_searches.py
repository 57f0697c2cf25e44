"""What methods that train against searches of states share: their adversary, and when training broke off."""

from __future__ import annotations

import math
from typing import Protocol

from fade.errors import DataError
from fade.methods.fade.adversary import Adversary
from fade.methods.fade.distillation import DistillStep
from fade.methods.fade.examples import Examples
from fade.models.base import Base
from fade.models.told import Told


class SearchSettings(Protocol):
    """Of the adversary, as ``DeepSettings`` has them; ``search_rate`` is its learning rate."""

    @property
    def states(self) -> int:
        """How many are searched at a time."""

    @property
    def lifetime(self) -> int:
        """Steps of a search."""

    @property
    def grown(self) -> float:
        """Share of its search from which a state counts, 0..1."""

    @property
    def size(self) -> int:
        """Found states that are kept."""

    @property
    def search_rate(self) -> float:
        """Learning rate of the searches."""


def going_along(
    base: Base, forget: Examples, starts: Told, settings: SearchSettings, *, share: float, seed: int, precision: str
) -> Adversary:
    """An adversary that searches for states which bring ``forget`` back, beginning at rows of ``starts``.

    Args:
        share: of the forget examples, how many are told a found state, 0..1.
    """
    return Adversary(
        forget.latents,
        starts=starts,
        empty=base.unconditional(),
        states=settings.states,
        lifetime=settings.lifetime,
        batch=4 * settings.states,
        learning_rate=settings.search_rate,
        size=settings.size,
        share=share,
        empty_share=0.0,
        retain_share=0.0,
        grown=settings.grown,
        precision=precision,
        device=base.device,
        seed=seed,
    )


def check_finite(step: DistillStep, method: str) -> None:
    """Where a step's figures are at hand.

    Raises:
        DataError: a loss or the gradient's norm is not finite; names the method's learning rate.
    """
    if step.at_hand and not all(map(math.isfinite, (step.forget_loss, step.retain_loss, step.gradient_norm))):
        raise DataError(
            f"Training broke off in step {step.step}: forget loss {step.forget_loss}, retain loss {step.retain_loss}, "
            f"gradient norm {step.gradient_norm}; all must be finite. Lower {method}.learning_rate."
        )
