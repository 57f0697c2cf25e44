"""What the base answers, computed once: on its way as it draws what is kept, and to pictures   (ours).

A student is taught the same answers over and over: the base, which does not change, gives each of them once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fade.methods.fade.examples import Examples, joined
from fade.methods.fade.sparse_lora import adapters_disabled
from fade.models.base import Base
from fade.models.denoiser import autocast
from fade.models.generate import first_latents
from fade.models.told import Told
from fade.seeding import derive_seed, torch_generator

DRAWN_STEPS, DRAWN_GUIDANCE, DRAWN_TOGETHER = 10, 4.0, 12
"""Of the base's drawing of what is kept: the solver's steps, its guidance, and how many captions go together."""
SURROGATES_PICTURES = 0.25
"""Of the forget examples, how many are pictures of the surrogate: either must lead to it."""
UNSAID = 0.3
"""Of the kept places, how many are answered with nothing said: guidance draws by both answers."""
AT_ONCE = 32
"""Forget examples that the base answers at a time."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where the base passed as it drew captions, and what it answered.

    Attributes:
        noisy, timesteps: z_t, (N, C, h, w) float32, and what the network was told of the time, (N,).
        caption: whose drawing it was, (N,), a row of ``told``.
        answers, unsaid: of the base to the caption and to nothing, (N, C, h, w) float32.
        told: the captions that were drawn, a row each.
    """

    noisy: Tensor
    timesteps: Tensor
    caption: Tensor
    answers: Tensor
    unsaid: Tensor
    told: Told

    def __len__(self) -> int:
        return len(self.noisy)

    @property
    def spread(self) -> Tensor:
        """Standard deviations of the captions' states, (D,)."""
        return self.told.states.float().flatten(0, 1).std(dim=0)


@torch.no_grad()
def places_passed(base: Base, told: Told, *, seed: int, precision: str) -> Places:
    """Draw each caption once, the adapters off, and keep every place on the way."""
    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, len(told), DRAWN_TOGETHER):
        rows = torch.arange(start, min(start + DRAWN_TOGETHER, len(told)))
        asked, guidance = base.guide(told[rows], DRAWN_GUIDANCE)
        both = Told.join(base.unconditional().expand(len(rows)), asked).to(base.device)
        scheduler = base.solver("ddim", DRAWN_STEPS)
        scale = getattr(scheduler, "scale_model_input", None)
        seeds = [derive_seed(seed, "place", int(row)) for row in rows]
        noisy = first_latents(seeds, base.denoiser.latent_shape).to(base.device)
        with autocast(precision, base.device.type), adapters_disabled(base.network):
            for timestep in scheduler.timesteps:
                seen = noisy if scale is None else scale(noisy, timestep)
                time = timestep.to(base.device)
                answers = base.denoiser.predict(torch.cat([seen, seen]), time, both).float()
                unsaid, said = answers.chunk(2)
                parts.append((seen, time.expand(len(rows)), rows.to(base.device), said, unsaid))
                answer = base.combine(unsaid, said, guidance) if guidance > 1 else said
                noisy = scheduler.step(answer, timestep, noisy).prev_sample
    noisy, times, caption, answers, unsaid = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return Places(noisy, times, caption, answers, unsaid, told)


@dataclass(frozen=True, slots=True)
class Forgotten:
    """Forget examples with their noise, and the base's answers to the surrogate's captions."""

    examples: Examples
    noisy: Tensor
    timesteps: Tensor
    answers: Tensor


@torch.no_grad()
def answered(base: Base, forget: Examples, surrogate: Examples, *, count: int, seed: int, precision: str) -> Forgotten:
    """Draw so many, and ask the base once."""
    generator = torch_generator(seed, "rounds", "pool")
    of_surrogate = round(count * SURROGATES_PICTURES)
    examples = joined(forget.drawn(count - of_surrogate, generator), surrogate.drawn(of_surrogate, generator))
    path = base.denoiser.path
    times = torch.randint(path.steps, (count,), generator=generator)
    noisy = path.noised(examples.latents, torch.randn(examples.latents.shape, generator=generator), times)
    answers: list[Tensor] = []
    with autocast(precision, base.device.type), adapters_disabled(base.network):
        for start in range(0, count, AT_ONCE):
            rows = slice(start, start + AT_ONCE)
            asked = (noisy[rows].to(base.device), times[rows].to(base.device), examples.targets[rows].to(base.device))
            answers.append(base.denoiser.predict(*asked).float().cpu())
    return Forgotten(examples, noisy, times, torch.cat(answers))
