"""Layer by layer: many concepts at once by least squares, in one pass through the denoiser   (ours).

The closed form of ``fade.methods.closed_form`` (and UCE's) finds one linear map of the text's states for all sites.
With few concepts that is enough. With many it is not: where a hundred names share the few dimensions in which an
encoder tells them apart, what sends them all to their surrogates cannot leave the others where they are.

But the denoiser does not read states one by one. A head h of cross-attention mixes those of a prompt by its attention
a, and answers V_h x with x = sum_p a_p c_p. So each head sees states of its own, and has a map of its own:

    min over D_h of  E_f |(V_h + D_h) x - v_h|^2 + retain_weight E_r |(V_h + D_h) x - v_h|^2 + ridge |D_h|^2

f: noised pictures under captions of the erased concepts, r: under others' captions and none, which weigh by how many
they are. v_h is what the base answers there, told the surrogate's caption (of r the same caption). x is read while the
layers before are changed already, so that every layer mends what those before left over. After each block's attention
the last projection of its feed-forward is solved likewise, towards the output that the base's block gave: its input is
no linear function of the text, so it tells apart what the text's states do not.

The base and what becomes the adapter answer a few hundred noised pictures side by side, in one pass that ends behind
the last layer that is solved: seconds. Keys and queries stay. Each change is cut to the rank that holds ``energy`` of
it, in the metric of what the layer reads. The sum over concepts knows no order, and nothing is trained: an adapter
without one of them is the one that never had it.

It is as shallow as any closed form: it overwrites what names give (see ``fade.attacks.inversion``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from fade.errors import NoMatchingModulesError
from fade.methods.closed_form import LowRank
from fade.methods.fade.masks import Mask
from fade.methods.fade.sparse_lora import adapters_disabled, add_sparse_lora, begin_with, computed_whole
from fade.methods.fade.targeting import power_law
from fade.methods.method import STUDENT, Material, MethodSettings
from fade.methods.trained_difference import Losses
from fade.models.base import Base
from fade.models.denoiser import autocast
from fade.models.told import Told
from fade.seeding import torch_generator

UNTOLD = 4
"""To so many retained pictures one of any half is shown with the empty prompt, whose answer guidance multiplies."""
SEEN = 4
"""Of the retained pictures at least one in so many is looked at: the fewer are erased, the more there are to keep."""
POSITIONS = 21
"""About so many positions of each picture are solved for: those next to each other read much alike."""
CHECKED = 64
"""About so many of the pictures are answered again, to say what is left."""


class LayerwiseSettings(MethodSettings):
    """How much is looked at, and what it weighs.

    Attributes:
        forget: noised pictures under the captions of what is erased, spread evenly over the concepts, and as many as
            there are concepts where these are more. Half of them show the surrogate.
        retain: likewise of what is kept, and one in four of the pictures that are retained where these are more.
        retain_weight: of each of these against each of those to forget.
        ridge, ridge_after: share of the mean square of what a head's values, and a feed-forward, read.
        energy: share of a change that its rank holds.
        timestep_power: of rows to forget, t = T u^power; less than 1 draws noisier, where it is settled what is drawn.
        retain_timestep_power: likewise of the others.
    """

    forget: int = 192
    retain: int = 160
    retain_weight: float = 0.4
    ridge: float = 1e-4
    ridge_after: float = 1e-2
    energy: float = 0.999
    timestep_power: float = 0.25
    retain_timestep_power: float = 0.5


@dataclass(frozen=True, slots=True)
class Batch:
    """What is answered: z_t, t, what the concept is told and what instead; ``forget`` marks rows of erased concepts."""

    noisy: Tensor
    t: Tensor
    told: Told
    taught: Told
    forget: Tensor


class _Solver:
    """Solves each layer as it answers: of all that it sees the first half is the base's, the other half is changed.

    Attributes:
        changes: by module what was solved, (out, in) float64, and E xx' of what the module reads.
    """

    def __init__(self, settings: LayerwiseSettings, weights: Tensor) -> None:
        self._settings, self._weights = settings, weights
        self._read: dict[str, Tensor] = {}
        self.changes: dict[str, tuple[Tensor, Tensor]] = {}

    def attended(self, name: str, mixed: Tensor, answer: Tensor) -> Tensor:
        """A layer's turn: ``mixed`` (2B, heads, n, in) is what values read, ``answer`` (2B, heads, n, d)."""
        read, (aim, before) = mixed.chunk(2)[1], answer.chunk(2)
        heads = range(mixed.shape[1])
        found = [self._solved(read[:, one], (aim - before)[:, one], self._settings.ridge) for one in heads]
        change = torch.stack([one for one, _ in found])
        self.changes[name] = change.flatten(0, 1), torch.stack([one for _, one in found]).mean(dim=0)
        return torch.cat([aim, before + torch.einsum("bhnd,hed->bhne", read, change.to(read))])

    def read(self, name: str, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        """What the last projection of a block's feed-forward reads."""
        del module
        self._read[name] = given[0]

    def fed(self, name: str, block: Any, given: tuple[Tensor, ...], answer: Tensor) -> Tensor:
        """A block's answer, (2B, n, out), to which its feed-forward was added."""
        del given, block
        read, (aim, before) = self._read.pop(name).chunk(2)[1].float(), answer.float().chunk(2)
        change, moment = self._solved(read, aim - before, self._settings.ridge_after)
        self.changes[f"{name}.ff.net.2"] = change, moment
        return torch.cat([aim, before + read @ change.T.to(read)]).to(answer)

    def _solved(self, read: Tensor, missing: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
        return least_squares(read, missing, self._weights, ridge=ridge)


def least_squares(read: Tensor, missing: Tensor, weights: Tensor, *, ridge: float) -> tuple[Tensor, Tensor]:
    """The map (out, in) that takes what is read nearest to what is missing, and E xx' with the ridge; float64.

    Sums over positions are taken in the type of what is read, a part of the positions in each picture; what comes of
    them is solved in float64.

    Args:
        read: (B, n, in).
        missing: (B, n, out).
        weights: of each row, (B,).
        ridge: share of the mean square of what is read.
    """
    every = max(1, read.shape[1] // POSITIONS) | 1  # odd: from picture to picture others, where n is even
    rows = weights.repeat_interleave(read.shape[1])[::every, None]
    x, y = read.flatten(0, 1)[::every], missing.flatten(0, 1)[::every]
    weighted = (rows / rows.sum() * x).T
    moment, towards = (weighted @ x).double(), (weighted @ y).double()
    moment += ridge * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    return torch.linalg.solve(moment, towards).T, moment


class _SolvedError(Exception):
    """All is solved: the rest of the pass is not needed."""


class _Attended:
    """Stock cross-attention that shows what each head's values read; ``see`` may answer with something added."""

    def __init__(self, see: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._see = see

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        with torch.autocast(hidden_states.device.type, enabled=False):
            return self._answered(attn, hidden_states.float(), encoder_hidden_states.float()).to(hidden_states)

    def _answered(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        query, key = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states)
        query, key = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in (query, key))
        attention = (query @ key.transpose(-1, -2) * attn.scale).softmax(dim=-1)
        mixed = torch.einsum("bhnp,bpd->bhnd", attention, encoder_hidden_states)
        value = attn.to_v.weight.unflatten(0, (attn.heads, -1))
        answer = self._see(mixed, torch.einsum("bhnd,hed->bhne", mixed, value))
        answer = answer.transpose(1, 2).flatten(2)
        for module in attn.to_out:
            answer = module(answer)
        return answer


def solved(
    base: Base, material: Material, settings: LayerwiseSettings, *, precision: str, seed: int
) -> tuple[dict[str, LowRank], Batch]:
    """The change of each layer, by name, and what was answered for it; the network stays as it is.

    Raises:
        NoMatchingModulesError: the base has no cross-attention of the stock kind.
    """
    sites = cross_attentions(base.network)
    batch = noised_batch(base, material, settings, seed=seed)
    weight = settings.retain_weight * float((~batch.forget).sum() / batch.forget.sum())
    share = weight / (1 + weight)
    forget, retain = (rows / rows.sum() for rows in (batch.forget, ~batch.forget))
    solver = _Solver(settings, ((1 - share) * forget + share * retain).to(base.device))
    noisy, t, told = torch.cat([batch.noisy] * 2), torch.cat([batch.t] * 2), Told.join(batch.taught, batch.told)
    computing = autocast(precision, base.device.type)
    with torch.no_grad(), computing, adapters_disabled(base.network), _watched(sites, solver), suppress(_SolvedError):
        base.denoiser.predict(noisy, t, told)
    changes = {name: cut(*found, energy=settings.energy) for name, found in solver.changes.items()}
    material.notes.update(noised_pictures=len(batch.t))
    return {name: change for name, change in changes.items() if len(change.A)}, batch


def left(base: Base, batch: Batch, precision: str) -> Losses:
    """What an adapter that was just placed leaves of both halves, on some of the pictures; the first step."""
    some = torch.arange(0, len(batch.t), max(1, len(batch.t) // CHECKED), device=base.device)
    noisy, t, forget = batch.noisy[some], batch.t[some], batch.forget[some.cpu()].to(base.device)
    with torch.no_grad(), autocast(precision, base.device.type), computed_whole(base.network):
        now = base.denoiser.predict(noisy, t, batch.told[some])
        with adapters_disabled(base.network):
            aim = base.denoiser.predict(noisy, t, batch.taught[some])
    apart = (now.float() - aim.float()).square().flatten(1).mean(dim=1)
    return Losses(1, float(apart[forget].mean()), float(apart[~forget].mean()))


def placed(base: Base, changes: Mapping[str, LowRank], modules: Sequence[str], *, rank: int, seed: int) -> list[Tensor]:
    """Hang an adapter of a rank on modules, beginning with what was solved of them; gives its trainable tensors.

    Of a change of higher rank the greatest part is taken; where it is of lower the rest is zero.
    """
    mask = Mask("none", tuple(sorted(modules)), len(modules), len(modules))
    tensors = add_sparse_lora(base.network, mask, rank=rank, alpha=float(rank), seed=seed, name=STUDENT)
    begin_with(base.network, STUDENT, {name: _filled(change, rank) for name, change in changes.items()})
    return tensors


def noised_batch(base: Base, material: Material, settings: LayerwiseSettings, *, seed: int) -> Batch:
    """Pictures of what is erased and of its surrogates under the concepts' captions, of others under their own.

    The last of them, pictures of all these, are told nothing: what guidance leads away from is to stay.
    """
    generator = torch_generator(seed, "layerwise")
    # Both splits are in the order of the concepts: by turns from strata of equal size, so each of them has its part.
    count = max(settings.forget, len(set(material.rows("forget").whose())))
    kept = max(settings.retain, len(material.rows("retain")) // SEEN)
    at, others_at = _strata(count, generator), _strata(kept, generator)
    shares = {"forget": at[::2], "surrogate": at[1::2], "retain": others_at}
    parts = [material.rows(name).at(where).encoded() for name, where in shares.items()]
    forget, others = len(parts[0]) + len(parts[1]), parts[2]
    untold = len(others) // UNTOLD
    empty = material.empty.expand(untold)
    latents = torch.cat([part.latents for part in parts])
    latents = torch.cat([latents, latents[torch.arange(untold) * len(latents) // max(1, untold)]])
    told = Told.join(*(part.prompts for part in parts), empty)
    taught = Told.join(*(part.targets for part in parts), empty)
    powers = settings.timestep_power, settings.retain_timestep_power
    chances = [power_law(base.denoiser.path.steps, power) for power in powers]
    counts = forget, len(latents) - forget
    t = torch.cat(
        [
            torch.multinomial(one, count, replacement=True, generator=generator)
            for one, count in zip(chances, counts, strict=True)
        ]
    )
    noisy = base.denoiser.path.noised(latents, torch.randn(latents.shape, generator=generator), t)
    here = base.device
    marked = torch.arange(len(latents)) < forget
    return Batch(noisy.to(here), t.to(here), told.to(here), taught.to(here), marked)


def _strata(count: int, generator: torch.Generator) -> Tensor:
    """One place in each of so many equal parts of the way, in [0, 1), ascending."""
    return (torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)) / count


def cross_attentions(network: nn.Module) -> dict[str, Any]:
    """Blocks that attend to the text, by name.

    Raises:
        NoMatchingModulesError: there is none of the stock kind, whose values read the text's states as they arrive.
    """
    found = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, BasicTransformerBlock) and module.attn2 is not None and _stock(module.attn2)
    }
    if not found:
        raise NoMatchingModulesError(
            "The denoiser has no cross-attention of the stock kind: layer by layer nothing can be solved on a base of "
            "this family. Take the method fade."
        )
    return found


def _stock(attn: Any) -> bool:
    plain = attn.norm_q is None and attn.norm_k is None and not attn.norm_cross and attn.to_v.bias is None
    return bool(plain and attn.added_kv_proj_dim is None)


@contextmanager
def _watched(sites: Mapping[str, Any], solver: _Solver) -> Iterator[None]:
    """Inside, blocks are solved as they answer; behind the last of them the pass ends.

    Raises:
        _SolvedError: all have answered.
    """

    def end(*_: Any) -> None:
        if len(solver.changes) == 2 * len(sites):
            raise _SolvedError

    before = {name: block.attn2.processor for name, block in sites.items()}
    handles = []
    try:
        for name, block in sites.items():
            block.attn2.processor = _Attended(partial(solver.attended, f"{name}.attn2.to_v"))
            handles.append(block.ff.net[-1].register_forward_pre_hook(partial(solver.read, name)))
            handles += [block.register_forward_hook(hook) for hook in (partial(solver.fed, name), end)]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, block in sites.items():
            block.attn2.processor = before[name]


def cut(change: Tensor, moment: Tensor, *, energy: float) -> LowRank:
    """B A of the least rank that holds a share of E |change x|^2; ``moment`` is E xx', positive definite."""
    root = torch.linalg.cholesky(moment)
    left, values, right = torch.linalg.svd(change @ root, full_matrices=False)
    held = values.square().cumsum(0) / values.square().sum().clamp(min=torch.finfo(values.dtype).tiny)
    count = min(int((held < energy).sum()) + 1, len(values)) if values[0] > 0 else 0
    scale = values[:count].sqrt()
    inner = torch.linalg.solve_triangular(root, scale[:, None] * right[:count], upper=False, left=False)
    return LowRank(inner.float(), (left[:, :count] * scale).float())


def _filled(change: LowRank, rank: int) -> LowRank:
    """Cut to the adapter's rank, or with rows of zeros up to it: what is left over is not to be as it was drawn."""
    A, B = change.A[:rank], change.B[:, :rank]
    missing = rank - len(A)
    A = torch.cat([A, A.new_zeros(missing, A.shape[1])])
    return LowRank(A, torch.cat([B, B.new_zeros(len(B), missing)], dim=1))
