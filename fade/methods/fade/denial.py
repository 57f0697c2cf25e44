"""Denial: what a picture of the concept shows gives way, whatever is said   (ours).

The text's path cannot hold a concept back alone: who may choose the states says it by what other words say as well
(docs/method.md, "What the text path can take away"). So it is denied on the picture's side too. At noise through which
the concept is still seen, under its name, searched states, the empty prompt and other captions alike, the answer is
moved from the teacher's towards the one that leads to the surrogate:

    e = e_teacher(z_t, t, c_surrogate) + strength (e' - e_teacher),    e' the answer that implies z_0 = mean of the
                                                                       surrogate's pictures of that caption

Where noise hides the picture nothing is denied: there z_t of the concept is z_t of anything, and what is retained would
move with it. What is painted at less noise still, as a style may be, is not reached.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fade.errors import ConfigError
from fade.methods.fade.adversary import drawn_from
from fade.methods.fade.examples import Examples
from fade.models.paths import NoisePath
from fade.models.told import Told

SEEN = (0.2, 5.0)
"""Signal-to-noise ratios between which a picture is denied: above, all is decided; below, nothing is seen yet."""
NAMED, SEARCHED, UNNAMED = 0.15, 0.45, 0.15
"""Shares of what denied pictures are told: the name, searched states, nothing; the rest are retained captions."""


def seen_times(path: NoisePath) -> Tensor:
    """The timesteps at which pictures are denied, ascending.

    Raises:
        ConfigError: the path has none.
    """
    ratio = path.snr(torch.arange(path.steps))
    times = torch.nonzero((ratio >= SEEN[0]) & (ratio <= SEEN[1]))[:, 0]
    if len(times) == 0:
        raise ConfigError(
            f"This base's noise passes no signal-to-noise ratio between {SEEN[0]} and {SEEN[1]}: there is nothing to "
            "deny. Set `distill.deep.deny_share` to 0."
        )
    return times


def mean_pictures(forget: Examples, surrogate: Examples) -> Tensor:
    """Of each forget example the mean of the surrogate's pictures with its target's caption, (N, C, h, w).

    Where none has that caption, of all of them.
    """
    captions = surrogate.targets.states.flatten(1)
    found = []
    for wanted in forget.targets.states.flatten(1):
        rows = (captions == wanted).all(dim=1)
        found.append(surrogate.latents[rows if rows.any() else slice(None)].mean(dim=0))
    return torch.stack(found)


@dataclass(frozen=True, slots=True)
class Denial:
    """Draws what is denied.

    Attributes:
        pictures: of the concept, with its captions and their targets.
        towards: the surrogate's mean picture for each (``mean_pictures``).
        others: retained captions.
        path, times: of the base's noise, and the timesteps (``seen_times``).
        share: of the forget examples.
        strength: how far answers are moved, in (0, 1].
    """

    pictures: Examples
    towards: Tensor
    others: Told
    empty: Told
    path: NoisePath
    times: Tensor
    share: float
    strength: float

    def drawn(self, count: int, known: Told, generator: torch.Generator) -> tuple[Examples, Tensor, Tensor]:
        """Examples, their timesteps (count,) and what they lead to (count, C, h, w).

        Args:
            known: searched states; where there are none yet, the name is said in their place.
        """
        rows = torch.randint(len(self.pictures), (count,), generator=generator)
        chosen, kind = self.pictures[rows], torch.rand(count, generator=generator)
        searched = drawn_from(known, chosen.prompts, generator)
        others = self.others[torch.randint(len(self.others), (count,), generator=generator)]
        told = chosen.prompts.replaced((kind >= NAMED) & (kind < NAMED + SEARCHED), searched)
        told = told.replaced((kind >= NAMED + SEARCHED) & (kind < NAMED + SEARCHED + UNNAMED), self.empty)
        told = told.replaced(kind >= NAMED + SEARCHED + UNNAMED, others)
        times = self.times[torch.randint(len(self.times), (count,), generator=generator)]
        return Examples(chosen.latents, told, chosen.targets), times, self.towards[rows]

    def moved(self, noisy: Tensor, t: Tensor, answer: Tensor, towards: Tensor) -> Tensor:
        """The teacher's answers (B, C, h, w), moved that far to those that lead to ``towards``."""
        return answer + self.strength * (self.path.answer(noisy, towards, t) - answer)

    def weights(self, t: Tensor) -> Tensor:
        """min(1, 1 / SNR), (B,): at little noise an error counts by what it is of the picture, not of the noise."""
        return (1 / self.path.snr(t.cpu())).clamp(max=1.0).to(t.device)
