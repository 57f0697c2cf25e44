"""Depth: training against text states that bring the concept back   (ours).

Overwriting what the concept's name gives leaves a network that still knows the concept: other text
states, found by textual inversion on the network's weights, bring it back. The adversary finds such
states for the student as it is now, keeps the last of them in a bank, and puts them in the place of
captions: on the concept's pictures they too must give the surrogate, on all others they must give what
the teacher gives for them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fade.method.examples import Examples
from fade.models.conditioning import Conditioning, joined_conditioning
from fade.models.inversion import invert
from fade.seeding import torch_generator


class Adversary:
    """A bank of text states that bring the concept back, renewed against the student every few steps.

    Args:
        pictures: latents of the concept's pictures.
        starts: where inversions begin: the concept's captions and others.
        empty: the empty prompt.
        every: steps between renewals. ``inner``: Adam steps of one renewal, on ``at_once`` states.
        size: states kept; the oldest make room.
        share: forget examples that carry a state of the bank instead of their caption.
        empty_share: forget examples that carry the empty prompt: the concept's pictures without its name.
        retain_share: retain examples that carry a state of the bank.
    """

    def __init__(
        self,
        pictures: Tensor,
        *,
        starts: Conditioning,
        empty: Conditioning,
        alphas_cumprod: Tensor,
        every: int,
        inner: int,
        at_once: int,
        batch: int,
        learning_rate: float,
        size: int,
        share: float,
        empty_share: float,
        retain_share: float,
        precision: str,
        prediction_type: str,
        seed: int,
    ) -> None:
        self._pictures, self._starts, self._empty, self._alphas_cumprod = pictures, starts, empty, alphas_cumprod
        self._every, self._inner, self._at_once, self._batch = every, inner, at_once, batch
        self._learning_rate, self._size = learning_rate, size
        self._share, self._empty_share, self._retain_share = share, empty_share, retain_share
        self._precision, self._prediction_type = precision, prediction_type
        self._generator = torch_generator(seed, "adversary")
        self._bank: Conditioning | None = None

    def renew(self, unet: Any, step: int) -> None:
        """Find new states against the student, at the first step and every few."""
        if (step - 1) % self._every:
            return
        rows = torch.randint(len(self._starts), (self._at_once,), generator=self._generator)
        begin = self._starts[rows]
        if self._bank is not None:
            # Half go on from states found before: what still works is followed up.
            kept = torch.randint(len(self._bank), (self._at_once,), generator=self._generator)
            begin = begin.replaced(torch.arange(self._at_once) % 2 == 0, self._bank[kept])
        for found in invert(
            unet,
            self._pictures,
            start=begin,
            alphas_cumprod=self._alphas_cumprod,
            steps=self._inner,
            batch=self._batch,
            learning_rate=self._learning_rate,
            generator=self._generator,
            precision=self._precision,
            prediction_type=self._prediction_type,
        ):
            begin = found.states
        begin = begin.to("cpu")
        self._bank = begin if self._bank is None else joined_conditioning(self._bank, begin)[-self._size :]

    def disturbed(self, forget: Examples, retain: Examples, generator: torch.Generator) -> tuple[Examples, Examples]:
        """Some captions replaced by states of the bank, some forget captions by the empty prompt."""
        if self._bank is None:
            raise RuntimeError("The adversary's bank is empty: renew it before drawing from it.")
        draws = torch.rand(len(forget), generator=generator)
        states = self._bank[torch.randint(len(self._bank), (len(forget),), generator=generator)]
        prompts = forget.prompts.replaced(draws < self._share, states)
        unnamed = (draws >= self._share) & (draws < self._share + self._empty_share)
        forget = Examples(forget.latents, prompts.replaced(unnamed, self._empty), forget.targets)
        mixed = torch.rand(len(retain), generator=generator) < self._retain_share
        states = self._bank[torch.randint(len(self._bank), (len(retain),), generator=generator)]
        return forget, Examples(
            retain.latents, retain.prompts.replaced(mixed, states), retain.targets.replaced(mixed, states)
        )
