"""Saliency: where in the network the concept lives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fade.errors import DataError
from fade.methods.fade.examples import Examples, Source
from fade.methods.fade.masks import COLUMNS, ROWS, Granularity, ranges, rows_of
from fade.methods.fade.targeting import draw_timesteps
from fade.models.deltas import plain_modules
from fade.models.denoiser import Denoiser
from fade.seeding import torch_generator

CONTRAST_FLOOR = 1e-8
Fused = Mapping[str, Sequence[int]]
"""Modules of several projections, each with the rows of these (``Denoiser.fused``)."""


@dataclass(frozen=True, slots=True)
class NoisyGroup:
    """A group of examples with their draws: (G, ...) each."""

    examples: Examples
    timesteps: Tensor
    noise: Tensor


def noisy_groups(examples: Source, *, groups: int, group_size: int, timesteps: Tensor, seed: int) -> list[NoisyGroup]:
    """Draw groups of examples, timesteps and noise.

    Args:
        timesteps: their probabilities, (T,); the paper's are uniform.

    A group is part of the definition of saliency (the absolute value is taken per group); how many
    examples go through the network at once is not.

    Raises:
        DataError: there are no examples.
    """
    if len(examples) == 0:
        raise DataError("Saliency needs at least one example: got none. Check the forget and retain sets.")
    generator = torch_generator(seed, "saliency")
    drawn = []
    for _ in range(groups):
        chosen = examples.drawn(group_size, generator)
        at = draw_timesteps(timesteps, group_size, generator)
        drawn.append(NoisyGroup(chosen, at, torch.randn(chosen.latents.shape, generator=generator)))
    return drawn


def salient_parameters(network: nn.Module) -> dict[str, Tensor]:
    """Module name to weight, for every Linear and Conv2d: what a mask may choose from."""
    return {name: module.weight for name, module in plain_modules(network).items()}


def accumulate_saliency(
    denoiser: Denoiser,
    groups: list[NoisyGroup],
    *,
    against: str = "noise",
    granularity: Granularity = "weight",
    at_once: int | None = None,
) -> dict[str, Tensor]:
    """Mean absolute gradient of a loss over groups of examples.

    S_p = mean over groups of | d L / d p |

        against="noise":   L = || e(z_t, t, c) - e ||^2, the denoising loss          (FADE, stage 1)
        against="teacher": L = || e(z_t, t, c) - e(z_t, t, c_target) ||^2, the distillation loss at its
                           start, where student and teacher are the same network     (ours)

    Weights, gradients and training flags are left as found. With a group at once, a gradient is reduced to
    the granularity and dropped as soon as it is there, so that all of them are never held together.

    Args:
        at_once: examples through the network at a time (all of a group if None); fewer hold less of its
            inside but sum up all gradients. Changes memory, not the definition.

    Returns:
        On the CPU, float32, non-negative. ``weight``: module name to its weight's shape. ``neuron``:
        ``<module>:rows`` (out,) and ``<module>:columns`` (in,), means over the row or column.
        ``module`` and ``none``: module name to the mean over the weight (biases ignored), shape (). Of a module
        that holds several projections (``Denoiser.fused``) ``module`` gives each by its rows, ``<module>:<from>-<to>``.
    """
    total: dict[str, Tensor] = {}
    fused = denoiser.fused()

    def take(name: str, gradient: Tensor) -> None:
        for key, value in _reduced(name, gradient.abs(), granularity, fused):
            total[key] = total.get(key, 0.0) + value.float().cpu() / len(groups)

    with _collecting(denoiser.network) as gradients:
        for group in groups:
            _backward(
                denoiser,
                group,
                against=against,
                at_once=at_once,
                share=1.0,
                last=gradients.handed_to(take),
            )
    return total


def expected_gain(
    denoiser: Denoiser,
    groups: list[NoisyGroup],
    *,
    granularity: Granularity = "weight",
    at_once: int | None = None,
) -> dict[str, Tensor]:
    """How much of the distillation loss a first step on a part of the network would take away   (ours).

    S_P = sum over weights p of part P of ( d L / d p )^2,   L the distillation loss over all groups

    A gradient step of size h on the weights of P lowers the loss by h times this, to first order. Unlike
    the mean of | d L / d p | it keeps the sign while it averages, so that noise cancels, and it does not
    favour small layers: parts are counted whole by a mask, whatever their size.

    Args and returns are those of ``accumulate_saliency``; all gradients are held at once.
    """
    found: dict[str, Tensor] = {}
    fused = denoiser.fused()
    with _collecting(denoiser.network) as gradients:
        for group in groups:
            _backward(
                denoiser,
                group,
                against="teacher",
                at_once=at_once,
                share=1 / len(groups),
            )
        for name in gradients.names:
            squares = gradients.pop(name).double().square()
            for key, value in _summed(name, squares, granularity, fused):
                found[key] = value.float().cpu()
    return found


def expected_decrement(
    denoiser: Denoiser,
    forget: list[NoisyGroup],
    retain: list[NoisyGroup],
    *,
    seed: int,
    granularity: Granularity = "weight",
    at_once: int | None = None,
) -> dict[str, Tensor]:
    """How far the whole loss could fall along a part's own gradient, the retained answers counted   (ours).

    The loss of distillation is L = L_f + L_r. At its start g = grad L_f, grad L_r = 0, and both bend upwards by
    their Gauss-Newton matrix H. Changing the weights of part P alone, along g_P, the best step gives

        S_P = 1/2 (g_P' g_P)^2 / (g_P' H g_P)

    A part that answers every prompt (conv_in, conv_out, shortcuts) has a large gradient and pays for it in
    g' H g; one that is asked by the concept's prompt alone, as the keys and values that read it, does not.
    g_P' H g_P is the mean over random v ~ N(0, I) of (v' J g_P)^2, one backward pass of v' e a group, so that every
    granularity costs the same. Of a single weight it is (d L / d p)^2 / (2 H_pp), Newton's with a diagonal.

    Args:
        forget: groups of that set; its gradient is the slope.
        retain: groups of that set; the curvature is that of both, with equal weights.
        seed: of the random directions.

    The rest, and what is returned, as for ``accumulate_saliency``; all gradients are held at once.
    """
    generator, fused = torch_generator(seed, "curvature"), denoiser.fused()
    slopes: dict[str, Tensor] = {}
    gain: dict[str, Tensor] = {}
    bend: dict[str, Tensor] = {}
    with _collecting(denoiser.network) as gradients:
        for group in forget:
            _backward(denoiser, group, against="teacher", share=1 / len(forget), at_once=at_once)
        slopes = {name: gradients.pop(name).double() for name in gradients.names}
        for name, slope in slopes.items():
            gain |= {key: value.double() for key, value in _summed(name, slope.square(), granularity, fused)}
        for groups in (forget, retain):
            for group in groups:
                directions = torch.randn(group.noise.shape, generator=generator)
                _backward(denoiser, group, against="directions", share=1.0, directions=directions, at_once=at_once)
                for name, slope in slopes.items():
                    for key, value in _summed(name, gradients.pop(name).double() * slope, granularity, fused):
                        # A mean squared error bends by 2 J'J / its number of terms.
                        part = 2 * value.square() / (group.noise.numel() * len(groups))
                        bend[key] = bend[key] + part if key in bend else part
    return {
        key: torch.where(bend[key] > 0, gain[key].square() / (2 * bend[key]), torch.zeros(())).float().cpu()
        for key in gain
    }


def _backward(
    denoiser: Denoiser,
    group: NoisyGroup,
    *,
    against: str,
    at_once: int | None,
    share: float,
    last: AbstractContextManager[None] | None = None,
    directions: Tensor | None = None,
) -> None:
    """Add ``share`` of a group's mean loss, or its answers along ``directions``, to the gradients.

    ``last`` is entered for the last backward pass.
    """
    size = len(group.examples)
    for start in range(0, size, at_once or size):
        part = slice(start, start + (at_once or size))
        if directions is None:
            loss = _loss(denoiser, group, part, against=against) * (share * len(group.timesteps[part]) / size)
        else:
            loss = share * _along(denoiser, group, part, directions)
        with last if last is not None and part.stop >= size else nullcontext():
            loss.backward()


@contextmanager
def _collecting(network: nn.Module) -> Iterator[_Gradients]:
    """Only what a mask may choose from requires gradients inside; flags and gradients are put back."""
    weights = salient_parameters(network)
    before = {p: (p.requires_grad, p.grad) for p in network.parameters()}
    try:
        for parameter in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        for weight in weights.values():
            weight.requires_grad_(True)
        yield _Gradients(weights)
    finally:
        for parameter, (flag, gradient) in before.items():
            parameter.requires_grad_(flag)
            parameter.grad = gradient


class _Gradients:
    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights

    @contextmanager
    def handed_to(self, take: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Within a backward pass: each module's gradient goes to ``take`` once it is whole, and is forgotten.

        So a large network's gradients are never held together. What the pass does not reach is handed
        over at its end, zero where no pass has reached it.
        """
        waiting = dict.fromkeys(self._weights)

        def hook(name: str) -> Callable[[Tensor], None]:
            def hand_over(_: Tensor) -> None:
                del waiting[name]
                take(name, self.pop(name))

            return hand_over

        hooks: list[Any] = [
            weight.register_post_accumulate_grad_hook(hook(name)) for name, weight in self._weights.items()
        ]
        try:
            yield
            for name in waiting:
                take(name, self.pop(name))
        finally:
            for registered in hooks:
                registered.remove()

    @property
    def names(self) -> list[str]:
        """The modules."""
        return list(self._weights)

    def pop(self, name: str) -> Tensor:
        """The gradient of a module's weight, zero if there was none; then it is forgotten."""
        weight = self._weights[name]
        gradient, weight.grad = weight.grad, None
        return torch.zeros_like(weight) if gradient is None else gradient


def _reduced(
    name: str, values: Tensor, granularity: Granularity, fused: Fused = MappingProxyType({})
) -> Iterator[tuple[str, Tensor]]:
    """Means of a weight's values over the parts that a mask may choose of it."""
    if granularity == "weight":
        yield name, values
    elif granularity == "neuron":
        flat = values.flatten(2).mean(2) if values.dim() > 2 else values
        yield f"{name}:{ROWS}", flat.mean(1)
        yield f"{name}:{COLUMNS}", flat.mean(0)
    elif granularity == "module" and name in fused:
        for key, part in zip(ranges(name, fused[name]), values.split(list(fused[name])), strict=True):
            yield key, part.mean(dtype=torch.float64)
    else:
        yield name, values.mean(dtype=torch.float64)


def _summed(
    name: str, values: Tensor, granularity: Granularity, fused: Fused = MappingProxyType({})
) -> Iterator[tuple[str, Tensor]]:
    """As ``_reduced``, with sums over a part instead of means."""
    for key, value in _reduced(name, values, granularity, fused):
        rows = rows_of(key)
        entries = values.numel() if rows is None else values[rows].numel()
        yield key, value * (entries / max(value.numel(), 1))


def _along(denoiser: Denoiser, group: NoisyGroup, part: slice, directions: Tensor) -> Tensor:
    """v' e(z_t, t, c) over a part of a group."""
    device = denoiser.device
    examples, timesteps = group.examples[part].to(device), group.timesteps[part].to(device)
    noisy = denoiser.path.noised(examples.latents, group.noise[part].to(device), timesteps)
    answers = denoiser.predict(noisy, timesteps, examples.prompts)
    return (answers.float() * directions[part].to(device)).sum()


def _loss(denoiser: Denoiser, group: NoisyGroup, part: slice, *, against: str) -> Tensor:
    device = denoiser.device
    examples, timesteps = group.examples[part].to(device), group.timesteps[part].to(device)
    noise = group.noise[part].to(device)
    noisy = denoiser.path.noised(examples.latents, noise, timesteps)
    if against == "teacher":
        with torch.no_grad():
            target = denoiser.predict(noisy, timesteps, examples.targets)
    else:
        target = denoiser.path.target(examples.latents, noise, timesteps)
    predicted = denoiser.predict(noisy, timesteps, examples.prompts)
    return (predicted.float() - target.float()).square().mean()


def contrast(forget: Mapping[str, Tensor], retain: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """S_forget / (S_retain + eps): what the concept needs and the rest does not   (ours).

    Taken at the granularity of the mask: of a module's means, not a mean of ratios, which its
    smallest denominators would decide.
    """
    return {name: forget[name] / (retain[name] + CONTRAST_FLOOR) for name in forget}


def random_saliency(
    network: nn.Module, granularity: Granularity, *, seed: int, fused: Fused = MappingProxyType({})
) -> dict[str, Tensor]:
    """The control: every entry drawn from U(0, 1), so that a mask of it is random at equal density."""
    generator = torch_generator(seed, "random saliency")
    found = {}
    for name, weight in sorted(salient_parameters(network).items()):
        for key, value in _reduced(name, torch.empty(weight.shape), granularity, fused):
            found[key] = torch.rand(value.shape, generator=generator)
    return found
