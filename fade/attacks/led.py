"""Guidance by a judge: at every step the latents are moved to where a classifier sees more of the concept.

With z_0 the picture that the network's answer implies at z_t, and p what a judge thinks it shows,

    z_(t-1) <- z_(t-1) + pull * g / rms(g),     g = d log p(concept | decode(z_0)) / d z_t

(classifier guidance, arXiv:2105.05233, on the implied picture as arXiv:2302.07121, forward universal guidance). The
network's answer is taken as constant in g, so that no step costs its backward pass. Nothing is said of the concept: the
prompt is empty, and what is drawn is what the network still knows and the judge recognises. One judge leads and the
other one counts: a pull alone finds patterns that please the judge whose gradient it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fade.models.base import Base
from fade.models.denoiser import autocast
from fade.models.generate import first_latents, guided

Likelihood = Callable[[Tensor], Tensor]
"""log p(concept) of pictures (B, 3, H, W) in about -1..1, (B,), with a gradient."""


def draw_led(
    base: Base, seeds: Sequence[int], likelihood: Likelihood, *, pull: float, steps: int, precision: str
) -> NDArray[np.uint8]:
    """A picture (H, W, 3) for each seed, with the adapters that are on, by DDIM; (B, H, W, 3).

    Args:
        pull: how far each step moves the latents, as root mean square.
    """
    scheduler = base.solver("ddim", steps)
    noisy = first_latents(seeds, base.denoiser.latent_shape).to(base.device)
    answer = guided(base, base.unconditional().expand(len(seeds)), 1.0)
    for timestep in scheduler.timesteps:
        with torch.no_grad(), autocast(precision, base.device.type):
            said = answer(noisy, timestep)
        moved = pull * towards(base, noisy, said, timestep, likelihood)
        noisy = scheduler.step(said, timestep, noisy).prev_sample + moved
    with torch.no_grad():
        decoded = base.decode(noisy)
    pixels = (decoded.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    return np.ascontiguousarray(pixels.permute(0, 2, 3, 1).cpu().numpy())


def towards(base: Base, noisy: Tensor, said: Tensor, timestep: Tensor, likelihood: Likelihood) -> Tensor:
    """Where the judge sees more of the concept, (B, C, h, w), of root mean square 1 in each picture."""
    free = noisy.detach().requires_grad_(True)
    times = timestep.expand(len(free)).to(base.device)
    shown = base.decode(base.denoiser.path.clean(free, said, times))
    (gradient,) = torch.autograd.grad(likelihood(shown).sum(), free)
    length = gradient.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    return gradient / length.clamp(min=torch.finfo(gradient.dtype).tiny)
