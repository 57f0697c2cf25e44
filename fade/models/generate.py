"""Generate pictures in batches: one solver loop with classifier-free guidance."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fade.models.base import Base
from fade.models.denoiser import autocast
from fade.models.latents import to_pictures
from fade.models.told import Told

Solver = Literal["ddim", "dpm++"]
TOGETHER, TOGETHER_PIXELS = 12, 512 * 512
"""How many pictures a processor draws at a time, and how many pixels: of 512 x 512 one. So many fit its cache."""


def first_latents(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Each picture's first noise, from a generator of its own seed (as UnlearnCanvas re-seeds per image)."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def guided(base: Base, told: Told, guidance: float) -> Callable[..., Tensor]:
    """The denoiser with classifier-free guidance (arXiv:2207.12598), of noisy latents and a timestep.

    A third argument scales the latents as a solver asks (``scale_model_input``).

    Args:
        guidance: how far to go beyond the empty prompt's answer, above 1. At most 1 means no guidance, as in the stock
            pipelines: the prompt alone is followed. Models that were distilled for it are drawn so. Those that are
            told their guidance are told this (``Base.guide``).
    """
    told, guidance = base.guide(told, guidance)
    with_empty = guidance > 1
    if with_empty:
        told = Told.join(base.unconditional().expand(len(told)), told)
    told = told.to(base.device)

    def answer(noisy: Tensor, timestep: Tensor, scale: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        doubled = torch.cat([noisy, noisy]) if with_empty else noisy
        scaled = doubled if scale is None else scale(doubled, timestep)
        answers = base.denoiser.predict(scaled, timestep.to(base.device), told).float()
        if not with_empty:
            return answers
        without, with_prompt = answers.chunk(2)
        return base.combine(without, with_prompt, guidance)

    return answer


@torch.no_grad()
def sample_latents(
    base: Base,
    told: Told,
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    solver: Solver,
    precision: str = "fp32",
) -> Tensor:
    """Scaled latents (B, C, h, w) float32 for text states and seeds of equal number, adapters as they are.

    Deterministic: no solver draws noise after the first latents.

    Args:
        guidance: see ``guided``.
    """
    scheduler = base.solver(solver, steps)
    latents = first_latents(seeds, base.denoiser.latent_shape).to(base.device)
    answer = guided(base, told, guidance)
    with autocast(precision, base.device.type):
        for timestep in scheduler.timesteps:
            latents = scheduler.step(
                answer(latents, timestep, getattr(scheduler, "scale_model_input", None)), timestep, latents
            ).prev_sample
    return latents


@torch.no_grad()
def generate_from(
    base: Base,
    told: Told,
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    solver: Solver,
    precision: str = "fp32",
) -> NDArray[np.uint8]:
    """The same as pictures, (B, H, W, 3) uint8."""
    latents = sample_latents(base, told, seeds, steps=steps, guidance=guidance, solver=solver, precision=precision)
    with autocast(precision, base.device.type):
        decoded = base.decode(latents)
    return to_pictures(decoded)


def generate_batch(
    base: Base,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    solver: Solver,
    precision: str = "fp32",
) -> NDArray[np.uint8]:
    """The same for prompts."""
    return generate_from(
        base, base.encode_prompts(prompts), seeds, steps=steps, guidance=guidance, solver=solver, precision=precision
    )


def together(side: int) -> int:
    """How many pictures of so many pixels a side a processor draws at a time."""
    return min(TOGETHER, max(1, TOGETHER_PIXELS // side**2))


def generate(
    base: Base,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    batch: int,
    part: int | None = None,
    steps: int,
    guidance: float,
    solver: Solver,
    precision: str = "fp32",
) -> Iterator[NDArray[np.uint8]]:
    """The same in parts, in order.

    A processor draws small pictures in several parts side by side, each on one thread: what is computed for them gains
    little from threads within an operation. How many are drawn beside a part changes no bit of it.

    Args:
        batch: pictures that are worked on at most.
        part: pictures of a part; by default a GPU's is the batch, and a processor's what fits its cache (``together``).
    """
    few = together(base.picture_size)
    on_processor = base.device.type == "cpu"
    size = part or (min(batch, few) if on_processor else batch)
    draw = partial(generate_from, base, steps=steps, guidance=guidance, solver=solver, precision=precision)
    parts = [slice(start, start + size) for start in range(0, len(prompts), size)]
    if not on_processor or few == 1:
        for rows in parts:
            yield draw(base.encode_prompts(prompts[rows]), seeds[rows])
        return
    threads = torch.get_num_threads()
    beside = max(1, min(threads, batch // size))
    with ThreadPoolExecutor(beside, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            under_way: deque[Future[NDArray[np.uint8]]] = deque()
            for rows in parts:
                if len(under_way) > beside:
                    yield under_way.popleft().result()
                under_way.append(pool.submit(draw, base.encode_prompts(prompts[rows]), seeds[rows]))
            while under_way:
                yield under_way.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)  # a thread's own number becomes that of threads begun later
