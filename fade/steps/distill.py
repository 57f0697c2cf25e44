"""Step ``distill``: train the adapter inside the mask and save it with its card."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from fade.adapters.store import save_adapter
from fade.config import DistillSettings
from fade.errors import DataError
from fade.files import sha256_file, write_json, writing
from fade.methods.closed_form import LowRank, closed_form, distinct, text_moments
from fade.methods.fade.adversary import Adversary
from fade.methods.fade.distillation import CURVE, DistillStep, Sets, distill
from fade.methods.fade.examples import Examples, joined
from fade.methods.fade.masks import Mask, load_mask, narrowed
from fade.methods.fade.processes import ALONE, Processes, launched
from fade.methods.fade.sparse_lora import (
    adapter_tensors,
    adapters_disabled,
    add_sparse_lora,
    begin_with,
    check_inside_mask,
    computed_whole,
)
from fade.methods.fade.targeting import in_proportion, power_law, teacher_disagreement
from fade.models.base import Base
from fade.models.family import load_base
from fade.models.generate import sample_latents
from fade.models.told import Told
from fade.seeding import derive_seed
from fade.spec import Spec, load_spec
from fade.steps.encoded import check_told_apart, encode_split, split_rows

GENERATED_BATCH, GENERATED_STEPS, GENERATED_GUIDANCE = 32, 20, 4.0
DISAGREEMENT_POINTS, DISAGREEMENT_GROUP = 20, 32
_LOOP = {
    *("steps", "batch", "learning_rate", "weight_decay", "clip_norm", "forget_weight", "retain_weight"),
    *("empty_caption_share", "precision", "seed", "stop_at", "check_every", "micro_batch", "pool"),
}


def distill_adapter(folder: Path, processes: Processes = ALONE) -> Iterator[DistillStep]:
    """Write ``adapter/``, ``curve.csv`` (losses by step) and ``timesteps.json``; yields each step.

    The files are there when the last step has been taken. Of several processes, which share each batch, all
    take the same steps and the first one writes.

    Raises:
        MaskMismatchError: training moved what the mask leaves out (checked before the adapter is saved).
        DataError: captions and targets read alike, a loss is not finite, or nothing was learnt.
    """
    spec = load_spec(folder)
    settings = spec.distill.in_force
    torch.set_num_threads(spec.threads)
    base = load_base(spec.base, expected_sha256=spec.base_sha256, weights=spec.weights)
    check_told_apart(base, spec, folder)
    mask, parameters = add_student(base, spec, folder)
    curve = []
    for step in train_student(base, parameters, spec, folder, processes=processes):
        curve.append(step)
        if step.losses.device.type == "cpu":
            check_losses(curve[-1:])
        yield step
    check_losses(curve, ended=True)
    check_inside_mask(base.network, mask, "student")
    if not processes.first:
        return
    card = {
        "erasure": spec.id,
        "kind": spec.kind,
        "base_sha256": spec.base_sha256,
        "mask_sha256": sha256_file(folder / "mask" / "mask.json"),
        "granularity": mask.granularity,
        "modules": len(mask.modules),
        "steps": len(curve),
        "trained_alpha": settings.alpha,
        "rank": settings.rank,
        "parameters": settings.model_dump(mode="json"),
        **({"processes": processes.count} if processes.count > 1 else {}),
    }
    tensors = adapter_tensors(base.denoiser, "student")
    check_changes(tensors)
    save_adapter(folder / "adapter", tensors, card)
    with writing(folder / "curve.csv") as temporary:
        pd.DataFrame([step.figures() for step in curve], columns=CURVE).to_csv(temporary, index=False)


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


def check_changes(tensors: Mapping[str, Tensor]) -> None:
    """Refuse an adapter that is the base: of low rank all its ``lora_B``, else all its values are 0 as stored.

    Raises:
        DataError: it changes nothing that float16 holds.
    """
    changing = [tensor for name, tensor in tensors.items() if name.endswith((".lora_B.weight", ".values"))]
    if not any(bool(tensor.to(torch.float16).any()) for tensor in changing):
        raise DataError(
            "The adapter changes no weight that float16 can hold; it was not saved. Give training more "
            "distill.steps or a larger distill.learning_rate."
        )


def add_student(base: Base, spec: Spec, folder: Path) -> tuple[Mask, list[Tensor]]:
    """Put the adapter on, as training finds it: no change yet, or the closed form's, for which captions suffice.

    Returns:
        The mask of what the adapter may hold, and its trainable tensors.
    """
    settings, mask = spec.distill.in_force, load_mask(folder / "mask")
    changes = closed_form_changes(base, spec, folder, mask) if settings.start == "closed_form" else {}
    if settings.steps == 0:
        # What training does not reach stays zero: it is left out of the file.
        mask = narrowed(mask, changes)
    parameters = add_sparse_lora(
        base.network, mask, rank=settings.rank, alpha=settings.alpha, seed=settings.seed, name="student"
    )
    begin_with(base.network, "student", changes)
    return mask, parameters


def train_student(
    base: Base,
    parameters: Sequence[Tensor],
    spec: Spec,
    folder: Path,
    *,
    sets: Sets | None = None,
    processes: Processes = ALONE,
) -> Iterator[DistillStep]:
    """Train what ``add_student`` gave; the first process writes ``timesteps.json``.

    Args:
        sets: what to learn from, where it is encoded already.
    """
    settings = spec.distill.in_force
    if settings.steps == 0:
        if processes.first:
            write_json(folder / "timesteps.json", {"distribution": settings.timesteps})
        return
    with adapters_disabled(base.network):
        sets = sets or training_sets(base, spec, folder)
        probabilities = timestep_probabilities(base, sets, settings, folder if processes.first else None)
    adversary = make_adversary(base, sets, settings) if settings.depth == "deep" else None
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
            processes=processes,
            **loop_settings(settings),
        )


def loop_settings(settings: DistillSettings) -> dict[str, Any]:
    """The settings that ``fade.methods.fade.distillation.distill`` takes as they are."""
    return settings.model_dump(include=_LOOP)


def training_sets(sd: Base, spec: Spec, folder: Path) -> Sets:
    """The splits, encoded; with ``pictures: generated`` the base, its adapters off, draws what z_t is made of."""
    settings = spec.distill
    encoded = {name: encode_split(sd, spec, folder, name) for name in ("forget", "surrogate", "retain")}
    if settings.pictures == "generated":
        encoded["forget"], encoded["surrogate"] = (
            _redrawn(sd, encoded["forget"], settings.seed, of_target=False),
            _redrawn(sd, encoded["forget"], settings.seed, of_target=True),
        )
    held_out = None
    if settings.stop_at is not None:
        held_out = encode_split(sd, spec, folder, "held_out")
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


def closed_form_changes(base: Base, spec: Spec, folder: Path, mask: Mask) -> dict[str, LowRank]:
    """The closed form over the captions that training would see, the empty prompt among those to retain."""
    settings = spec.distill.in_force
    told, taught = split_rows(base, spec, folder, "forget").captions()
    concept, surrogate = distinct(told.states, taught.states)
    kept, _ = split_rows(base, spec, folder, "retain").captions()
    (retain,) = distinct(torch.cat([kept.states, base.unconditional().states]))
    given = settings.closed_form
    moments = text_moments(concept, surrogate, retain, retain_weight=given.retain_weight, ridge=given.ridge)
    return closed_form(base.denoiser, moments, mask, rank=settings.rank)


def timestep_probabilities(base: Base, sets: Sets, settings: DistillSettings, folder: Path | None) -> Tensor:
    """P(t) of the forget half; the measured disagreement is kept in a folder's ``timesteps.json``."""
    total = base.denoiser.path.steps
    measured: dict[str, Sequence[float]] = {}
    if settings.timesteps == "disagreement":
        at, apart = teacher_disagreement(
            base.denoiser,
            joined(sets.forget, sets.surrogate),
            points=DISAGREEMENT_POINTS,
            group_size=DISAGREEMENT_GROUP,
            seed=settings.seed,
        )
        measured = {"timesteps": at.tolist(), "disagreement": apart.tolist()}
        probabilities = in_proportion(at, apart, total)
    else:
        probabilities = power_law(total, 1.0 if settings.timesteps == "uniform" else settings.timestep_power)
    if folder is not None:
        write_json(folder / "timesteps.json", {"distribution": settings.timesteps, **measured})
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
        **deep.model_dump(exclude={"steps", "retain_weight", "distill_batch"}),
    )


def main() -> None:
    """Run the step for one erasure's folder: alone, or as one of the processes that a launcher started."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    total = load_spec(folder).distill.in_force.steps
    with launched() as processes:
        steps = distill_adapter(folder, processes)
        for _ in tqdm(steps, total=total, desc="distill", disable=not processes.first):
            pass


if __name__ == "__main__":
    main()
