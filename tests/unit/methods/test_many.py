"""Methods for many concepts at once: laws of the layer-by-layer solution, and a property of each paper's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from fade.errors import NoMatchingModulesError
from fade.methods.fade.examples import Examples
from fade.methods.fade.sparse_lora import adapter_tensors, adapters_disabled, lora_layers
from fade.methods.layers import POSITIONS, SEEN, UNTOLD, LayerwiseSettings, _Attended, cut, least_squares, noised_batch
from fade.methods.layerwise import layerwise
from fade.methods.layerwise_tuned import TunedSettings, answered, layerwise_tuned, rate
from fade.methods.mace import MaceSettings, alone, fused, mace
from fade.methods.method import STUDENT, Material
from fade.methods.registry import find_method
from fade.methods.speed import SpeedSettings, influenced, null_space, solve, speed
from fade.methods.trained_difference import Losses
from fade.methods.uce import UceSettings
from fade.models.denoiser import weights_sha256
from fade.models.families.stable_diffusion import StableDiffusion

STYLES = ("neon", "oil", "mosaic", "photo")
SMALL = LayerwiseSettings(forget=16, retain=16, energy=0.999999)


@dataclass(frozen=True)
class _Rows:
    """A split that is encoded."""

    examples: Examples
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.examples)

    def at(self, shares: Tensor) -> _Rows:
        index = (shares * len(self.examples)).long()
        return _Rows(self.examples[index], tuple(self.names[i] for i in index) if self.names else ())

    def whose(self) -> list[str]:
        return list(self.names)

    def latents(self) -> Tensor:
        return self.examples.latents

    def captions(self) -> Any:
        return self.examples.prompts, self.examples.targets

    def encoded(self) -> Examples:
        return self.examples


def _material(base: StableDiffusion, pairs: dict[str, str]) -> Material:
    generator = torch.Generator().manual_seed(3)

    def told(names: list[str]) -> Any:
        return base.encode_prompts([f"a {name} image in {style} style." for name in names for style in STYLES])

    def rows(names: list[str], targets: list[str]) -> _Rows:
        count = len(names) * len(STYLES)
        pictures = torch.randn((count, *base.denoiser.latent_shape), generator=generator)
        whose = tuple(name for name in names for _ in STYLES)
        return _Rows(Examples(pictures, told(names), told(targets)), whose)

    mine, others = list(pairs), ["horse", "coffee", "rocket", "flower"]
    sets = {name: rows(mine, list(pairs.values())) for name in ("forget", "surrogate")}
    sets["retain"] = rows(others, others)
    return Material(sets.__getitem__, base.unconditional())


@pytest.fixture
def material(base: StableDiffusion) -> Material:
    return _material(base, {"cat": "horse", "dog": "horse"})


def test_the_attention_that_shows_what_is_read_is_the_stock_one(base: StableDiffusion, material: Material) -> None:
    batch = noised_batch(base, material, SMALL, seed=1)
    assert batch.forget.sum() == 16
    assert not batch.forget[-1]
    with torch.no_grad():
        stock = base.denoiser.predict(batch.noisy, batch.t, batch.told)
        for name, module in base.network.named_modules():
            if name.endswith("attn2"):
                module.processor = _Attended(lambda _, answer: answer)
        shown = base.denoiser.predict(batch.noisy, batch.t, batch.told)
    torch.testing.assert_close(shown, stock, rtol=1e-4, atol=1e-5)


def test_the_more_is_kept_the_more_of_it_is_looked_at_and_the_more_it_weighs(
    base: StableDiffusion, material: Material
) -> None:
    def looked_at(retain: int) -> int:
        batch = noised_batch(base, material, SMALL.model_copy(update={"retain": retain}), seed=1)
        return int((~batch.forget).sum())

    pictures = len(material.rows("retain"))
    assert looked_at(1) == pictures // SEEN + pictures // SEEN // UNTOLD < looked_at(pictures)

    def left(retain: int, weight: float) -> Losses:
        settings = SMALL.model_copy(update={"retain": retain, "retain_weight": weight})
        (step,) = layerwise(base, material, settings, precision="fp32", seed=1)
        base.network.unload_lora()
        return step

    assert left(pictures, 4.0).retain_loss < left(pictures, 0.25).retain_loss


def test_layer_by_layer_comes_nearer_to_the_surrogates_answers_and_leaves_the_rest(
    base: StableDiffusion, material: Material
) -> None:
    before = weights_sha256(base.network)
    (step,) = layerwise(base, material, SMALL, precision="fp32", seed=1)
    changed = set(lora_layers(base.network))
    assert changed
    assert all(name.endswith(("attn2.to_v", "ff.net.2")) for name in changed)
    batch = noised_batch(base, material, SMALL, seed=1)
    with torch.no_grad():
        now = base.denoiser.predict(batch.noisy, batch.t, batch.told)
        with adapters_disabled(base.network):
            was, aim = (base.denoiser.predict(batch.noisy, batch.t, told) for told in (batch.told, batch.taught))
    apart, left = (was - aim).square()[batch.forget].mean(), (now - aim).square()[batch.forget].mean()
    assert apart > 0, "the concept's answers differ from the surrogate's"
    assert left < 0.5 * apart
    assert (now - aim).square()[~batch.forget].mean() < 0.5 * apart
    # What it says of itself is what the adapter then does, but for the rank that was cut.
    assert step.forget_loss == pytest.approx(float(left), rel=0.2)
    base.network.unload_lora()
    assert weights_sha256(base.network) == before


def test_answers_in_bfloat16_are_solved_for_as_well(base: StableDiffusion, material: Material) -> None:
    batch = noised_batch(base, material, SMALL, seed=1)
    aim, own = answered(base, batch, "fp32"), answered(base, replace(batch, taught=batch.told), "fp32")

    def apart(answers: Tensor, rows: Tensor) -> float:
        return float((answers - aim).square()[rows].mean())

    left = {}
    for precision in ("fp32", "bf16"):
        list(layerwise(base, material, SMALL, precision=precision, seed=1))
        with torch.no_grad():
            now = base.denoiser.predict(batch.noisy, batch.t, batch.told)
        left[precision] = [apart(now, rows) for rows in (batch.forget, ~batch.forget)]
        base.network.unload_lora()
    gap = apart(own, batch.forget)
    assert max(abs(one - other) for one, other in zip(*left.values(), strict=True)) < 0.02 * gap, "of what there was"


def test_without_a_concept_it_is_the_adapter_that_never_had_it_bit_for_bit(tiny_base: Any) -> None:
    from fade.models.family import load_base

    def made(pairs: dict[str, str]) -> dict[str, Tensor]:
        base = load_base(tiny_base)
        list(layerwise(base, _material(base, pairs), SMALL, precision="fp32", seed=1))
        return adapter_tensors(base.denoiser, STUDENT)

    one, again, both = made({"cat": "horse"}), made({"cat": "horse"}), made({"cat": "horse", "dog": "horse"})
    assert one.keys() == again.keys()
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(one[name].shape != both[name].shape or not torch.equal(one[name], both[name]) for name in one)


TUNED = TunedSettings(forget=16, retain=16, energy=0.5, rank=64, steps=40, batch=16, pool=32, learning_rate=1e-4)


def test_trained_on_as_a_whole_it_comes_nearer_on_pictures_that_nothing_was_made_of(
    base: StableDiffusion, material: Material
) -> None:
    fresh = noised_batch(base, material, SMALL, seed=5)
    aim, own = answered(base, fresh, "fp32"), answered(base, replace(fresh, taught=fresh.told), "fp32")

    def left() -> tuple[float, float]:
        with torch.no_grad():
            apart = (base.denoiser.predict(fresh.noisy, fresh.t, fresh.told) - aim).square().flatten(1).mean(dim=1)
        return float(apart[fresh.forget].mean()), float(apart[~fresh.forget].mean())

    before = weights_sha256(base.network)
    gap = float((own - aim).square().flatten(1).mean(dim=1)[fresh.forget].mean())
    steps, solved = [], (0.0, 0.0)
    for step in layerwise_tuned(base, material, TUNED, precision="fp32", seed=1):
        steps.append(step.step)
        solved = left() if step.step == 1 else solved
    assert steps == list(range(1, TUNED.steps + 1))
    gone, kept = left()
    assert 0 < solved[0] < gap, "what is solved goes a part of the way"
    assert gone < solved[0]
    assert kept < 0.05 * gap, "and the rest stays where it was, but for little"
    base.network.unload_lora()
    assert weights_sha256(base.network) == before


def test_trained_on_it_is_solved_first_and_comes_out_alike_each_time(tiny_base: Any) -> None:
    from fade.models.family import load_base

    def made(steps: int) -> dict[str, Tensor]:
        base = load_base(tiny_base)
        settings = TUNED.model_copy(update={"steps": steps})
        list(layerwise_tuned(base, _material(base, {"cat": "horse"}), settings, precision="fp32", seed=1))
        return adapter_tensors(base.denoiser, STUDENT)

    def solved() -> dict[str, Tensor]:
        base = load_base(tiny_base)
        list(layerwise(base, _material(base, {"cat": "horse"}), TUNED, precision="fp32", seed=1))
        return adapter_tensors(base.denoiser, STUDENT)

    def products(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
        parts = ((name, tensors[f"{name}.lora_B.weight"], tensors[f"{name}.lora_A.weight"]) for name in names)
        return {name: B.flatten(1) @ A.flatten(1) for name, B, A in parts}

    first, whole = products(made(1)), products(solved())
    assert first.keys() > whole.keys(), "all modules are there"
    for name, change in first.items():
        torch.testing.assert_close(change, whole.get(name, torch.zeros_like(change)), rtol=1e-4, atol=1e-6)
    many, again = made(5), made(5)
    assert all(bool((change != first[name]).any()) for name, change in products(many).items())
    assert all(torch.equal(many[name], again[name]) for name in many)


def test_the_learning_rate_rises_first_and_ends_at_zero() -> None:
    rates = [rate(step, 100) for step in range(1, 101)]
    assert rates[0] < rates[4] < rates[9]
    assert max(rates) == rates[9]
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] < 1e-3


def test_the_cut_holds_the_share_that_is_asked_in_the_metric_of_what_is_read() -> None:
    generator = torch.Generator().manual_seed(2)
    change = torch.randn(6, 8, generator=generator).double()
    root = torch.randn(8, 8, generator=generator).double()
    moment = root @ root.T + 0.1 * torch.eye(8).double()

    def energy(found: Tensor) -> float:
        return float(torch.trace(found @ moment @ found.T))

    for share in (0.5, 0.9, 1 - 1e-12):
        low = cut(change, moment, energy=share)
        kept = low.B.double() @ low.A.double()
        lost = energy(change - kept) / energy(change)
        assert lost <= 1 - share + 1e-6
        less = len(low.A) - 1
        values = torch.linalg.svdvals(change @ torch.linalg.cholesky(moment)).square()
        assert values[:less].sum() / values.sum() < share, "a smaller rank would not hold it"
    assert len(cut(torch.zeros(6, 8).double(), moment, energy=0.9).A) == 0


def test_least_squares_is_what_a_general_solver_finds_of_weighted_rows_and_a_part_of_the_positions_is_enough() -> None:
    generator = torch.Generator().manual_seed(6)
    read, aim = torch.randn(40, 16, 5, generator=generator), torch.randn(3, 5, generator=generator)
    missing = read @ aim.T + 0.1 * torch.randn(40, 16, 3, generator=generator)
    weights = torch.rand(40, generator=generator)
    found, moment = least_squares(read, missing, weights, ridge=1e-2)
    x, y = read.flatten(0, 1).double(), missing.flatten(0, 1).double()
    rows = (weights / weights.sum() / 16).repeat_interleave(16).double()[:, None]
    ridge = 1e-2 * (rows * x.square()).sum(dim=0).mean()
    whole = torch.cat([rows.sqrt() * x, ridge.sqrt() * torch.eye(5).double()])
    best = torch.linalg.lstsq(whole, torch.cat([rows.sqrt() * y, torch.zeros(5, 3).double()])).solution.T
    torch.testing.assert_close(found, best, rtol=1e-4, atol=1e-5)
    assert torch.linalg.eigvalsh(moment).min() > 0
    plain = least_squares(read, missing, torch.ones(40), ridge=1e-2)[0]
    assert (plain - found).abs().max() > 1e-4, "the weights count"
    # Of many positions a part is taken, in every picture.
    many = read.repeat_interleave(8, dim=1)
    few = least_squares(many, missing.repeat_interleave(8, dim=1), weights, ridge=1e-2)[0]
    assert many.shape[1] > 2 * POSITIONS
    torch.testing.assert_close(few, found, rtol=0.1, atol=0.02)


def test_layer_by_layer_refuses_a_base_without_stock_cross_attention(base: StableDiffusion, material: Material) -> None:
    for name, module in base.network.named_modules():
        if name.endswith("attn2"):
            module.norm_cross = True
    with pytest.raises(NoMatchingModulesError, match="no cross-attention of the stock kind"):
        list(layerwise(base, material, SMALL, precision="fp32", seed=1))


def _drawn(*shapes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(shape, generator=generator).double() for shape in shapes]


def test_speed_moves_nothing_in_the_null_spaces_complement_nor_what_must_be_still() -> None:
    weight, c, s, still, thin = _drawn((3, 8), (10, 8), (10, 8), (2, 8), (20, 4))
    retained = thin @ _drawn((4, 8))[0]  # of rank 4: half of the space is empty
    settings = SpeedSettings(empty_below=1e-9, damping=1e-3)
    free, found = (
        solve(weight, c, s, settings=settings, **more) for more in ({}, {"retained": retained, "still": still})
    )
    assert (free @ retained.T).abs().max() > 0.1
    assert (found @ retained.T).abs().max() < 1e-9
    assert (found @ still.T).abs().max() < 1e-9
    assert (found @ (c - s).T).abs().max() > 1e-3, "within that it still moves the concepts"
    # The constrained least squares themselves, by a general solver over a basis of what is allowed.
    projection = null_space(retained, 1e-9)
    allowed = torch.linalg.svd(torch.cat([torch.eye(8).double() - projection, still]))[2][6:]

    def loss(flat: np.ndarray) -> float:
        change = torch.from_numpy(flat.reshape(3, len(allowed))) @ allowed
        return float((change @ c.T - weight @ (s - c).T).square().sum() / len(c) + 1e-3 * change.square().sum())

    best = minimize(loss, np.zeros(3 * len(allowed)), tol=1e-12).x.reshape(3, len(allowed))
    np.testing.assert_allclose(found.numpy(), best @ allowed.numpy(), atol=1e-4)


def test_speed_retains_what_the_free_solution_moves_most() -> None:
    states = torch.eye(4).double()[:, None] * torch.tensor([1.0, 3.0, 2.0, 0.5]).double()[:, None, None]
    assert influenced(states, torch.eye(4).double(), 0.5).equal(states[[1, 2]])
    assert len(influenced(states, torch.eye(4).double(), 0.01)) == 1


def test_mace_fuses_changes_so_that_none_acts_on_anothers_concept() -> None:
    weight, first, second = _drawn((3, 8), (3, 8), (3, 8))
    basis = torch.eye(8).double()
    concepts, preserved = [basis[:2], basis[2:4]], basis[4:]
    tight = UceSettings(damping=1e-9)
    found = fused(weight, [first, second], concepts, preserved, tight)
    torch.testing.assert_close(found @ concepts[0].T, (weight + first) @ concepts[0].T, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found @ concepts[1].T, (weight + second) @ concepts[1].T, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found @ preserved.T, weight @ preserved.T, rtol=1e-6, atol=1e-6)
    summed = weight + first + second
    assert (summed @ concepts[0].T - found @ concepts[0].T).abs().max() > 0.1, "a sum does act on it"
    one = alone(weight, *_drawn((2, 8), (2, 8)), preserved, tight, rank=1)
    assert torch.linalg.matrix_rank(one) == 1


@pytest.mark.parametrize(
    ("method", "settings", "moved"),
    [(speed, SpeedSettings(), ("to_v",)), (mace, MaceSettings(), ("to_k", "to_v"))],
)
def test_baselines_for_many_move_the_texts_projections_alone(
    base: StableDiffusion, material: Material, method: Any, settings: Any, moved: tuple[str, ...]
) -> None:
    (step,) = method(base, material, settings, precision="fp32", seed=1)
    assert step.forget_loss > 0
    changed = {name.rpartition(".")[0] for name in adapter_tensors(base.denoiser, STUDENT)}
    assert {name.rpartition(".")[2] for name in changed} == set(moved)
    assert all("attn2" in name for name in changed)


def test_methods_for_many_take_several_concepts() -> None:
    assert all(find_method(name).several for name in ("layerwise", "layerwise-tuned", "speed", "mace", "uce", "rece"))
    assert not find_method("esd-x").several
