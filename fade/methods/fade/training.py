"""Our own method: an adapter inside a mask, which begins at nothing or at the closed form and is then distilled."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fade.config import DistillSettings
from fade.errors import DataError, MaskMismatchError
from fade.methods.closed_form import (
    LowRank,
    Moments,
    aligned,
    closed_form,
    distinct,
    held,
    paired,
    text_moments,
    weight_reaching,
)
from fade.methods.fade.adversary import Adversary
from fade.methods.fade.denial import Denial, mean_pictures, seen_times
from fade.methods.fade.distillation import DistillStep, Sets, distill
from fade.methods.fade.examples import Examples, joined
from fade.methods.fade.masks import Mask, narrowed
from fade.methods.fade.sparse_lora import (
    adapters_disabled,
    add_sparse_lora,
    begin_with,
    check_inside_mask,
    computed_whole,
)
from fade.methods.fade.targeting import in_proportion, power_law, teacher_disagreement
from fade.methods.method import STUDENT, Material, Method
from fade.models.base import Base
from fade.models.generate import sample_latents
from fade.models.told import Told
from fade.seeding import derive_seed

GENERATED_BATCH, GENERATED_STEPS, GENERATED_GUIDANCE = 32, 20, 4.0
DISAGREEMENT_POINTS, DISAGREEMENT_GROUP = 20, 32
ENCODED_MOST = 512
_LOOP = {
    *("steps", "batch", "learning_rate", "weight_decay", "clip_norm", "forget_weight", "retain_weight"),
    *("empty_caption_share", "precision", "seed", "stop_at", "check_every", "micro_batch", "pool"),
}


def distilled(
    base: Base, material: Material, settings: DistillSettings, *, precision: str, seed: int
) -> Iterator[DistillStep]:
    """Train; yields after each step, and leaves the adapter on the denoiser.

    Of several processes, which share each batch, all take the same steps. ``precision`` and ``seed`` are those of the
    settings.

    Raises:
        MaskMismatchError: training moved what the mask leaves out.
        DataError: a loss is not finite, or nothing was learnt.
    """
    mask, parameters = add_student(base, material, settings)
    curve = []
    for step in train_student(base, parameters, material, settings):
        curve.append(step)
        if step.at_hand:
            check_losses(curve[-1:])
        yield step
    check_losses(curve, ended=True)
    check_inside_mask(base.network, mask, STUDENT)
    material.notes.update(granularity=mask.granularity, trained_alpha=settings.alpha, rank=settings.rank)


def check_losses(steps: Sequence[DistillStep], *, ended: bool = False) -> None:
    """Refuse a training that goes nowhere.

    Args:
        ended: these are all of its steps.

    Raises:
        DataError: a loss or gradient is not finite; or, at the end, the concept's loss was 0 in every step.
    """
    for step in steps:
        if not all(map(math.isfinite, (step.forget_loss, step.retain_loss, step.gradient_norm))):
            raise DataError(
                f"Training broke off in step {step.step}: forget loss {step.forget_loss}, retain loss "
                f"{step.retain_loss}, gradient norm {step.gradient_norm}; all must be finite. Lower "
                "distill.learning_rate, or compute in another distill.precision."
            )
    if ended and steps and all(step.forget_loss == 0 for step in steps):
        raise DataError(
            f"The concept's loss was 0 in all {len(steps)} steps: the base answers the concept's captions as it does "
            "their targets, so nothing was learnt. Name another surrogate, or put the name early in the captions."
        )


def add_student(base: Base, material: Material, settings: DistillSettings) -> tuple[Mask, list[Tensor]]:
    """Put the adapter on, as training finds it: no change yet, or the closed form's, for which captions suffice.

    Returns:
        The mask of what the adapter may hold, and its trainable tensors.

    Raises:
        MaskMismatchError: there is no mask.
    """
    mask = material.mask
    if mask is None:
        raise MaskMismatchError("This method trains inside a mask: got none. Run the steps saliency and mask before.")
    changes = closed_form_changes(base, material, settings, mask) if settings.start == "closed_form" else {}
    if settings.steps == 0:
        # What training does not reach stays zero: it is left out of the file.
        mask = narrowed(mask, changes)
    rank = max(settings.rank, *(len(change.A) for change in changes.values()), 0)
    alpha = settings.alpha * rank / settings.rank
    parameters = add_sparse_lora(base.network, mask, rank=rank, alpha=alpha, seed=settings.seed, name=STUDENT)
    begin_with(base.network, STUDENT, changes)
    return mask, parameters


def train_student(
    base: Base,
    parameters: Sequence[Tensor],
    material: Material,
    settings: DistillSettings,
    *,
    sets: Sets | None = None,
) -> Iterator[DistillStep]:
    """Train what ``add_student`` gave; notes where the timesteps were drawn.

    Args:
        sets: what to learn from, where it is encoded already.
    """
    if settings.steps == 0:
        return
    with adapters_disabled(base.network):
        sets = sets or training_sets(base, material, settings)
        probabilities = timestep_probabilities(base, sets, settings, material.notes)
    adversary = make_adversary(base, sets, settings) if settings.depth == "deep" else None
    denial = make_denial(base, sets, settings) if settings.depth == "deep" else None
    if settings.gradient_checkpointing:
        base.network.enable_gradient_checkpointing()
    with computed_whole(base.network):
        yield from distill(
            base.denoiser,
            parameters,
            sets=sets,
            empty=base.unconditional(),
            timesteps=probabilities,
            surrogate_share={"forget": 0.0, "surrogate": 1.0}.get(settings.pictures, settings.surrogate_share),
            adversary=adversary,
            denial=denial,
            processes=material.processes,
            **loop_settings(settings),
        )


def loop_settings(settings: DistillSettings) -> dict[str, Any]:
    """The settings that ``fade.methods.fade.distillation.distill`` takes as they are."""
    return settings.model_dump(include=_LOOP)


def training_sets(sd: Base, material: Material, settings: DistillSettings) -> Sets:
    """The splits, encoded; with ``pictures: generated`` the base, its adapters off, draws what z_t is made of."""
    # Of a catalog with hundreds of concepts training sees a part: no more is encoded than it can draw.
    most = max(ENCODED_MOST, settings.steps * settings.batch)
    encoded = {name: material.rows(name).encoded(most) for name in ("forget", "surrogate", "retain")}
    if settings.pictures == "generated":
        encoded["forget"], encoded["surrogate"] = (
            _redrawn(sd, encoded["forget"], settings.seed, of_target=False),
            _redrawn(sd, encoded["forget"], settings.seed, of_target=True),
        )
    held_out = None
    if settings.stop_at is not None:
        held_out = material.rows("held_out").encoded()
    return Sets(encoded["forget"], encoded["surrogate"], encoded["retain"], held_out)


def _redrawn(sd: Base, examples: Examples, seed: int, *, of_target: bool) -> Examples:
    """The same captions, with pictures that the base itself draws for the concept or for the surrogate."""
    told = examples.targets if of_target else examples.prompts
    seeds = [derive_seed(seed, "generated", i, of_target) for i in range(len(examples))]
    parts = []
    for start in range(0, len(examples), GENERATED_BATCH):
        part = slice(start, start + GENERATED_BATCH)
        parts.append(
            sample_latents(
                sd, told[part], seeds[part], steps=GENERATED_STEPS, guidance=GENERATED_GUIDANCE, solver="ddim"
            ).cpu()
        )
    return Examples(torch.cat(parts), examples.prompts, examples.targets)


def closed_form_changes(
    base: Base, material: Material, settings: DistillSettings, mask: Mask, *, near_share: float = 0.0
) -> dict[str, LowRank]:
    """The closed form over the captions that training would see, the empty prompt among those to retain.

    Args:
        near_share: of what is retained, how much are the captions that ``material.near`` gives.
    """
    given = settings.closed_form.model_dump(include={"retain_weight", "ridge"})
    told = _told(base, material)
    pooled = None
    if base.denoiser.pooled_sites():
        pooled = _moments([one.others["pooled"][:, None] for one in told], **given, near_share=near_share)
    moments = _moments(_read(base, told), **given, near_share=near_share)
    return closed_form(
        base.denoiser,
        moments,
        mask,
        rank=settings.rank,
        pooled=pooled,
        shut=settings.closed_form.shut,
        whole=settings.closed_form.whole,
    )


def closed_form_weight(
    base: Base, material: Material, settings: DistillSettings, *, way: float, near_share: float = 0.0
) -> float:
    """The retain weight with which the closed form goes a share of the way (``weight_reaching``)."""
    states = _read(base, _told(base, material))
    concept, surrogate = distinct(*states[:2])
    return weight_reaching(
        way, concept, surrogate, retained_states(states[2:], near_share), ridge=settings.closed_form.ridge
    )


def _told(base: Base, material: Material) -> list[Told]:
    """Of concept, surrogate, what is retained and, where somebody asks for them, the neighbours."""
    further = [] if material.told is None else [material.told()]
    near = [] if material.near is None else [material.near()]
    kept = Told.join(material.retain_prompts, *further, base.unconditional())
    concept, surrogate = material.concept, material.surrogate
    if material.told_away is not None:
        more = material.told_away()
        concept, surrogate = Told.join(concept, more[0]), Told.join(surrogate, more[1])
    return [concept, surrogate, kept, *near]


def _read(base: Base, told: list[Told]) -> list[Tensor]:
    """What the text's projections read of them, (N, L, D) each."""
    concept, surrogate = paired(base.denoiser, told[0], told[1])
    others = [held(base.denoiser.read(one.states), one.mask) for one in told[2:]]
    return [concept, aligned(concept, surrogate), *others]


def _moments(states: list[Tensor], *, retain_weight: float, ridge: float, near_share: float) -> Moments:
    """Of concept, surrogate and what is retained, (N, L, D) each; equal captions count once."""
    concept, surrogate = distinct(*states[:2])
    retain = retained_states(states[2:], near_share)
    return text_moments(concept, surrogate, retain, retain_weight=retain_weight, ridge=ridge)


def retained_states(others: list[Tensor], near_share: float) -> Tensor:
    """States to retain, (N, L, D): a share of them, nearly, are the neighbours', which are repeated."""
    kept, *near = (distinct(one)[0] for one in others)
    if not near or near_share == 0:
        return kept
    times = max(round(near_share / (1 - near_share) * len(kept) / len(near[0])), 1)
    return torch.cat([kept, *near * times])


def timestep_probabilities(base: Base, sets: Sets, settings: DistillSettings, notes: dict[str, Any]) -> Tensor:
    """P(t) of the forget half; a disagreement that was measured is noted as ``timesteps``."""
    total = base.denoiser.path.steps
    if settings.timesteps == "disagreement":
        at, apart = teacher_disagreement(
            base.denoiser,
            joined(sets.forget, sets.surrogate),
            points=DISAGREEMENT_POINTS,
            group_size=DISAGREEMENT_GROUP,
            seed=settings.seed,
        )
        notes["timesteps"] = {"timesteps": at.tolist(), "disagreement": apart.tolist()}
        probabilities = in_proportion(at, apart, total)
    else:
        probabilities = power_law(total, 1.0 if settings.timesteps == "uniform" else settings.timestep_power)
    return probabilities


def make_adversary(base: Base, sets: Sets, settings: DistillSettings) -> Adversary:
    """The search begins at the concept's captions, at others' and at the empty prompt."""
    deep, empty = settings.deep, base.unconditional()
    return Adversary(
        sets.forget.latents,
        starts=Told.join(sets.forget.prompts, sets.retain.prompts, empty.expand(len(sets.forget))),
        empty=empty,
        precision=settings.precision,
        device=base.device,
        seed=settings.seed,
        **deep.model_dump(exclude={"steps", "retain_weight", "distill_batch", "deny_share", "deny_strength"}),
    )


def make_denial(base: Base, sets: Sets, settings: DistillSettings) -> Denial | None:
    """What of the concept's pictures is denied; None where nothing is."""
    deep, path = settings.deep, base.denoiser.path
    if deep.deny_share == 0:
        return None
    return Denial(
        sets.forget,
        mean_pictures(sets.forget, sets.surrogate),
        others=sets.retain.prompts,
        empty=base.unconditional(),
        path=path,
        times=seen_times(path),
        share=deep.deny_share,
        strength=deep.deny_strength,
    )


FADE = Method("fade", distilled, DistillSettings, "arXiv:2602.07058", masked=True, several=True, shares=True)
