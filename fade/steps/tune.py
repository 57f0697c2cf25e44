"""Step ``tune``: an erasure finds its own settings   (ours).

Settings that were fitted to one set of pictures need not fit another. So an erasure begins gently, looks at a few
pictures (fade/evaluation/looks.py), moves along its controls as they say, and stops as soon as nothing is wrong:

1. The closed form of a small rank, milliseconds: with so great a retain weight that the concept's text states go
   ``FAR`` of the way to the surrogate's. Where that moves the others by next to nothing (``points.FREE``) and shows no
   fault, there is no reason to stop short of it: with a quarter of that weight, and a quarter of this, it goes on while
   it is free and less is reached than the surrogate's own pictures say. Elsewhere every concept that shares the text's
   dimensions is taken along, in proportion: so it is tried ``WAYS[0]`` of the way, and further while pictures still
   show the concept or lack the surrogate; the first that suffices is the one that moves the others least, and what lies
   beyond it is not tried. Neighbours share most of them: ``NEAR_SHARE`` of what is retained are theirs.
2. Where that one moved others, or none sufficed, distillation begins from the best of these, and goes on (it is not
   begun anew) to 60, 120, 240 and 480 steps in all. Where the concept shows, the weight of forgetting rises with them;
   where neighbours or others moved, that of retaining; where mush comes, first more of the forget examples show the
   surrogate, then timesteps are drawn where the teacher's answers differ.

Taken is of the points without a fault the one that moves the others least (of those that are free the one that
reached most), else the one of the highest score; all are kept with their adapters, so that a person can take another.
What decides is counted in points, steps and pictures, never in seconds: equal requests give equal bytes. The judge of
the looks is ``development``, and their seeds are none of an evaluation's.

Why the gate's error rate need not be divided by the points that were tried: of all of them one is put before it, and
which one was settled by another judge on other pictures. Given that choice the pictures that the gate counts are as
fresh as if there had been no search, so a bad adapter passes no more often than stated, however many were tried. That
ends where a person takes another point after the gate has spoken: then the rate is divided (``fade erase --point``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from fade.adapters.store import restore_base, save_adapter
from fade.concepts import CAPTION_TEMPLATE, caption
from fade.config import DistillSettings
from fade.data.catalog import load_concepts, load_templates
from fade.data.splits import find_pairs
from fade.evaluation.looks import ERASED, SURROGATE, Look, look_samples, looked
from fade.evaluation.neighbours import find_neighbours
from fade.evaluation.points import POINTS_NAME, Controls, Point, Points, best_of, points_figure
from fade.evaluation.records import dump
from fade.evaluation.zero_shot import open_judge
from fade.files import sha256_file, writing
from fade.methods.fade.distillation import DistillStep
from fade.methods.fade.masks import Mask
from fade.methods.fade.sparse_lora import (
    adapter_tensors,
    adapters_disabled,
    add_sparse_lora,
    begin_with,
    check_inside_mask,
    computed_whole,
)
from fade.methods.fade.training import (
    FADE,
    check_losses,
    closed_form_changes,
    closed_form_weight,
    train_student,
    training_sets,
)
from fade.methods.method import STUDENT, Material
from fade.models.base import Base
from fade.models.family import load_base
from fade.pipeline import LOSSES
from fade.seeding import derive_seed
from fade.spec import POINTS, Spec, load_spec
from fade.steps.adapter import CURVE, check_changes, material
from fade.steps.drawn import base_pictures, domains, ended, look_seeds, named_by, pictures_now
from fade.steps.encoded import check_told_apart

FAR, WAYS = 0.9, (0.7, 0.8)
"""Shares of the way from the concept's text states to the surrogate's that closed forms go: the first, then in turn."""
FURTHER = 0.25
"""By what the retain weight falls where going on is free."""
LEAST_RETAINED = 1.0
"""Below this retain weight a closed form moves others by so much that distillation had better go on (measured)."""
NEAR_SHARE = 0.35
"""Of what the closed form retains, how much are the neighbours: by .6 as much they move, others hardly more."""
HARDER, MOST_WEIGHT = 2.0, 8.0
"""By what the weights of distillation move, and the most that they become."""
MORE_SURROGATES = 0.75
MOST_OF_GROUP = 8
"""Neighbours of a concept that the catalog puts into a group, at most."""


@dataclass
class _Tried:
    point: Point
    tensors: dict[str, Tensor]


class Looking:
    """Looks at the adapter that is on a base, always at the same prompts and seeds."""

    def __init__(self, base: Base, spec: Spec) -> None:
        concepts = load_concepts(Path(spec.catalog))
        ((concept, surrogate),) = find_pairs(concepts, spec.pairs)
        objects, styles = domains(concepts)
        self._base, self._concept = base, concept
        self._surrogate = None if surrogate is None else surrogate.name
        # Few steps of the solver; how many seeds an evaluation has says nothing here.
        drawing = spec.evaluate.model_copy(update={"steps": spec.tune.solver_steps})
        self._spec = spec.model_copy(update={"evaluate": drawing})
        self.seeds = look_seeds(spec)
        template = (load_templates(Path(spec.catalog)) or (CAPTION_TEMPLATE,))[0]
        most = MOST_OF_GROUP if concept.group else 3
        near = find_neighbours(base, concept, surrogate, concepts.values(), count=most)
        self._samples = look_samples(
            concept,
            self._surrogate,
            {"object": objects, "style": styles},
            near,
            count=spec.tune.pictures,
            seeds=self.seeds,
            template=template,
        )
        pairs = [(one, style) for one in near for style in styles]
        if concept.kind == "style":
            pairs = [(one, style) for style in near for one in objects]
        self.near_captions = [caption(*pair, template) for pair in pairs]
        self._judge = open_judge(Path(spec.judges), "development", called=[*objects, *styles])
        with adapters_disabled(base.network):
            self._before = ended(base_pictures(base, self._spec, self._samples))
        self._seen = named_by(self._judge, self._before, self._samples)

    def look(self, *, short: bool = False) -> Look:
        """Draw with the adapter that is on, and count.

        Args:
            short: ask no more where the concept's own prompts say that it is not overwritten.
        """
        own = self._samples["part"] == ERASED
        parts = [self._samples[own], self._samples[~own & (self._samples["part"] != SURROGATE)]]
        pictures = [self._pictures(parts[0])]
        look = self._looked(parts[0], pictures[0])
        if not (short and {"shows", "surrogate"} & set(look.faults)):
            pictures.append(self._pictures(parts[1]))
            look = self._looked(pd.concat(parts), np.concatenate(pictures))
        return look

    def _pictures(self, samples: pd.DataFrame) -> NDArray[np.uint8]:
        with computed_whole(self._base.network):
            return ended(pictures_now(self._base, self._spec, samples, done=0))

    def _looked(self, samples: pd.DataFrame, pictures: NDArray[np.uint8]) -> Look:
        return looked(
            self._seen,
            named_by(self._judge, pictures, samples),
            (self._before[samples.index], pictures),
            concept=self._concept,
            surrogate=self._surrogate,
        )


def tune(folder: Path) -> Iterator[DistillStep]:
    """Write ``points/`` (each point's adapter, ``points.json``, ``points.png``) and ``curve.csv``; yields each step.

    Raises:
        DataError: captions and targets read alike, training broke off, or nothing was learnt.
    """
    spec = load_spec(folder)
    torch.set_num_threads(spec.threads)
    base = load_base(spec.base, expected_sha256=spec.base_sha256, weights=spec.weights)
    check_told_apart(base, spec, folder)
    given = material(base, spec, folder, masked=True)
    looking = Looking(base, spec)
    if looking.near_captions:
        given = replace(given, near=lambda: base.encode_prompts(looking.near_captions))
    tried: list[_Tried] = []
    curve: list[DistillStep] = []
    for said in search(base, given, spec, looking):
        if isinstance(said, _Tried):
            tried.append(said)
        else:
            curve.append(replace(said, step=len(curve) + 1))
            yield curve[-1]
    check_losses(curve, ended=True)
    points = [one.point for one in tried]
    number, why = best_of(points)
    found = Points(tried=tuple(points), chosen=number, why=why, seeds=looking.seeds)
    with writing(folder / POINTS) as temporary:
        temporary.mkdir(parents=True)
        for place, one in enumerate(tried):
            save_adapter(temporary / str(place), one.tensors, _card(spec, folder, one, given))
        dump(found, temporary / POINTS_NAME)
        points_figure(found).savefig(temporary / "points.png", dpi=110, metadata={"Software": None})
    with writing(folder / LOSSES) as temporary:
        rows = [step.figures() for step in curve]
        pd.DataFrame(rows, columns=list(rows[0] if rows else CURVE)).to_csv(temporary, index=False)


def _card(spec: Spec, folder: Path, one: _Tried, given: Material) -> dict[str, Any]:
    modules = {key.partition(".lora_")[0] for key in one.tensors}
    controls = one.point.controls
    return {
        "erasure": spec.id,
        "kind": spec.kind,
        "base_sha256": spec.base_sha256,
        "method": FADE.name,
        "citation": FADE.citation,
        "settings": "auto",
        "steps": controls.steps,
        "parameters": {**spec.distill.model_dump(mode="json"), **controls.model_dump(mode="json")},
        "modules": len(modules),
        "mask_sha256": sha256_file(folder / "mask" / "mask.json"),
        **given.notes,
    }


def search(base: Base, given: Material, spec: Spec, looking: Looking) -> Iterator[DistillStep | _Tried]:
    """Yields each step of training, and each point when it has been looked at; the base is left without adapter."""
    tried = []
    # Where no layer reads the text's states alone, nothing can be solved: distillation begins at no change.
    start = _controls(spec.distill, made="solved", rank=spec.tune.rank, solved_weight=0.0)
    faults: Sequence[str] = ()
    if _sites(base):
        for one in _solved(base, given, spec, looking):
            tried.append(one)
            yield one
        best = max(tried, key=lambda one: one.point.standing).point
        start, faults = best.controls, best.faults
    if all(one.point.faults for one in tried) and len(tried) < spec.tune.tries:
        controls = moved(start, faults).model_copy(update={"made": "distilled"})
        yield from _distilled(base, given, spec, looking, controls, left=spec.tune.tries - len(tried))
    restore_base(base)


def _solved(base: Base, given: Material, spec: Spec, looking: Looking) -> Iterator[_Tried]:
    """The closed form that goes far, and on while that is free; if it costs something, nearer ones."""
    sites, most = _sites(base), min(spec.tune.solved, spec.tune.tries)
    mask = Mask("none", sites, len(sites), len(sites))

    def weight_of(way: float) -> float:
        return max(closed_form_weight(base, given, spec.distill, way=way, near_share=NEAR_SHARE), LEAST_RETAINED)

    def at(weight: float, *, short: bool = False) -> _Tried:
        controls = _controls(spec.distill, made="solved", rank=spec.tune.rank, solved_weight=weight)
        restore_base(base)
        _begin(base, given, spec.distill, controls, mask, room=spec.tune.rank)
        return _point(base, controls, looking, short=short)

    weight = far = weight_of(FAR)
    one = at(weight)
    yield one
    if one.point.free:
        for _ in range(most - 1):
            weight = max(FURTHER * weight, LEAST_RETAINED)
            if not (one.point.free and one.point.look.short) or weight == one.point.controls.solved_weight:
                return
            one = at(weight)
            yield one
        return
    for way in WAYS[: most - 1]:
        if (weight := weight_of(way)) == far:
            return  # it may not go further than this: nothing lies between
        one = at(weight, short=True)
        yield one
        if not {"shows", "surrogate"} & set(one.point.faults):
            return


def _distilled(
    base: Base, given: Material, spec: Spec, looking: Looking, controls: Controls, *, left: int
) -> Iterator[DistillStep | _Tried]:
    """Distillation from a closed form, in rounds, until a point has no fault or the rounds are over."""
    settings = spec.distill
    mask = _with_text(base, given.mask)
    restore_base(base)
    parameters = _begin(base, given, settings, controls, mask, room=max(settings.rank, controls.rank))
    with adapters_disabled(base.network):
        sets = training_sets(base, given, settings)
    for number, total in enumerate(spec.tune.steps[:left]):
        round_settings = settings.model_copy(
            update={
                "steps": total - controls.steps,
                "seed": derive_seed(settings.seed, "round", number),
                **{name: getattr(controls, name) for name in _MOVED},
            }
        )
        yield from train_student(base, parameters, given, round_settings, sets=sets)
        check_inside_mask(base.network, mask, STUDENT)
        controls = controls.model_copy(update={"steps": total})
        one = _point(base, controls, looking)
        yield one
        if not one.point.faults:
            return
        controls = moved(controls, one.point.faults)


_MOVED = ("forget_weight", "retain_weight", "surrogate_share", "timesteps")


def moved(controls: Controls, faults: Sequence[str]) -> Controls:
    """Where the next round of distillation lies after what a look found."""
    changes: dict[str, Any] = {}
    shows, hurt = bool({"shows", "surrogate"} & set(faults)), bool({"near", "rest"} & set(faults))
    if hurt:
        changes["retain_weight"] = min(controls.retain_weight * HARDER, MOST_WEIGHT)
    elif shows:
        changes["forget_weight"] = min(controls.forget_weight * HARDER, MOST_WEIGHT)
    if "mush" in faults:
        if controls.surrogate_share < MORE_SURROGATES:
            changes["surrogate_share"] = MORE_SURROGATES
        else:
            changes["timesteps"] = "disagreement"
    return controls.model_copy(update=changes)


def _controls(settings: DistillSettings, **where: Any) -> Controls:
    return Controls(**{name: getattr(settings, name) for name in _MOVED}, **where)


def _begin(
    base: Base, given: Material, settings: DistillSettings, controls: Controls, mask: Mask, *, room: int
) -> list[Tensor]:
    """Put the student on, of rank ``room`` and scale 1, as the closed form of these controls; its trainable tensors."""
    closed = settings.closed_form.model_copy(update={"retain_weight": controls.solved_weight})
    asked = settings.model_copy(update={"rank": controls.rank, "closed_form": closed})
    changes = closed_form_changes(base, given, asked, mask, near_share=NEAR_SHARE) if _sites(base) else {}
    parameters = add_sparse_lora(base.network, mask, rank=room, alpha=float(room), seed=settings.seed, name=STUDENT)
    begin_with(base.network, STUDENT, changes)
    return parameters


def _sites(base: Base) -> tuple[str, ...]:
    """Projections through which text alone enters, where the closed form lies; sorted."""
    return tuple(sorted({*base.denoiser.text_sites(), *base.denoiser.pooled_sites()}))


def _with_text(base: Base, mask: Mask | None) -> Mask:
    """The mask of whole modules, with every projection through which text enters: the closed form lies there."""
    names = tuple(sorted({*(mask.modules if mask is not None else ()), *_sites(base)}))
    return Mask("module", names, len(names), mask.of if mask is not None else len(names))


def _point(base: Base, controls: Controls, looking: Looking, *, short: bool = False) -> _Tried:
    tensors = {name: tensor.clone() for name, tensor in adapter_tensors(base.denoiser, STUDENT).items()}
    check_changes(tensors)
    look = looking.look(short=short)
    size = sum(2 * tensor.numel() for tensor in tensors.values())
    point = Point(controls=controls, look=look, score=look.score, faults=look.faults, adapter_bytes=size)
    return _Tried(point, tensors)
