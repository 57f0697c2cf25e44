"""MACE, mass concept erasure (Lu et al., arXiv:2403.06135), its closed-form half. Own implementation.

Three steps. First the keys of cross-attention are refined so that the words *around* a name no longer carry it
(equation 2): those of a caption with the concept's name give what they gave with the surrogate's. Then each concept has
a small change of its own, alone. Last the changes D_i are fused into one, by least squares over what each was made for:

    min over W of  sum_i sum_j |W c_ij - (W* + D_i) c_ij|^2 + l sum_r |W r - W* r|^2      (equation 7)

c_ij: states of the captions of concept i, r: of captions to preserve. So no change acts on another's concept, which a
sum of them would.

What differs: the paper trains each D_i, a LoRA, to take attention off the concept's segmented pictures, minutes a
concept. Here D_i is the closed form of its concept at the same rank, which needs no segmentation: MACE-like.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fade.methods.closed_form import held, paired
from fade.methods.edits import EditSettings, solve
from fade.methods.method import Material, Method, MethodSettings
from fade.methods.trained_difference import Losses, modules_of, solved_difference
from fade.models.base import Base
from fade.models.deltas import plain_modules


class MaceSettings(MethodSettings):
    """Attributes:
    rank: of each concept's own change. Of rank 1 styles stay on a small base.
    preserve_scale: weight of what is preserved, in the refinement and in the fusion.
    damping: towards the base's weights, likewise.
    """

    rank: int = 4
    preserve_scale: float = 1.0
    damping: float = 0.5


def mace(base: Base, material: Material, settings: MaceSettings, *, precision: str, seed: int) -> Iterator[Losses]:
    """Solve; one step. Nothing is drawn, and it is computed in float64 whatever the precision."""
    del precision, seed
    whose = material.rows("forget").whose()
    told, instead = paired(base.denoiser, material.concept, material.surrogate)
    mask = material.concept.mask
    rows = torch.arange(len(whose))[:, None].expand(told.shape[:2])[:, 0] if mask is None else mask.nonzero()[:, 0]
    names = list(dict.fromkeys(whose))
    of = torch.tensor([names.index(name) for name in whose])[rows]
    parts = [torch.cat([_rows(told[of == i]), _rows(instead[of == i])], dim=1).unique(dim=0) for i in range(len(names))]
    concepts, surrogates = zip(*(part.chunk(2, dim=1) for part in parts), strict=True)
    others = base.denoiser.read(material.retain_prompts.states)
    preserved = torch.unique(_rows(held(others, material.retain_prompts.mask)), dim=0)
    modules = plain_modules(base.network)
    weighing = EditSettings(preserve_scale=settings.preserve_scale, damping=settings.damping)
    concept, surrogate = torch.cat(concepts), torch.cat(surrogates)
    changes = {}
    for name in modules_of(base.denoiser, "text_sites"):
        weight = modules[name].weight.detach().double().cpu()
        if name.endswith("to_k"):
            found = solve(weight, concept, surrogate, preserved, weighing)
        else:
            own = [
                alone(weight, one, other, preserved, weighing, rank=settings.rank)
                for one, other in zip(concepts, surrogates, strict=True)
            ]
            found = fused(weight, own, concepts, preserved, weighing)
        changes[name] = found - weight
    solved_difference(base.network, changes)
    missed = [((surrogate - concept) @ modules[n].weight.detach().double().cpu().T).square().mean() for n in changes]
    yield Losses(1, float(torch.stack(missed).mean()))


def _rows(states: Tensor) -> Tensor:
    return states.reshape(-1, states.shape[-1]).double()


def alone(
    weight: Tensor, concept: Tensor, surrogate: Tensor, preserved: Tensor, weighing: EditSettings, *, rank: int
) -> Tensor:
    """The change (out, in) of one concept by itself, cut to a rank: what a LoRA of its own would hold."""
    left, values, right = torch.linalg.svd(
        solve(weight, concept, surrogate, preserved, weighing) - weight, full_matrices=False
    )
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def fused(
    weight: Tensor, changes: Sequence[Tensor], concepts: Sequence[Tensor], preserved: Tensor, weighing: EditSettings
) -> Tensor:
    """The one weight (out, in) that gives on each concept's states what its own change gives there.

    Args:
        changes: each (out, in), of the concept whose states, rows (n, in), stand at the same place.
    """
    unit = torch.eye(weight.shape[1], dtype=weight.dtype)
    kept = weighing.preserve_scale * preserved.T @ preserved + weighing.damping * unit
    aim, metric = weight @ kept, kept.clone()
    for change, states in zip(changes, concepts, strict=True):
        moment = states.T @ states
        aim += (weight + change) @ moment
        metric += moment
    return torch.linalg.solve(metric, aim.T).T


MACE = Method("mace", mace, MaceSettings, "arXiv:2403.06135", several=True)
