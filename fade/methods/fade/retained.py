"""Denied towards what is retained: what a picture of the concept shows is taken for what is kept   (ours).

A base that never saw a concept finishes a half-noised picture of it as something that it did see, whatever it is told.
So do these students. At noise through which the concept is still seen, told searched states, nothing, retained captions
or anything between, the answer is that of the best denoiser of the *retained* pictures x_i:

    z_0 = sum_i w_i x_i,    w = softmax_i( - k SNR mean((z_t / a - x_i)^2) / 2 ),    z_t = a z_0 + s e, SNR = (a / s)^2

With k the number of a picture's values this is Bayes' answer of a model that knows the x_i alone; less leaves more of
them. What is retained has that answer nearly already. Told the concept's *name*, the x_i are the surrogate's pictures
alone. Where the picture is not seen yet, or all is decided, the name and searched states give the base's answer to the
surrogate's caption. What is kept is kept where the base passes as it draws retained captions
(``known_answers.Places``), and at retained pictures with fresh noise.

It acts on the picture's side of the network, and no mask or low rank held it: all weights are trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from pydantic import Field
from torch import Tensor, nn

from fade.errors import ConfigError, DataError
from fade.methods.fade.adversary import drawn_from
from fade.methods.fade.against_searches import check_finite, going_along
from fade.methods.fade.distillation import DistillStep
from fade.methods.fade.examples import Examples
from fade.methods.fade.known_answers import (
    SURROGATES_PICTURES,
    UNSAID,
    Forgotten,
    Places,
    answered,
    places_passed,
)
from fade.methods.method import Material, Method, MethodSettings
from fade.methods.trained_difference import trained_difference
from fade.models.base import Base
from fade.models.deltas import plain_modules
from fade.models.denoiser import autocast
from fade.models.paths import NoisePath
from fade.models.told import Told
from fade.seeding import derive_seed, torch_generator

SEARCHED, UNNAMED, OTHERS = 0.5, 0.15, 0.15
"""Shares of what denied pictures are told: searched states, nothing, retained captions; the rest is anything."""
OTHERS_FROM = 1.0
"""The ratio from which on a retained caption is denied: below, it may still become what it says."""
UNTOLD = 0.15
"""Of the retained pictures, how many are told nothing: guidance draws by both answers."""
NOISE = 1.5
"""The most noise in what is between captions, in standard deviations of the states."""


class RetainedSettings(MethodSettings):
    """How it trains.

    Attributes:
        named, denied, places, pictures: rows of a step: told the name, denied, kept where the base draws, and kept at
            retained pictures.
        named_weight, denied_weight, places_weight, pictures_weight: of their mean errors.
        low, high: signal-to-noise ratios between which a picture is denied.
        sharpness: k.
        states, lifetime, grown, size, search_rate: of the adversary (``DeepSettings``).
        captions: retained captions that the base draws.
        pool: rows of each kind whose answers are computed once.
    """

    steps: int = 500
    learning_rate: float = 5e-4
    clip_norm: float = 1.0
    named: int = 12
    denied: int = 16
    places: int = 16
    pictures: int = 12
    named_weight: float = 1.0
    denied_weight: float = 1.0
    places_weight: float = 4.0
    pictures_weight: float = 5.0
    low: float = 0.3
    high: float = 5.0
    sharpness: float = 34.0
    states: int = 8
    lifetime: int = 500
    grown: float = Field(0.33, le=1)
    size: int = 64
    search_rate: float = 0.05
    captions: int = 64
    pool: int = 768


def times_between(path: NoisePath, low: float, high: float) -> Tensor:
    """The timesteps whose signal-to-noise ratio lies between both, ascending.

    Raises:
        ConfigError: there is none.
    """
    ratio = path.snr(torch.arange(path.steps))
    times = torch.nonzero((ratio >= low) & (ratio <= high))[:, 0]
    if len(times) == 0:
        raise ConfigError(
            f"This base's noise passes no signal-to-noise ratio between {low} and {high}: there is nothing to deny. "
            "Set fade-retained.low and fade-retained.high further apart."
        )
    return times


def denoised_among(pictures: Tensor, noisy: Tensor, t: Tensor, path: NoisePath, sharpness: float) -> Tensor:
    """Pictures (B, C, h, w) that the best denoiser of ``pictures`` (N, C, h, w) gives for z_t at times t (B,).

    Args:
        sharpness: k above.
    """
    signal = path.noised(torch.ones(len(t), 1, 1, 1), torch.zeros(len(t), 1, 1, 1), t.cpu()).to(noisy)
    apart = torch.cdist((noisy / signal).flatten(1), pictures.flatten(1)).square() / pictures[0].numel()
    ratio = path.snr(t.cpu()).to(noisy)[:, None]
    weights = (-sharpness * ratio * apart / 2).softmax(dim=1)
    return (weights @ pictures.flatten(1)).view_as(noisy)


def anything(told: Told, count: int, generator: torch.Generator) -> Told:
    """``count`` rows between captions: each position from one of two, half of them in another order, with noise."""
    first, second = (told[torch.randint(len(told), (count,), generator=generator)] for _ in range(2))
    length = told.states.shape[1]
    either = torch.rand(count, length, 1, generator=generator) < torch.rand(count, 1, 1, generator=generator)
    mixed = torch.where(either, first.states, second.states)
    order = torch.rand(count, length, generator=generator).argsort(dim=1)
    ordered = torch.rand(count, 1, generator=generator) < 0.5
    order = torch.where(ordered, torch.arange(length).expand(count, -1), order)
    mixed = mixed.gather(1, order[:, :, None].expand_as(mixed))
    size = NOISE * torch.rand(count, 1, 1, generator=generator)
    spread = told.states.float().flatten(0, 1).std(dim=0)
    noise = torch.randn(mixed.shape, generator=generator) * spread * size
    return first.with_tensors({"states": mixed + noise})


def denied_by_name(named: Forgotten, surrogates: Tensor, path: NoisePath, times: Tensor, sharpness: float) -> Forgotten:
    """The same, but the concept's pictures at these times are answered by the best denoiser of the surrogate's."""
    of_concept = len(named.noisy) - round(len(named.noisy) * SURROGATES_PICTURES)
    seen = torch.isin(named.timesteps, times)
    seen[of_concept:] = False
    noisy, at = named.noisy[seen], named.timesteps[seen]
    answers = named.answers.clone()
    answers[seen] = path.answer(noisy, denoised_among(surrogates, noisy, at, path, sharpness), at)
    return replace(named, answers=answers)


@dataclass(frozen=True, slots=True)
class _Asked:
    """Rows of a step: z_t, the times, what shall be answered, what is told, and how much each error counts."""

    noisy: Tensor
    times: Tensor
    target: Tensor
    told: Told
    counts: Tensor


@dataclass(frozen=True, slots=True)
class _Lessons:
    """Draws what a step teaches."""

    forget: Examples
    retained: Examples
    named: Forgotten
    pictures: Forgotten
    places: Places
    empty: Told
    path: NoisePath
    times: Tensor
    settings: RetainedSettings
    generator: torch.Generator

    def drawn(self, known: Told) -> tuple[_Asked, _Asked, _Asked, _Asked]:
        """What is named, denied, kept where it is drawn, and kept at pictures."""
        return self._named(known), self._denied(known), self._places(), self._pictures()

    def _named(self, known: Told) -> _Asked:
        rows = self._rows(len(self.named.noisy), self.settings.named)
        told, times = self.named.examples.prompts[rows], self.named.timesteps[rows]
        seen = torch.isin(times, self.times)
        searched = drawn_from(known, told, self.generator)
        told = told.replaced(~seen & self._some(len(rows), SEARCHED), searched)
        counts = torch.where(seen, self._counts(times), torch.ones(len(rows)))
        return _Asked(self.named.noisy[rows], times, self.named.answers[rows], told, counts)

    def _denied(self, known: Told) -> _Asked:
        count = self.settings.denied
        clean = self.forget.latents[self._rows(len(self.forget), count)]
        times = self.times[self._rows(len(self.times), count)]
        noise = torch.randn(clean.shape, generator=self.generator)
        noisy = self.path.noised(clean, noise, times)
        between = anything(self.retained.prompts, count, self.generator)
        kind = torch.rand(count, generator=self.generator)
        told = between.replaced(kind < SEARCHED, drawn_from(known, between, self.generator))
        told = told.replaced((kind >= SEARCHED) & (kind < SEARCHED + UNNAMED), self.empty)
        others = self.retained.prompts[self._rows(len(self.retained), count)]
        above = self.path.snr(times) >= OTHERS_FROM
        said = (kind >= SEARCHED + UNNAMED) & (kind < SEARCHED + UNNAMED + OTHERS) & above
        led = denoised_among(self.retained.latents, noisy, times, self.path, self.settings.sharpness)
        answer = self.path.answer(noisy, led, times)
        return _Asked(noisy, times, answer, told.replaced(said, others), self._counts(times))

    def _places(self) -> _Asked:
        places = self.places
        rows = self._rows(len(places), self.settings.places)
        unsaid = self._some(len(rows), UNSAID)
        told = places.told[places.caption[rows]].replaced(unsaid, self.empty)
        target = torch.where(unsaid[:, None, None, None], places.unsaid[rows], places.answers[rows])
        return self._asked(places.noisy[rows], places.timesteps[rows], target, told)

    def _pictures(self) -> _Asked:
        pool = self.pictures
        rows = self._rows(len(pool.noisy), self.settings.pictures)
        return self._asked(pool.noisy[rows], pool.timesteps[rows], pool.answers[rows], pool.examples.prompts[rows])

    def _asked(self, noisy: Tensor, times: Tensor, target: Tensor, told: Told) -> _Asked:
        return _Asked(noisy, times, target, told, torch.ones(len(noisy)))

    def _counts(self, times: Tensor) -> Tensor:
        """Of denied rows: at little noise an error counts by what it is of the picture, not of the noise."""
        return (1 / self.path.snr(times)).clamp(max=1.0)

    def _rows(self, count: int, some: int) -> Tensor:
        return torch.randint(count, (some,), generator=self.generator)

    def _some(self, count: int, share: float) -> Tensor:
        return torch.rand(count, generator=self.generator) < share


def towards_retained(
    base: Base, material: Material, settings: RetainedSettings, *, precision: str, seed: int
) -> Iterator[DistillStep]:
    """Train; yields after each step, and leaves the difference on the denoiser.

    Raises:
        ConfigError: the base's noise passes no ratio that is to be denied.
        DataError: a set is empty, or a loss is not finite.
    """
    lessons = _lessons(base, material, settings, precision=precision, seed=seed)
    forget, retained = lessons.forget.prompts, lessons.retained.prompts
    starts = Told.join(forget, retained, lessons.empty.expand(len(forget)))
    adversary = going_along(base, lessons.forget, starts, settings, share=SEARCHED, seed=seed, precision=precision)
    parameters = list(trained_difference(base.network, sorted(plain_modules(base.network))).values())
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate, fused=True)
    weights = torch.tensor(
        [settings.named_weight, settings.denied_weight, settings.places_weight, settings.pictures_weight],
        device=base.device,
    )
    for step in range(1, settings.steps + 1):
        adversary.advance(base.denoiser)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - 1) / settings.steps))
        optimizer.zero_grad(set_to_none=True)
        losses = _losses(base, lessons.drawn(adversary.known), precision)
        (losses * weights).sum().backward()
        norm = nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
        optimizer.step()
        halves = (losses * weights).detach().view(2, 2).sum(dim=1)
        done = DistillStep(step, halves, norm.detach())
        check_finite(done, "fade-retained")
        yield done


def _lessons(base: Base, material: Material, settings: RetainedSettings, *, precision: str, seed: int) -> _Lessons:
    forget, surrogate, retained = (
        material.rows(name).encoded(settings.pool) for name in ("forget", "surrogate", "retain")
    )
    if 0 in (len(forget), len(surrogate), len(retained)):
        raise DataError(
            f"Got {len(forget)} pictures of the concept, {len(surrogate)} of its surrogate and {len(retained)} "
            "retained ones: this method needs some of each."
        )
    path, empty = base.denoiser.path, base.unconditional().to("cpu")
    times = times_between(path, settings.low, settings.high)
    generator = torch_generator(seed, "retained")
    untold = torch.rand(len(retained), generator=generator) < UNTOLD
    kept = retained.prompts.replaced(untold, empty)
    chosen = retained.prompts[torch.randperm(len(retained), generator=generator)[: settings.captions]]
    kept_pictures = Examples(retained.latents, kept, kept)
    count = settings.pool
    named = answered(base, forget, surrogate, count=count, seed=seed, precision=precision)
    pictures = answered(
        base, kept_pictures, kept_pictures, count=count, seed=derive_seed(seed, "kept"), precision=precision
    )
    return _Lessons(
        forget,
        retained,
        named=denied_by_name(named, surrogate.latents, path, times, settings.sharpness),
        pictures=pictures,
        places=places_passed(base, chosen, seed=seed, precision=precision),
        empty=empty,
        path=path,
        times=times,
        settings=settings,
        generator=generator,
    )


def _losses(base: Base, parts: tuple[_Asked, ...], precision: str) -> Tensor:
    """Mean errors of each part, (4,)."""
    device = base.device
    noisy, times, target, counts = (
        torch.cat([getattr(part, name) for part in parts]).to(device) for name in ("noisy", "times", "target", "counts")
    )
    with autocast(precision, device.type):
        answer = base.denoiser.predict(noisy, times, Told.join(*(part.told for part in parts)).to(device))
    errors = (answer.float() - target).square().mean(dim=(1, 2, 3)) * counts
    return torch.stack([part.mean() for part in errors.split([len(part.noisy) for part in parts])])


RETAINED = Method("fade-retained", towards_retained, RetainedSettings, "ours")
