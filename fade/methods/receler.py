"""Receler, lightweight erasers (Huang et al., arXiv:2311.17717). Own implementation.

An eraser of low rank at the end of every cross-attention, trained towards the opposite of the concept (ESD's target),
with two measures of the paper's:

*Adversarial prompt learning.* States stand behind the caption that are trained *against* the eraser, to bring the
frozen network's answer to the concept back: a few steps of them for one of the eraser. They are carried over from step
to step, so that the attacker grows with the defence.

*Concept-localised regularisation.* What the eraser adds, o, is not to reach where the concept is not:

    w mean over layers of  | o (1 - M) |^2 / |1 - M|,     M = 1( attention to the concept's words >= threshold )

M is the frozen network's attention on this very z_t, from least to most brought to 0..1.

What differs: the paper's eraser has a nonlinearity, which no change of weights holds; here it is a LoRA of the
attention's output projection. The words of the concept are the positions at which its caption differs from the one
with the surrogate's name by half of the most or more; and each layer goes by its own attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fade.errors import NoMatchingModulesError
from fade.methods.fade.sparse_lora import lora_layers
from fade.methods.method import STUDENT, Material, Method
from fade.methods.negative_guidance import NegativeSettings, frozen_answers, half_drawn
from fade.methods.trained_difference import Losses, descended, drawn, modules_of, trained_low_rank
from fade.models.base import Base
from fade.models.denoiser import autocast
from fade.models.told import Told
from fade.seeding import torch_generator

OUTPUT = ".to_out.0"
WORD = 0.5


class RecelerSettings(NegativeSettings):
    """The eraser's ``rank``, its attacker and where it may act.

    Attributes:
        tokens: states of the attacker, the paper's 16; of a short text half of its positions at most.
        attack_steps: of the attacker in every step, at ``attack_rate``.
        regularisation, threshold: w, and the attention from which on a place shows the concept.
    """

    learning_rate: float = 3e-4
    rank: int = 16
    tokens: int = 16
    attack_steps: int = 4
    attack_rate: float = 0.1
    regularisation: float = 0.1
    threshold: float = 0.1


def receler(
    base: Base, material: Material, settings: RecelerSettings, *, precision: str, seed: int
) -> Iterator[Losses]:
    """Train; yields after each step, and leaves the LoRA on the denoiser."""
    generator = torch_generator(seed, "receler")
    layers = attention_layers(base)
    changes = trained_low_rank(base.network, [name + OUTPUT for name in layers], rank=settings.rank, seed=seed)
    length, width = material.concept.states.shape[1:]
    count = min(settings.tokens, length // 2)
    attacker = torch.rand(count, width, generator=generator).to(base.device).requires_grad_(True)
    optimizer = torch.optim.Adam([attacker], lr=settings.attack_rate)

    def losses() -> tuple[Tensor, Tensor]:
        rows = drawn(len(material.concept), settings.batch, generator)
        told = material.concept[rows]
        noisy, timestep = half_drawn(base, told, settings, generator, precision)
        with attended(base, layers) as seen:
            without, concept = frozen_answers(base, noisy, timestep, [None, told], precision=precision)
        words = concept_words(told, material.surrogate[rows]).to(base.device)
        shown = {name: shows(one[len(told) :], words, settings.threshold) for name, one in seen.items()}
        for _ in range(settings.attack_steps):
            with autocast(precision, base.device.type):
                answer = base.denoiser.predict(noisy, timestep, behind(told.to(base.device), attacker))
            (attacker.grad,) = torch.autograd.grad((answer.float() - concept).square().mean(), attacker)
            optimizer.step()
        with autocast(precision, base.device.type), erasing(base.network, layers) as added:
            answer = base.denoiser.predict(noisy, timestep, behind(told.to(base.device), attacker.detach()))
        target = without - settings.eta * (concept - without)
        outside = torch.stack([spilt(added[name], shown[name]) for name in layers]).mean()
        return (answer.float() - target).square().mean(), outside

    yield from descended(
        changes, losses, steps=settings.steps, learning_rate=settings.learning_rate, weight=settings.regularisation
    )


def attention_layers(base: Base) -> list[str]:
    """Names of the layers in which the picture attends to the text.

    Raises:
        NoMatchingModulesError: there is none whose output can be changed by itself.
    """
    keys = {name.removesuffix(".to_k") for name in modules_of(base.denoiser, "cross_attention")}
    found = sorted(name for name in keys if name + OUTPUT in base.denoiser.modules())
    if not found:
        raise NoMatchingModulesError(
            "The denoiser has no cross-attention with an output projection: this method cannot be used on a base of "
            "this family."
        )
    return found


def behind(told: Told, attacker: Tensor) -> Told:
    """Captions with the attacker's states, (n, D), in the place of their last n."""
    count, rows = len(attacker), len(told)
    states = torch.cat([told.states[:, :-count], attacker.expand(rows, -1, -1)], dim=1)
    mask = None if told.mask is None else torch.cat([told.mask[:, :-count], told.mask.new_ones(rows, count)], dim=1)
    return told.with_tensors({"states": states} if mask is None else {"states": states, "mask": mask})


def concept_words(concept: Told, surrogate: Told) -> Tensor:
    """The positions that say the concept, (B, L) bool."""
    apart = (concept.states - surrogate.states).norm(dim=-1)
    return apart >= WORD * apart.max(dim=1, keepdim=True).values


def shows(attention: Tensor, words: Tensor, threshold: float) -> Tensor:
    """Which places of attention (B, places, L) show the words, (B, places) bool."""
    to_words = (attention * words[:, None]).sum(-1) / words.sum(-1, keepdim=True)
    least, most = to_words.amin(dim=1, keepdim=True), to_words.amax(dim=1, keepdim=True)
    return (to_words - least) / (most - least).clamp(min=torch.finfo(to_words.dtype).tiny) >= threshold


def spilt(added: Tensor, inside: Tensor) -> Tensor:
    """Mean square of what was added, (B, places, C), over the places that are not inside."""
    outside = (~inside).to(added)
    return (added.square().mean(-1) * outside).sum() / outside.sum().clamp(min=1)


@contextmanager
def attended(base: Base, layers: list[str]) -> Iterator[dict[str, Tensor]]:
    """Fills, at a forward inside, each layer's attention averaged over heads, (B, places, L) float32."""
    modules: dict[str, Any] = dict(base.network.named_modules())
    seen: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}

    def keep(name: str, side: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        kept[side] = output.detach().float().unflatten(-1, (modules[name].heads, -1)).transpose(1, 2)
        if side == "to_k":
            query = kept["to_q"]
            scores = query @ kept["to_k"].transpose(-1, -2) / query.shape[-1] ** 0.5
            seen[name] = scores.softmax(-1).mean(dim=1)

    with ExitStack() as hooks:
        for name in layers:
            for side in ("to_q", "to_k"):  # the order in which a layer asks them
                hooks.callback(modules[f"{name}.{side}"].register_forward_hook(partial(keep, name, side)).remove)
        yield seen


@contextmanager
def erasing(network: nn.Module, layers: list[str]) -> Iterator[Mapping[str, Tensor]]:
    """Fills, at a forward inside, what each layer's eraser adds, (B, places, C)."""
    erasers = lora_layers(network)
    added: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        added[name] = output.float()

    with ExitStack() as hooks:
        for name in layers:
            last = erasers[name + OUTPUT].lora_B[STUDENT]
            hooks.callback(last.register_forward_hook(partial(keep, name)).remove)
        yield added


RECELER = Method("receler", receler, RecelerSettings, "arXiv:2311.17717")
