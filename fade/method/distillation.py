"""Self-distillation: the student's concept becomes the teacher's surrogate, and the rest stays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fade.errors import DataError
from fade.method.examples import Examples, joined
from fade.method.sparse_lora import adapters_disabled
from fade.models.diffusion import add_noise, autocast
from fade.seeding import torch_generator


@dataclass(frozen=True, slots=True)
class DistillStep:
    """One step: its number (from 1), the two losses, and the gradient's norm before clipping."""

    step: int
    forget_loss: float
    retain_loss: float
    gradient_norm: float


def draw_timesteps(count: int, total: int, power: float, generator: torch.Generator) -> Tensor:
    """t = floor(T u^power), u ~ U(0, 1): uniform for power 1, towards high noise below 1   (ours)."""
    return (total * torch.rand(count, generator=generator) ** power).long().clamp(max=total - 1)


def distill(
    unet: Any,
    parameters: Sequence[Tensor],
    *,
    forget: Examples,
    surrogate: Examples,
    retain: Examples,
    empty_embeds: Tensor,
    alphas_cumprod: Tensor,
    steps: int,
    batch: int,
    learning_rate: float,
    weight_decay: float,
    clip_norm: float,
    forget_weight: float,
    retain_weight: float,
    timestep_power: float,
    surrogate_share: float,
    empty_caption_share: float,
    precision: str,
    seed: int,
) -> Iterator[DistillStep]:
    """Train the adapter's tensors; yields after each step.

        L_f = || e_student(z_t, t, c) - e_teacher(z_t, t, c_surrogate) ||^2
        L_r = || e_student(z_t, t, c) - e_teacher(z_t, t, c) ||^2
        L   = forget_weight L_f + retain_weight L_r                                (FADE, stage 2)

    The teacher is the same network with its adapters off; student and teacher see the same z_t and t,
    and the true noise is never the target. z_t of forget examples is made from pictures of the concept
    and of the surrogate, mixed (ours: either must lead to the surrogate). The student runs forget and
    retain examples in one forward, the teacher likewise.

    Args:
        parameters: the trainable tensors; all others of ``unet`` stay as they are.
        empty_embeds: text states of the empty prompt, (1, L, D); a share of retain examples carries it.

    Raises:
        DataError: a set of examples is empty.
    """
    for name, examples in (("forget", forget), ("surrogate", surrogate), ("retain", retain)):
        if len(examples) == 0:
            raise DataError(f"The {name} set is empty: distillation needs at least one example of it.")
    generator = torch_generator(seed, "distill")
    stand_ins = round(batch * surrogate_share)
    total = len(alphas_cumprod)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    for step in range(1, steps + 1):
        parts = joined(
            _drawn(forget, batch - stand_ins, generator),
            _drawn(surrogate, stand_ins, generator),
            _without_captions(_drawn(retain, batch, generator), empty_embeds, empty_caption_share, generator),
        )
        timesteps = torch.cat(
            [
                draw_timesteps(batch, total, timestep_power, generator),
                torch.randint(total, (batch,), generator=generator),
            ]
        )
        noise = torch.randn(parts.latents.shape, generator=generator)
        noisy = add_noise(parts.latents, noise, timesteps, alphas_cumprod)
        with autocast(precision):
            with torch.no_grad(), adapters_disabled(unet):
                target = unet(noisy, timesteps, parts.target_embeds).sample
            predicted = unet(noisy, timesteps, parts.prompt_embeds).sample
        error = (predicted.float() - target.float()).square().mean(dim=(1, 2, 3))
        forget_loss, retain_loss = error[:batch].mean(), error[batch:].mean()
        optimizer.zero_grad(set_to_none=True)
        (forget_weight * forget_loss + retain_weight * retain_loss).backward()
        norm = nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimizer.step()
        schedule.step()
        yield DistillStep(step, float(forget_loss.detach()), float(retain_loss.detach()), float(norm))


def _drawn(examples: Examples, count: int, generator: torch.Generator) -> Examples:
    return examples[torch.randint(len(examples), (count,), generator=generator)]


def _without_captions(examples: Examples, empty: Tensor, share: float, generator: torch.Generator) -> Examples:
    """Some examples with the empty prompt, so that guidance's other half stays the teacher's too."""
    drop = (torch.rand(len(examples), generator=generator) < share)[:, None, None]
    return Examples(
        examples.latents,
        torch.where(drop, empty, examples.prompt_embeds),
        torch.where(drop, empty, examples.target_embeds),
    )
