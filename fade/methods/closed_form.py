"""Closed form: the linear change of the text path that sends a concept's prompts to its surrogate's   (ours).

Cross-attention reads a prompt through its keys and values alone, k = W_k c and v = W_v c. Let f be the text
states of the concept's captions, s those of the same captions with the surrogate's name, r those of
captions to retain, every token position a column. Before the projection, D shall send f to s and leave r:

    min over D of  E |f + D f - s|^2 + retain_weight E |D r|^2 + ridge |D|^2

It is solved, with M = E ff' + retain_weight E rr' + ridge I, by

    D = E (s - f)f' M^-1,        W' = W + W D        (as UCE, arXiv:2308.14761, equation 7, up to notation)

A mask confines the change: of the columns it keeps only the block of M and the columns of E (s - f)f' enter,
which is the least-squares answer within the mask; rows are independent of each other.

What retained texts hardly use can be shut besides (``shut``, ours). The map above only moves the concept: I + D is
of full rank nearly always, so other states still give all that f gave. Let the columns of N be the m functionals of
a state of which the concept's texts have most for what the retained ones have,

    max over n of  n' (E ff' + SPREAD tr(E ff') / D I) n / n' E rr' n,

and P the projection on {y : N'y = 0} that changes W y least, over all projections together. Then W' = W P (I + D), and
no state, of whatever length, gives any of them a value other than zero. What lies in the span of what is retained stays
within reach. As many are shut as move the retained answers by ``MOST_MOVED`` at most: the more is retained, the fewer.

The least squares fall short of the way from f to s, and the further the more the concept's captions differ from each
other. Asked to go the ``whole`` way (ours) the change is multiplied by what makes its mean step along it one,

    E |W (s - f)|^2 / E (W (s - f))' W D f,        at most ``MOST_LONGER``

W D is cut to rank k where it is read: B A minimises E |(W D - B A) x|^2 over the same mixture of states x,
whose second moment is M = L L'. With the singular values of W D L = U S V', A = V_k' L^-1 and B = U_k S_k.

It takes milliseconds and overwrites what the *name* gives; whoever finds other text states that bring
the concept up is not stopped (see ``fade.attacks.inversion``). Positions are paired one to
one, and by ``aligned`` where a surrogate of another number of tokens moves what follows it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fade.errors import DataError, MaskMismatchError
from fade.methods.fade.masks import Mask
from fade.models.denoiser import Denoiser
from fade.models.told import Told

PROMPTS_AT_ONCE = 256
LEAST_WEIGHT, MOST_WEIGHT, HALVINGS = 1e-2, 1e4, 24
SHIFT_MOST, NEARER = 4, 0.5
RIDGE_OF_WEIGHTS = 1e-4
"""Share of the mean square of a projection's weights, by which what it does not read is told apart all the same."""
MOST_MOVED = 0.08
"""By how much of themselves the answers to retained texts may move for what is shut."""
MOST_LONGER = 2.0
"""How many times as far a change may go as the least squares say."""
SPREAD = 0.05
"""Of what an attacker may reach beside the concept's own states: directions that no text uses are shut too."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """delta_weight = B A; A is (k, in), B is (out, k), float32."""

    A: Tensor
    B: Tensor


@dataclass(frozen=True, slots=True)
class Moments:
    """What the text states say about a linear change: (D, D) each, float64.

    Attributes:
        towards: E (s - f) f'.
        metric: M, positive definite.
        forget, retain: E ff' and E rr'.
        apart: E (s - f) (s - f)'.
    """

    towards: Tensor
    metric: Tensor
    forget: Tensor
    retain: Tensor
    apart: Tensor


def text_moments(concept: Tensor, surrogate: Tensor, retain: Tensor, *, retain_weight: float, ridge: float) -> Moments:
    """Second moments of text states (N, L, D); ``concept`` and ``surrogate`` are paired row by row.

    Args:
        ridge: as a share of the mean diagonal entry of E ff'.

    Raises:
        DataError: a set is empty, or concept and surrogate are not paired.
    """
    if concept.shape != surrogate.shape:
        raise DataError(f"Concept and surrogate states must be paired: got {concept.shape} and {surrogate.shape}.")
    if len(concept) == 0 or len(retain) == 0:
        raise DataError(f"The closed form needs captions: got {len(concept)} to forget and {len(retain)} to retain.")
    forget = _second_moment(concept, concept)
    towards = _second_moment(surrogate, concept) - forget
    unit = torch.eye(len(forget), dtype=forget.dtype)
    kept = _second_moment(retain, retain)
    metric = forget + retain_weight * kept + ridge * forget.diagonal().mean() * unit
    return Moments(towards, metric, forget, kept, _second_moment(surrogate - concept, surrogate - concept))


def weight_reaching(way: float, concept: Tensor, surrogate: Tensor, retain: Tensor, *, ridge: float) -> float:
    """The greatest retain weight w with which a concept goes a share of the way to its surrogate   (ours).

        way(w) = E (s - f)' D f / E |s - f|^2  =  tr(G (A + w R)^-1 G') / E |s - f|^2

    where G = E (s - f) f', A = E ff' + ridge I and R = E rr'. With A = L L' and L^-1 R L'^-1 = Q S Q' it is a sum of
    falling terms |G L'^-1 q|^2 / (1 + w s): w is found by halving. What weight that is depends on how many concepts
    share the text's dimensions, and how near they lie; the share of the way does not.

    Args:
        way: 0..1; states and ``ridge`` as in ``text_moments``.

    Returns:
        A weight between ``LEAST_WEIGHT`` and ``MOST_WEIGHT``: the one or the other where the way lies beyond them.
    """
    alone = text_moments(concept, surrogate, retain, retain_weight=0.0, ridge=ridge)
    root = torch.linalg.cholesky(alone.metric)
    kept = torch.linalg.solve_triangular(root, alone.retain, upper=False)
    kept = torch.linalg.solve_triangular(root, kept.T, upper=False)
    spread, directions = torch.linalg.eigh(kept)
    onto = torch.linalg.solve_triangular(root, alone.towards.T, upper=False)
    parts = (onto.T @ directions).square().sum(dim=0) / (surrogate - concept).double().square().sum(-1).mean()
    least, most = math.log(LEAST_WEIGHT), math.log(MOST_WEIGHT)
    for _ in range(HALVINGS):
        middle = (least + most) / 2
        gone = float((parts / (1 + math.exp(middle) * spread.clamp(min=0))).sum())
        least, most = (middle, most) if gone >= way else (least, middle)
    return math.exp((least + most) / 2)


def _second_moment(left: Tensor, right: Tensor) -> Tensor:
    """E l r' over all positions of states (N, L, D), (D, D) float64; a part at a time, so that memory is bounded."""
    parts = zip(left.split(PROMPTS_AT_ONCE), right.split(PROMPTS_AT_ONCE), strict=True)
    total = sum((one.flatten(0, 1).double().T @ other.flatten(0, 1).double() for one, other in parts), torch.zeros(()))
    return total / (left.shape[0] * left.shape[1])


def paired(denoiser: Denoiser, concept: Told, surrogate: Told) -> tuple[Tensor, Tensor]:
    """What the text's projections read of concept and surrogate, (N, L, D) each, position by position.

    Of padded captions (``held``) the positions that hold text in the concept's alone, which would else be a few among
    hundreds.

    Where a family masks what a prompt leaves over and the surrogate is the shorter, nothing is asked: a state is not
    to become that of padding.
    """
    mine, theirs = denoiser.read(concept.states), denoiser.read(surrogate.states)
    theirs = theirs if surrogate.mask is None else torch.where(surrogate.mask[..., None], theirs, mine)
    return held(mine, concept.mask), held(theirs, concept.mask)


def aligned(concept: Tensor, surrogate: Tensor) -> Tensor:
    """Of each of a concept's positions the surrogate's state that stands for it, (N, L, D)   (ours).

    A surrogate of more words or fewer moves all that follows it, and what a caption says there would have to become
    what it says beside. So a state is paired with the one at the same position, unless one within ``SHIFT_MOST``
    positions is nearer by far (``NEARER``, of the squared distance): the same word, moved.
    """
    found, best = surrogate, (surrogate - concept).square().sum(-1) * NEARER
    for shift in sorted(range(-SHIFT_MOST, SHIFT_MOST + 1), key=abs)[1:]:
        if abs(shift) >= surrogate.shape[1]:
            continue
        moved = surrogate.roll(-shift, dims=1)
        apart = (moved - concept).square().sum(-1)
        # What was rolled in from the other end is nobody's neighbour.
        outside = slice(-shift, None) if shift > 0 else slice(None, -shift)
        apart[:, outside] = torch.inf
        nearer = apart < best
        found, best = torch.where(nearer[..., None], moved, found), torch.where(nearer, apart, best)
    return found


def held(states: Tensor, mask: Tensor | None) -> Tensor:
    """States (N, L, D) of the positions that hold text, each by itself, (n, 1, D); all as they are without a mask."""
    return states if mask is None else states[mask][:, None]


def closed_form(
    denoiser: Denoiser,
    moments: Moments,
    mask: Mask,
    *,
    rank: int,
    pooled: Moments | None = None,
    shut: int = 0,
    whole: bool = False,
) -> dict[str, LowRank]:
    """The change of every projection through which text enters that the mask holds.

    Args:
        pooled: the same of the pooled states, where the denoiser is also told those and they enter by a projection
            of their own.
        rank: of each change, at most; a projection with fewer rows or columns has fewer.
        shut: directions of a state that are shut besides, at most; each adds one to the rank.
        whole: go the whole way in the mean; what is shut is as it is.

    Returns:
        Module name to its change.

    Raises:
        MaskMismatchError: the mask holds no such projection, or masks single weights, for which no change
            is of low rank.
    """
    entering = dict.fromkeys(denoiser.text_sites(), moments)
    if pooled is not None:
        entering |= dict.fromkeys(denoiser.pooled_sites(), pooled)
    names = [name for name in mask.modules if name in entering]
    if not names or mask.granularity == "weight":
        raise MaskMismatchError(
            "The closed form changes the projections through which text enters by modules, rows and columns: got a "
            f"mask of granularity {mask.granularity!r} that holds {len(names)} of them. Set `mask.granularity` to "
            "module, neuron or none, raise `mask.density`, or set `distill.start` to zero."
        )
    modules = dict(denoiser.network.named_modules())
    if shut:
        return _shut(modules, {name: entering[name] for name in names}, mask, rank=rank, shut=shut)
    solved: dict[tuple[int, bytes], tuple[Tensor, Tensor]] = {}
    changes = {}
    for name in names:
        weight: Tensor = modules[name].weight.detach().double().cpu()
        rows = mask.rows.get(name, torch.ones(weight.shape[0], dtype=torch.bool))
        columns = mask.columns.get(name, torch.ones(weight.shape[1], dtype=torch.bool))
        key = (id(entering[name]), columns.numpy().tobytes())
        if key not in solved:
            solved[key] = _solved(entering[name], columns)
        change, root = solved[key]
        changes[name] = _cut(weight[rows] @ change, root, rank, rows=rows, columns=columns)
    return _longer(modules, changes, entering) if whole else changes


def _longer(
    modules: Mapping[str, Any], changes: Mapping[str, LowRank], entering: Mapping[str, Moments]
) -> dict[str, LowRank]:
    """The changes of projections that read the same states, multiplied alike until they go the way in the mean."""
    found: dict[str, LowRank] = {}
    for moments in {id(entering[name]): entering[name] for name in changes}.values():
        names = [name for name in changes if entering[name] is moments]
        asked = gone = torch.zeros((), dtype=torch.float64)
        for name in names:
            change = changes[name]
            rows = change.B.any(dim=1)  # a mask leaves others as they are
            weight = modules[name].weight.detach().double().cpu()[rows]
            asked = asked + (weight @ moments.apart * weight).sum()
            gone = gone + (change.B[rows].double() @ change.A.double() @ moments.towards.T * weight).sum()
        times = min(max(float(asked / gone), 1.0), MOST_LONGER) if gone > 0 else 1.0
        found |= {name: LowRank(changes[name].A, times * changes[name].B) for name in names}
    return found


def _solved(moments: Moments, columns: Tensor) -> tuple[Tensor, Tensor]:
    """D within the columns that are kept, (D, kept), and L of their block of M."""
    block = moments.metric[columns][:, columns]
    root = torch.linalg.cholesky(block)
    return torch.cholesky_solve(moments.towards[:, columns].T, root).T, root


def _cut(
    change: Tensor, root: Tensor, rank: int, *, rows: Tensor | None = None, columns: Tensor | None = None
) -> LowRank:
    """The nearest change of a rank, whose rows and columns are some of a projection's, or all."""
    rows = torch.ones(change.shape[0], dtype=torch.bool) if rows is None else rows
    columns = torch.ones(change.shape[1], dtype=torch.bool) if columns is None else columns
    left, values, right = torch.linalg.svd(change @ root, full_matrices=False)
    count = min(rank, len(values))
    # The singular values are shared out evenly: both factors train on from here at one scale.
    scale = values[:count].sqrt()
    inner = torch.linalg.solve_triangular(root, scale[:, None] * right[:count], upper=False, left=False)
    A = torch.zeros(count, len(columns), dtype=change.dtype)
    B = torch.zeros(len(rows), count, dtype=change.dtype)
    A[:, columns] = inner
    B[rows] = left[:, :count] * scale
    return LowRank(A.float(), B.float())


def _shut(
    modules: Mapping[str, Any], entering: Mapping[str, Moments], mask: Mask, *, rank: int, shut: int
) -> dict[str, LowRank]:
    """W P (I + D) - W, of the projections that read the same states together, D cut to rank over all of them."""
    if mask.rows or mask.columns:
        raise MaskMismatchError(
            "Directions are shut in whole projections: got a mask of rows and columns, which leaves some open. Set "
            "`mask.granularity` to module or none, or `distill.closed_form.shut` to 0."
        )
    changes: dict[str, LowRank] = {}
    for moments in {id(one): one for one in entering.values()}.values():
        names = [name for name in entering if entering[name] is moments]
        weights = {name: modules[name].weight.detach().double().cpu() for name in names}
        gram = metric_of_answers(weights.values())
        unit, root = torch.eye(len(gram), dtype=gram.dtype), torch.linalg.cholesky(moments.metric)
        change = torch.cholesky_solve(moments.towards.T, root).T
        upper = torch.linalg.cholesky(gram).T
        left, values, right = torch.linalg.svd(upper @ change @ root, full_matrices=False)
        inner = torch.linalg.solve_triangular(root, values[:rank, None] * right[:rank], upper=False, left=False)
        change = torch.linalg.solve_triangular(upper, left[:, :rank], upper=True) @ inner
        left_open = open_projection(moments.forget, moments.retain, gram, shut)
        whole, closed = left_open @ (unit + change) - unit, len(unit) - round(float(left_open.trace()))
        changes |= {name: _cut(weight @ whole, root, rank + closed) for name, weight in weights.items()}
    return changes


def metric_of_answers(weights: Iterable[Tensor]) -> Tensor:
    """The sum of W'W over projections (out, D) of the same states, made positive definite, (D, D)."""
    gram = sum((weight.T @ weight for weight in weights), torch.zeros(()))
    return gram + RIDGE_OF_WEIGHTS * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def open_projection(forget: Tensor, retain: Tensor, metric: Tensor, shut: int, *, moved: float = MOST_MOVED) -> Tensor:
    """P, (D, D): what is left of a state when functionals of it are zero.

    Args:
        forget, retain: E ff' and E rr', by which the functionals are chosen.
        metric: positive definite; P y is the nearest there is to y in it.
        shut: how many functionals, at most; and
        moved: as many as move the retained states' answers by no more than this share of them, as root mean squares.
    """
    size = len(metric)
    unit = torch.eye(size, dtype=metric.dtype)
    root = torch.linalg.cholesky(retain + 1e-6 * retain.diagonal().mean() * unit)
    asked = forget + SPREAD * forget.diagonal().mean() * unit
    ratio = torch.linalg.solve_triangular(root, torch.linalg.solve_triangular(root, asked, upper=False).T, upper=False)
    functionals = torch.linalg.solve_triangular(root.T, torch.linalg.eigh((ratio + ratio.T) / 2)[1], upper=True)

    def without(count: int) -> Tensor:
        chosen = functionals[:, size - count :]
        back = torch.linalg.solve(metric, chosen)
        return unit - back @ torch.linalg.solve(chosen.T @ back, chosen.T)

    least, most, answers = 0, min(shut, size - 1), (metric * retain).sum()
    while least < most:  # the more are shut the further retained answers move
        middle = (least + most + 1) // 2
        gone = unit - without(middle)
        if float((metric * (gone @ retain @ gone.T)).sum() / answers) <= moved**2:
            least = middle
        else:
            most = middle - 1
    return without(least)


def distinct(*states: Tensor) -> tuple[Tensor, ...]:
    """Rows that occur once, of tensors (N, L, D) that belong together row by row, in order of first occurrence."""
    seen: Mapping[bytes, int] = {
        b"".join(part[i].numpy().tobytes() for part in states): i for i in reversed(range(len(states[0])))
    }
    kept = sorted(seen.values())
    return tuple(part[kept] for part in states)
