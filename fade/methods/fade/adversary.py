"""Depth: training against text states that bring the concept back   (ours).

Overwriting what the concept's name gives leaves a network that still knows the concept: other text
states, found by textual inversion on the network's weights, bring it back. The adversary searches such
states for as long as the student trains, a step of the search for each step of the student, and puts
them in the place of captions: they too must give the surrogate. Where a family tells its denoiser a pooled state
besides, that is searched too, as an attacker does who holds the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fade.methods.fade.examples import Examples
from fade.models.denoiser import Denoiser
from fade.models.inversion import Search
from fade.models.told import Told
from fade.seeding import torch_generator


class Adversary:
    """Text states under search against the student as it is now, and a bank of those found before.

    A state is searched for ``lifetime`` steps; then it goes to the bank, and another begins. Without the
    bank the student would forget what it has learnt against the first ones.

    Args:
        pictures: latents of the concept's pictures.
        starts: where searches begin: the concept's captions and others.
        empty: the empty prompt.
        states: how many are searched at once; their ages are spread evenly.
        batch: pictures of a step of the search, shared among the states.
        size: states kept in the bank; the oldest make room.
        share: forget examples that carry such a state instead of their caption.
        empty_share: forget examples that carry the empty prompt: the concept's pictures without its name.
        retain_share: retain examples that carry such a state, and must give what the teacher gives for it.
        grown: share of a lifetime from which on a state counts. Before, it is still much like the caption where its
            search began, and teaching the surrogate under a retained caption is teaching against what is retained.
    """

    def __init__(
        self,
        pictures: Tensor,
        *,
        starts: Told,
        empty: Told,
        states: int,
        lifetime: int,
        batch: int,
        learning_rate: float,
        size: int,
        share: float,
        empty_share: float,
        retain_share: float,
        grown: float = 0.0,
        precision: str,
        device: torch.device,
        seed: int,
    ) -> None:
        self._starts, self._empty, self._batch, self._size = starts, empty, batch, size
        self._share, self._empty_share, self._retain_share = share, empty_share, retain_share
        self._generator = torch_generator(seed, "adversary")
        rows = torch.randint(len(starts), (states,), generator=self._generator)
        self._search = Search(
            pictures,
            starts[rows],
            learning_rate=learning_rate,
            precision=precision,
            device=device,
            pooled=True,
        )
        self._lifetime, self._grown = lifetime, grown * lifetime
        self._age = [lifetime * i // states for i in range(states)]
        self._searched = [0] * states
        self._bank: Told | None = None

    @property
    def known(self) -> Told:
        """The states under search that have grown and those of the bank, on the CPU: none, until one has."""
        # By their numbers: what a mask gives has no size before it is computed.
        grown = torch.tensor([i for i, steps in enumerate(self._searched) if steps >= self._grown], dtype=torch.long)
        now = self._search.states.to("cpu")[grown]
        return now if self._bank is None else Told.join(now, self._bank)

    def advance(self, denoiser: Denoiser) -> None:
        """A step of the search against the student; states whose time is over go to the bank."""
        self._search.step(denoiser, batch=self._batch, generator=self._generator)
        now = self._search.states.to("cpu")
        for i in range(len(self._age)):
            self._age[i] += 1
            self._searched[i] += 1
            if self._age[i] >= self._lifetime:
                found = now[i : i + 1]
                self._bank = found if self._bank is None else Told.join(self._bank, found)[-self._size :]
                row = torch.randint(len(self._starts), (1,), generator=self._generator)
                self._search.restart(i, self._starts[row])
                self._age[i] = self._searched[i] = 0

    def disturbed(self, forget: Examples, retain: Examples, generator: torch.Generator) -> tuple[Examples, Examples]:
        """Some captions replaced by states, where there are any, some forget captions by the empty prompt."""
        known = self.known
        draws = torch.rand(len(forget), generator=generator)
        prompts = forget.prompts.replaced(draws < self._share, drawn_from(known, forget.prompts, generator))
        unnamed = (draws >= self._share) & (draws < self._share + self._empty_share)
        forget = Examples(forget.latents, prompts.replaced(unnamed, self._empty), forget.targets)
        mixed = torch.rand(len(retain), generator=generator) < self._retain_share
        states = drawn_from(known, retain.prompts, generator)
        return forget, Examples(
            retain.latents, retain.prompts.replaced(mixed, states), retain.targets.replaced(mixed, states)
        )


def drawn_from(known: Told, otherwise: Told, generator: torch.Generator) -> Told:
    """As many of the known states as there are rows in ``otherwise``, with replacement; of none known, these."""
    if len(known) == 0:
        return otherwise
    return known[torch.randint(len(known), (len(otherwise),), generator=generator)]
