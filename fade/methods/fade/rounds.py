"""Depth in rounds: erase, search to the end, erase once more from the base with all that was found   (ours).

A search that goes along with training (``adversary``) is never far ahead of it: its states are some dozens of steps
old, and an attacker takes a thousand. So, as STEREO (arXiv:2408.16807) does with new words, a student is trained and
then left as it is; searches of several hundred steps run against it, from the concept's names and from elsewhere; and
the next student begins at the base anew, taught from the first step on that the concept's pictures give the surrogate
whatever of all this is said.

What is kept is kept where it is drawn. The base draws retained captions; its own answers on the way, to the caption
and to nothing, are what the student must give at those places: each is computed once, and they are the places that
pictures of the student will pass. Besides, at the same places:

- to a caption with noise in its states the answer to that caption: what says nearly the same gives the same;
- to a found state the answer to nothing: it says nothing of what is kept, whatever it was found for.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from fade.errors import DataError, MaskMismatchError
from fade.methods.fade.adversary import Adversary, drawn_from
from fade.methods.fade.against_searches import check_finite, going_along
from fade.methods.fade.distillation import DistillStep
from fade.methods.fade.examples import Examples
from fade.methods.fade.known_answers import UNSAID, Forgotten, Places, answered, places_passed
from fade.methods.fade.masks import Mask
from fade.methods.fade.sparse_lora import add_sparse_lora, check_inside_mask, computed_whole
from fade.methods.method import STUDENT, Material, Method, MethodSettings
from fade.models.base import Base
from fade.models.denoiser import autocast
from fade.models.inversion import Search
from fade.models.told import Told
from fade.seeding import derive_seed, torch_generator

SAID_EVERY = 50
"""Steps of the searches between students after which the log says how far they are."""

logger = logging.getLogger(__name__)


class RoundsSettings(MethodSettings):
    """How often, and how.

    Attributes:
        rounds: students, each from the base; before each but the first, searches against the one before.
        steps: of training, shared evenly among the rounds.
        searches, search_steps, search_rate: against a student that is left as it is; each search has two pictures a
            step, and its states count half way and at its end.
        states, lifetime, grown, size: of the adversary that goes along (``DeepSettings``).
        share: of the forget examples, how many are told a found state.
        batch: forget examples of a step, and as many kept places.
        kept_weight: of what is kept against what is forgotten.
        captions: retained captions that the base draws.
        noised, noise: of the kept places with a caption, how many have noise in its states, and of what size, in
            standard deviations of the states.
        told_nothing: kept places a step that are told a found state.
        pool: forget examples whose answers are computed once.
    """

    rounds: int = 2
    steps: int = 540
    rank: int = 6
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    clip_norm: float = 1.0
    searches: int = 16
    search_steps: int = Field(400, ge=2)
    search_rate: float = 0.05
    states: int = 4
    lifetime: int = 80
    grown: float = Field(0.5, le=1)
    size: int = 64
    share: float = Field(0.6, lt=1)
    batch: int = 16
    kept_weight: float = 2.5
    captions: int = 48
    noised: float = Field(0.3, le=1)
    noise: float = 1.5
    told_nothing: int = 6
    pool: int = 512


class _Asked(NamedTuple):
    """Rows of a step: z_t, the times, what shall be answered, and what is told."""

    noisy: Tensor
    times: Tensor
    target: Tensor
    told: Told


@dataclass(frozen=True, slots=True)
class _Student:
    """A student's training, with all that was ``found`` before it."""

    base: Base
    parameters: list[Tensor]
    settings: RoundsSettings
    forgotten: Forgotten
    places: Places
    adversary: Adversary
    found: Told | None
    generator: torch.Generator
    precision: str

    def steps(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Take so many; gives the losses and the gradient's norm of each, unread."""
        settings = self.settings
        optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        for step in range(count):
            self.adversary.advance(self.base.denoiser)
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * 0.5 * (1 + math.cos(math.pi * step / count))
            optimizer.zero_grad(set_to_none=True)
            losses = self._losses()
            (losses * losses.new_tensor([1.0, settings.kept_weight, 1.0])).sum().backward()
            norm = nn.utils.clip_grad_norm_(self.parameters, settings.clip_norm)
            optimizer.step()
            yield losses.detach(), norm.detach()

    def _losses(self) -> Tensor:
        """Of what is forgotten, of what is kept, and of kept places that are told a found state, (3,)."""
        known = self.adversary.known
        if self.found is not None:
            known = Told.join(known, self.found)
        parts = [self._forget(known), self._keep()]
        if self.settings.told_nothing and len(known) > 0:
            parts.append(self._nothing(known))
        sizes = [len(part.noisy) for part in parts]
        device = self.base.device
        noisy, times, target = (
            torch.cat(some).to(device)
            for some in zip(*((one.noisy, one.times, one.target) for one in parts), strict=True)
        )
        with autocast(self.precision, device.type):
            answer = self.base.denoiser.predict(noisy, times, Told.join(*(one.told for one in parts)).to(device))
        errors = (answer.float() - target).square().mean(dim=(1, 2, 3)).split(sizes)
        means = [one.mean() for one in errors]
        return torch.stack([*means, *[torch.zeros_like(means[0])] * (3 - len(means))])

    def _forget(self, known: Told) -> _Asked:
        pool, count = self.forgotten, self.settings.batch
        rows = torch.randint(len(pool.noisy), (count,), generator=self.generator)
        named = pool.examples.prompts[rows]
        told = named.replaced(self._some(count, self.settings.share), drawn_from(known, named, self.generator))
        return _Asked(pool.noisy[rows], pool.timesteps[rows], pool.answers[rows], told)

    def _keep(self) -> _Asked:
        places, count = self.places, self.settings.batch
        rows = torch.randint(len(places), (count,), generator=self.generator)
        unsaid = self._some(count, UNSAID)
        told = places.told[places.caption[rows]]
        size = self.settings.noise * torch.rand(count, 1, 1, generator=self.generator)
        noise = torch.randn(told.states.shape, generator=self.generator) * places.spread * size
        noised = told.with_tensors({"states": told.states + noise})
        told = told.replaced(self._some(count, self.settings.noised), noised).replaced(
            unsaid, self.base.unconditional().to("cpu")
        )
        target = torch.where(unsaid[:, None, None, None], places.unsaid[rows], places.answers[rows])
        return _Asked(places.noisy[rows], places.timesteps[rows], target, told)

    def _nothing(self, known: Told) -> _Asked:
        places = self.places
        rows = torch.randint(len(places), (self.settings.told_nothing,), generator=self.generator)
        told = drawn_from(known, places.told[places.caption[rows]], self.generator)
        return _Asked(places.noisy[rows], places.timesteps[rows], places.unsaid[rows], told)

    def _some(self, count: int, share: float) -> Tensor:
        return torch.rand(count, generator=self.generator) < share


def in_rounds(
    base: Base, material: Material, settings: RoundsSettings, *, precision: str, seed: int
) -> Iterator[DistillStep]:
    """Train each round's student, and search against it; yields after each step, and leaves the last on the denoiser.

    Raises:
        MaskMismatchError: there is no mask, or training moved what it leaves out.
        DataError: a set is empty, or a loss is not finite.
    """
    mask, forget, surrogate, retained = _needed(material, settings)
    generator = torch_generator(seed, "rounds")
    chosen = retained[torch.randperm(len(retained), generator=generator)[: settings.captions]]
    places = places_passed(base, chosen, seed=seed, precision=precision)
    forgotten = answered(base, forget, surrogate, count=settings.pool, seed=seed, precision=precision)
    starts = Told.join(forget.prompts, retained, base.unconditional().expand(len(forget)))
    found: Told | None = None
    number = 0
    for turn in range(settings.rounds):
        parameters = _student(base, mask, settings, seed)
        own_seed = derive_seed(seed, "rounds", turn)
        adversary = going_along(
            base, forget, starts, settings, share=settings.share, seed=own_seed, precision=precision
        )
        student = _Student(
            base, parameters, settings, forgotten, places, adversary, found, generator=generator, precision=precision
        )
        share = settings.steps * (turn + 1) // settings.rounds - number
        with computed_whole(base.network):
            for losses, norm in student.steps(share):
                number += 1
                step = DistillStep(number, losses, norm)
                check_finite(step, "fade-rounds")
                yield step
            if turn + 1 < settings.rounds:
                more = _searched(
                    base, forget, starts, settings, seed=derive_seed(seed, "search", turn), precision=precision
                )
                found = more if found is None else Told.join(found, more)
        check_inside_mask(base.network, mask, STUDENT)
    material.notes.update(
        granularity=mask.granularity, rank=settings.rank, found_states=0 if found is None else len(found)
    )


def _needed(material: Material, settings: RoundsSettings) -> tuple[Mask, Examples, Examples, Told]:
    """The mask, pictures of the concept and of its surrogate, and what is retained.

    Raises:
        MaskMismatchError: there is no mask.
        DataError: a set is empty.
    """
    if material.mask is None:
        raise MaskMismatchError("This method trains inside a mask: got none. Run the steps saliency and mask before.")
    forget, surrogate = (material.rows(name).encoded(settings.pool) for name in ("forget", "surrogate"))
    retained = material.retain_prompts
    if 0 in (len(forget), len(surrogate), len(retained)):
        raise DataError(
            f"Got {len(forget)} pictures of the concept, {len(surrogate)} of its surrogate and {len(retained)} "
            "retained captions: this method needs some of each."
        )
    return material.mask, forget, surrogate, retained


def _student(base: Base, mask: Mask, settings: RoundsSettings, seed: int) -> list[Tensor]:
    """A new one that changes nothing yet, in the place of the one before."""
    if STUDENT in getattr(base.network, "peft_config", {}):
        base.network.delete_adapters(STUDENT)
    return add_sparse_lora(base.network, mask, rank=settings.rank, alpha=float(settings.rank), seed=seed, name=STUDENT)


def _searched(
    base: Base, forget: Examples, starts: Told, settings: RoundsSettings, *, seed: int, precision: str
) -> Told:
    """States that bring the concept back on the network as it is: half way and at the end of each search.

    Every other search begins at one of the concept's captions; the rest at any other.
    """
    generator = torch_generator(seed, "rounds", "search")
    named = torch.randint(len(forget), (settings.searches,), generator=generator)
    others = torch.randint(len(forget), len(starts), (settings.searches,), generator=generator)
    rows = torch.where(torch.arange(settings.searches) % 2 == 0, named, others)
    search = Search(
        forget.latents,
        starts[rows],
        learning_rate=settings.search_rate,
        precision=precision,
        device=base.device,
        pooled=True,
    )
    kept = []
    for step in range(1, settings.search_steps + 1):
        search.step(base.denoiser, batch=2 * settings.searches, generator=generator)
        if step % SAID_EVERY == 0:
            logger.info("searching against the student: step %d of %d", step, settings.search_steps)
        if step in (settings.search_steps // 2, settings.search_steps):
            kept.append(search.states.to("cpu"))
    return Told.join(*kept)


ROUNDS = Method("fade-rounds", in_rounds, RoundsSettings, "ours; after STEREO, arXiv:2408.16807", masked=True)
