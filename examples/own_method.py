"""A method of your own: one file that `fade erase` and `fade benchmark` take like any other.

    fade erase --concept cat --surrogate horse --method examples.own_method:METHOD
    fade benchmark canvas --methods fade,uce,examples.own_method:METHOD --concepts cat

The one here is about the simplest there is. Where the text enters the denoiser (keys and values of the cross-attention)
it adds one direction to each weight, so that the mean state of the concept's captions is read as that of the
surrogate's, and the mean state of the captions to retain as before:  W' = W + strength W (s - c) u'.
"""

import torch

from fade.methods.method import Method, MethodSettings
from fade.methods.trained_difference import Losses, modules_of, solved_difference
from fade.models.deltas import plain_modules


class Settings(MethodSettings):
    """Changed with --set mean-shift.strength=0.8."""

    strength: float = 1.0


def mean_shift(base, material, settings, *, precision, seed):
    """Leave a change on the denoiser; yield each step with what is left of the concept and what the rest lost."""
    concept, surrogate, retained = (
        base.denoiser.read(told.states).double().mean(dim=(0, 1))
        for told in (material.concept, material.surrogate, material.retain_prompts)
    )
    along = concept - concept @ retained / (retained @ retained) * retained
    along = along / (along @ concept)
    modules = plain_modules(base.network)
    changes = {}
    for name in modules_of(base.denoiser, "text_sites"):
        weight = modules[name].weight.detach().double().cpu()
        changes[name] = settings.strength * torch.outer(weight @ (surrogate - concept), along)
    solved_difference(base.network, changes)
    missed = (1 - settings.strength) * (surrogate - concept)
    yield Losses(step=1, forget_loss=float(missed.square().mean()))


METHOD = Method("mean-shift", mean_shift, Settings, citation="examples/own_method.py")
