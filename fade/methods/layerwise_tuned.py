"""Layer by layer, then as a whole: what was solved is trained on through all its layers together   (ours).

Least squares mends each layer given those before it, and knows nothing of those after it (``fade.methods.layers``).
Where a hundred concepts share what few layers can do, that is too little: what is solved is where training begins,

    L = (1 - retain_share) E_f |e_student(z_t, t, c) - e_teacher(z_t, t, c_s)|^2
        + retain_share E_r |e_student(z_t, t, c) - e_teacher(z_t, t, c)|^2

f: noised pictures under captions of the erased concepts, c_s the surrogates'; r: under others' captions and none. They
are drawn as those that are solved for, and the teacher answers all of them once. Rows to forget take turns, so that
every concept is seen as often as any other. All modules are trained, at one rank, those that were not solved from zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fade.methods.fade.sparse_lora import adapters_disabled, computed_whole
from fade.methods.layers import Batch, LayerwiseSettings, left, noised_batch, placed, solved
from fade.methods.method import Material, Method
from fade.methods.trained_difference import Losses
from fade.models.base import Base
from fade.models.denoiser import autocast
from fade.seeding import derive_seed, torch_generator

AT_ONCE = 128
"""Rows that the teacher answers at a time."""
WARM = 10
"""Steps until the learning rate is whole: what is solved is not to be thrown about."""
WIDER = 4
"""Of what is kept the pool is at most so many times as large as it is set."""


class TunedSettings(LayerwiseSettings):
    """What is solved first, and how it is trained on.

    Attributes:
        rank: of every module's change; of what was solved the greatest part.
        steps: the first solves, each other one is a step of AdamW.
        learning_rate: at its highest; it ends at 0, by a cosine.
        batch: rows of a step, half of them to forget.
        pool: noised pictures of each half, at least one for each concept; of what is kept as many as are retained, up
            to four times as many: of few pictures of many concepts these alone stay where they were.
        retain_share: of the loss.
    """

    rank: int = 32
    steps: int = 300
    learning_rate: float = 1e-3
    batch: int = 48
    pool: int = 768
    retain_share: float = 0.5


def layerwise_tuned(
    base: Base, material: Material, settings: TunedSettings, *, precision: str, seed: int
) -> Iterator[Losses]:
    """Solve, which is the first step, then descend; yields each step with its losses.

    Raises:
        NoMatchingModulesError: the base has no cross-attention of the stock kind.
    """
    changes, solved_for = solved(base, material, settings, precision=precision, seed=seed)
    parameters = placed(base, changes, base.denoiser.modules(), rank=settings.rank, seed=seed)
    material.notes.update(rank=settings.rank)
    yield left(base, solved_for, precision)
    retained = len(material.rows("retain"))
    counts = {"forget": settings.pool, "retain": min(max(settings.pool, retained), WIDER * settings.pool)}
    pool = noised_batch(base, material, settings.model_copy(update=counts), seed=derive_seed(seed, "tuned"))
    aims = answered(base, pool, precision)
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    generator = torch_generator(seed, "tuned")
    half = settings.batch // 2
    forget, retain = (rows.nonzero().squeeze(1).cpu() for rows in (pool.forget, ~pool.forget))
    order = forget[torch.randperm(len(forget), generator=generator)]
    for step in range(2, settings.steps + 1):
        turn = (torch.arange(half) + (step - 2) * half) % len(order)
        chosen = torch.cat([order[turn], retain[torch.randint(len(retain), (half,), generator=generator)]])
        rows = chosen.to(base.device)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate(step - 1, settings.steps - 1)
        with autocast(precision, base.device.type), computed_whole(base.network):
            answers = base.denoiser.predict(pool.noisy[rows], pool.t[rows], pool.told[rows])
        apart = (answers.float() - aims[rows]).square().flatten(1).mean(dim=1)
        gone, kept = apart[:half].mean(), apart[half:].mean()
        optimizer.zero_grad(set_to_none=True)
        ((1 - settings.retain_share) * gone + settings.retain_share * kept).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        yield Losses(step, float(gone.detach()), float(kept.detach()))


def answered(base: Base, pool: Batch, precision: str) -> Tensor:
    """What the base answers to all of the pool, (B, C, h, w) float32, told what is taught."""
    with torch.no_grad(), adapters_disabled(base.network), autocast(precision, base.device.type):
        rows = torch.arange(len(pool.t), device=base.device).split(AT_ONCE)
        return torch.cat([base.denoiser.predict(pool.noisy[i], pool.t[i], pool.taught[i]).float() for i in rows])


def rate(step: int, steps: int) -> float:
    """Share of the learning rate at a step, from 1: it rises over the first few and falls to 0 by a cosine."""
    return min(1.0, step / WARM) * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))


LAYERWISE_TUNED = Method("layerwise-tuned", layerwise_tuned, TunedSettings, "ours", several=True)
