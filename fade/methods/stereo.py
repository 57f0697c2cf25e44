"""STEREO, search thoroughly enough, then erase once (Srivatsan et al., arXiv:2408.16807). Own implementation.

Rounds first: erase (ESD's target), then train a new token on pictures of the concept until the erased network draws it
again, then erase that token, and so on. What the rounds do to the weights is thrown away; their tokens p_1 .. p_K are
kept. Then, *from the base*, the concept's name p_0 and all tokens are erased together, each towards

    e* + eta ( [ e*_anchor - e* ] - mean over j of [ e*_pj - e* ] )          (the paper's compositional objective)

where the anchor says what is to be kept nearby. e* is the frozen network.

What differs: anchors are the concept's captions with the surrogate's name, where the authors have sentences written;
of the p_j the mean counts, and their projection of one guidance on another is left out; ESD's cross-attention is what
is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fade.methods.method import Material, Method
from fade.methods.negative_guidance import NegativeSettings, distance_to, frozen_answers, half_drawn, negative_target
from fade.methods.trained_difference import Losses, descended, drawn, modules_of, trained_difference
from fade.models.base import Base
from fade.models.inversion import NewTokens, WordSearch, searched
from fade.models.told import Told
from fade.seeding import torch_generator

SENTENCE = "an image of a {}"


class StereoSettings(NegativeSettings):
    """Rounds, and the search in each.

    Attributes:
        steps: of all erasing together: as many in every round as in the last, which is the one that counts.
        rounds: of erasing and searching; each finds a token.
        search_steps, search_rate, search_batch: of the token's training.
    """

    steps: int = 450
    learning_rate: float = 3e-4
    rounds: int = 2
    search_steps: int = 100
    search_rate: float = 0.05
    search_batch: int = 8


def stereo(base: Base, material: Material, settings: StereoSettings, *, precision: str, seed: int) -> Iterator[Losses]:
    """Search in rounds, then erase once; yields every step of erasing, and leaves the last difference alone."""
    changes = trained_difference(base.network, modules_of(base.denoiser, "text_attention"))
    found: list[Told] = []
    spent = 0
    for step in search(base, material, changes, found, settings=settings, precision=precision, seed=seed):
        spent = step.step
        yield step
    for step in erase_once(
        base, material, changes, found, settings=settings, steps=settings.steps - spent, precision=precision, seed=seed
    ):
        yield Losses(spent + step.step, step.forget_loss)


def search(
    base: Base,
    material: Material,
    changes: Mapping[str, Tensor],
    found: list[Told],
    *,
    settings: StereoSettings,
    precision: str,
    seed: int,
) -> Iterator[Losses]:
    """The rounds: each erases what was found last and appends to ``found`` what brings the concept back."""
    generator = torch_generator(seed, "stereo search")
    each = settings.steps // (settings.rounds + 1)
    asked = material.concept
    for number in range(settings.rounds):

        def losses(current: Told = asked) -> tuple[Tensor, None]:
            told = current[drawn(len(current), settings.batch, generator)]
            noisy, timestep = half_drawn(base, told, settings, generator, precision)
            target = negative_target(base, noisy, timestep, told, eta=settings.eta, precision=precision)
            return distance_to(base, noisy, timestep, told, target=target, precision=precision), None

        taken = descended(changes.values(), losses, steps=each, learning_rate=settings.learning_rate)
        for step in taken:
            yield Losses(number * each + step.step, step.forget_loss)
        tokens = NewTokens(base, SENTENCE, rows=1, count=1, generator=generator)
        looking = WordSearch(material.forget, tokens, learning_rate=settings.search_rate, precision=precision)
        for _ in searched(
            looking, base.denoiser, steps=settings.search_steps, batch=settings.search_batch, generator=generator
        ):
            pass
        asked = looking.states
        found.append(asked)


def erase_once(
    base: Base,
    material: Material,
    changes: Mapping[str, Tensor],
    found: Sequence[Told],
    *,
    settings: StereoSettings,
    steps: int,
    precision: str,
    seed: int,
) -> Iterator[Losses]:
    """From the base, whatever the changes are now: its name and all that was found, together."""
    generator = torch_generator(seed, "stereo erasing")
    with torch.no_grad():
        for change in changes.values():
            change.zero_()

    def losses() -> tuple[Tensor, None]:
        rows = drawn(len(material.concept), settings.batch, generator)
        every = [material.concept[rows], *(one.expand(len(rows)) for one in found)]
        told = every[int(torch.randint(len(every), (1,), generator=generator))]
        noisy, timestep = half_drawn(base, told, settings, generator, precision)
        target = composed_target(
            base, noisy, timestep, every, material.surrogate[rows], eta=settings.eta, precision=precision
        )
        return distance_to(base, noisy, timestep, told, target=target, precision=precision), None

    yield from descended(changes.values(), losses, steps=steps, learning_rate=settings.learning_rate)


def composed_target(
    base: Base, noisy: Tensor, timestep: Tensor, negative: Sequence[Told], anchor: Told, *, eta: float, precision: str
) -> Tensor:
    """The frozen network's answer led to the anchor and away from every prompt that gives the concept."""
    without, kept, *away = frozen_answers(base, noisy, timestep, [None, anchor, *negative], precision=precision)
    return without + eta * (kept - torch.stack(away).mean(dim=0))


STEREO = Method("stereo", stereo, StereoSettings, "arXiv:2408.16807")
