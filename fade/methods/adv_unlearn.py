"""AdvUnlearn, unlearning by adversarial training (Zhang et al., arXiv:2405.15234). Own implementation.

Two levels, in every step. Below, an attacker who may change what the concept's caption says within a radius looks for
what gives the frozen network's answer to the concept most nearly; above, what was found is erased, and other captions
keep their answers:

    c* = argmin over |c' - c| <= radius of  || e_theta(z_t, c', t) - e*(z_t, c, t) ||^2
    L  = || e_theta(z_t, c*, t) - ( e* - eta [ e*_c - e* ] ) ||^2 + w E || e_theta(z_r, r, t) - e*(z_r, r, t) ||^2

The attacker takes signed steps of the gradient, each the same share of the radius, as in the paper's lower level.

What differs: the paper trains the text encoder; an adapter holds changes of the denoiser alone, so its cross-attention
is trained, which the paper tried too. And the attacker changes the caption's states, each number by ``radius`` of the
states' root mean square at most, where the paper's writes words before the caption.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fade.methods.method import Material, Method
from fade.methods.negative_guidance import NegativeSettings, frozen_answers, half_drawn
from fade.methods.trained_difference import Losses, descended, drawn, modules_of, trained_difference
from fade.models.base import Base
from fade.models.denoiser import autocast
from fade.models.told import Told
from fade.seeding import torch_generator


class AdvUnlearnSettings(NegativeSettings):
    """The attacker's ``radius``, as a share of the states' root mean square, its steps, and what is retained.

    Attributes:
        attack_steps: of the attacker in every step; one is the paper's fast variant.
        retain_weight: of the retained captions' loss.
    """

    radius: float = 0.5
    attack_steps: int = 5
    retain_weight: float = 4.0
    learning_rate: float = 2e-4


def adv_unlearn(
    base: Base, material: Material, settings: AdvUnlearnSettings, *, precision: str, seed: int
) -> Iterator[Losses]:
    """Train; yields after each step, and leaves the difference on the denoiser."""
    generator = torch_generator(seed, "adv unlearn")
    changes = trained_difference(base.network, modules_of(base.denoiser, "text_attention"))

    def losses() -> tuple[Tensor, Tensor]:
        told = material.concept[drawn(len(material.concept), settings.batch, generator)]
        noisy, timestep = half_drawn(base, told, settings, generator, precision)
        without, concept = frozen_answers(base, noisy, timestep, [None, told], precision=precision)
        found = attacked(base, noisy, timestep, told, concept, settings=settings, precision=precision)
        other = material.retain_prompts[drawn(len(material.retain_prompts), settings.batch, generator)]
        theirs, when = half_drawn(base, other, settings, generator, precision)
        (kept,) = frozen_answers(base, theirs, when, [other], precision=precision)
        with autocast(precision, base.device.type):
            forget = base.denoiser.predict(noisy, timestep, found.to(base.device)).float()
            retain = base.denoiser.predict(theirs, when, other.to(base.device)).float()
        target = without - settings.eta * (concept - without)
        return (forget - target).square().mean(), (retain - kept).square().mean()

    yield from descended(
        changes.values(),
        losses,
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        weight=settings.retain_weight,
    )


def attacked(
    base: Base,
    noisy: Tensor,
    timestep: Tensor,
    told: Told,
    concept: Tensor,
    *,
    settings: AdvUnlearnSettings,
    precision: str,
) -> Told:
    """What the network as it is takes for the concept more nearly than its caption, no further from it than allowed.

    Args:
        concept: the frozen network's answer to the caption at z_t, (B, C, h, w).
    """
    told = told.to(base.device)
    reach = settings.radius * told.states.square().mean().sqrt()
    moved = torch.zeros_like(told.states, requires_grad=True)
    for _ in range(settings.attack_steps):
        with autocast(precision, base.device.type):
            answer = base.denoiser.predict(noisy, timestep, told.with_tensors({"states": told.states + moved}))
        (gradient,) = torch.autograd.grad((answer.float() - concept).square().mean(), moved)
        with torch.no_grad():
            moved -= reach / settings.attack_steps * gradient.sign()
    return told.with_tensors({"states": told.states + moved.detach()})


ADV_UNLEARN = Method("adv-unlearn", adv_unlearn, AdvUnlearnSettings, "arXiv:2405.15234")
