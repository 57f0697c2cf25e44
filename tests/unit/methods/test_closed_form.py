"""The closed form against a plain least-squares solution, whole, within masks, and cut to a rank."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fade.asking.prepare import prepare_spec
from fade.config import load_settings
from fade.errors import ConfigError, DataError, MaskMismatchError
from fade.files import read_json
from fade.lineage import ROOT
from fade.methods.closed_form import (
    LEAST_WEIGHT,
    MOST_LONGER,
    MOST_WEIGHT,
    LowRank,
    aligned,
    closed_form,
    distinct,
    metric_of_answers,
    open_projection,
    text_moments,
    weight_reaching,
)
from fade.methods.fade.masks import Mask
from fade.methods.fade.sparse_lora import add_sparse_lora, begin_with, check_inside_mask, lora_layers
from fade.methods.fade.training import retained_states
from fade.models.families.stable_diffusion import StableDiffusion
from fade.studies.trial import run_trial
from tests.tiny import PROJECT

RETAIN_WEIGHT, RIDGE = 2.0, 1e-3


def _states(width: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    concept, surrogate, retain = (torch.randn(n, 6, width, generator=generator) for n in (9, 9, 14))
    return concept, surrogate, retain


def _mask(base: StableDiffusion, **parts: dict[str, Tensor]) -> Mask:
    modules = tuple(base.denoiser.text_sites())
    assert len(modules) >= 2
    return Mask("neuron" if parts else "none", modules, len(modules), len(modules), **parts)


def _by_least_squares(weight: Tensor, columns: np.ndarray) -> np.ndarray:
    """The change of one projection, from the stacked equations themselves, in float64."""
    f, s, r = (states.reshape(-1, states.shape[-1]).double().numpy() for states in _states(weight.shape[1]))
    w = weight.double().numpy()
    ridge = RIDGE * (f**2).mean()
    # Unknown: X (in, in), rows of X are what the columns kept contribute; minimise over X = D' on those columns.
    left = np.concatenate(
        [
            f[:, columns] / np.sqrt(len(f)),
            np.sqrt(RETAIN_WEIGHT / len(r)) * r[:, columns],
            np.sqrt(ridge) * np.eye(int(columns.sum())),
        ]
    )
    rest = np.zeros((len(r) + int(columns.sum()), f.shape[1]))
    right = np.concatenate([(s - f) / np.sqrt(len(f)), rest])
    found = np.linalg.lstsq(left, right, rcond=None)[0]
    change = np.zeros_like(w)
    change[:, columns] = w @ found.T
    return change


def _whole(change: LowRank) -> np.ndarray:
    return (change.B.double() @ change.A.double()).numpy()


def _moments(width: int) -> object:
    return text_moments(*_states(width), retain_weight=RETAIN_WEIGHT, ridge=RIDGE)


def test_many_prompts_are_summed_up_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _moments(32)
    monkeypatch.setattr("fade.methods.closed_form.PROMPTS_AT_ONCE", 4)
    assert len(_states()[2]) > 2 * 4, "more than two parts"
    parted = _moments(32)
    torch.testing.assert_close(parted.metric, whole.metric, rtol=1e-12, atol=1e-14)  # type: ignore[attr-defined]
    torch.testing.assert_close(parted.towards, whole.towards, rtol=1e-12, atol=1e-14)  # type: ignore[attr-defined]


def test_of_full_rank_it_is_the_least_squares_solution(base: StableDiffusion) -> None:
    mask, modules = _mask(base), dict(base.network.named_modules())
    width = modules[mask.modules[0]].weight.shape[1]
    found = closed_form(base.denoiser, _moments(width), mask, rank=1000)  # type: ignore[arg-type]
    assert set(found) == set(mask.modules)
    for name in mask.modules:
        expected = _by_least_squares(modules[name].weight.detach(), np.ones(width, dtype=bool))
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(_whole(found[name]), expected, rtol=1e-4, atol=1e-6)


def test_within_a_mask_it_is_the_least_squares_solution_of_the_mask(base: StableDiffusion) -> None:
    mask, modules = _mask(base), dict(base.network.named_modules())
    generator = torch.Generator().manual_seed(2)
    rows = {name: torch.rand(modules[name].weight.shape[0], generator=generator) < 0.5 for name in mask.modules}
    columns = {name: torch.rand(modules[name].weight.shape[1], generator=generator) < 0.5 for name in mask.modules}
    masked = replace(mask, granularity="neuron", rows=rows, columns=columns)
    width = modules[mask.modules[0]].weight.shape[1]
    found = closed_form(base.denoiser, _moments(width), masked, rank=1000)  # type: ignore[arg-type]
    unmasked = closed_form(base.denoiser, _moments(width), mask, rank=1000)  # type: ignore[arg-type]
    for name in mask.modules:
        kept = columns[name].numpy()
        expected = _by_least_squares(modules[name].weight.detach(), kept)
        expected[~rows[name].numpy()] = 0.0
        np.testing.assert_allclose(_whole(found[name]), expected, rtol=1e-4, atol=1e-6)
        # Not merely the whole solution with entries struck out.
        struck = _whole(unmasked[name]) * rows[name].numpy()[:, None] * kept
        assert np.abs(struck - expected).max() > 1e-4


def test_cut_to_a_rank_it_is_the_best_of_that_rank_on_the_states_it_sees(base: StableDiffusion) -> None:
    mask, modules = _mask(base), dict(base.network.named_modules())
    width = modules[mask.modules[0]].weight.shape[1]
    moments = _moments(width)
    metric = moments.metric.numpy()  # type: ignore[attr-defined]
    values, vectors = np.linalg.eigh(metric)
    root = vectors * np.sqrt(values) @ vectors.T  # symmetric, where the code takes a triangular one
    whole = closed_form(base.denoiser, moments, mask, rank=1000)  # type: ignore[arg-type]
    found = closed_form(base.denoiser, moments, mask, rank=2)  # type: ignore[arg-type]
    for name in mask.modules:
        change = _whole(whole[name])
        left, singular, right = np.linalg.svd(change @ root, full_matrices=False)
        best = (left[:, :2] * singular[:2]) @ right[:2] @ np.linalg.inv(root)
        np.testing.assert_allclose(_whole(found[name]), best, rtol=1e-3, atol=1e-5)
        u, plain, v = np.linalg.svd(change, full_matrices=False)
        naive = (u[:, :2] * plain[:2]) @ v[:2]
        lost = [float(np.square((change - cut) @ root).sum()) for cut in (_whole(found[name]), naive)]
        assert lost[0] < lost[1]


def test_what_must_stay_stays_the_more_the_more_it_weighs(base: StableDiffusion) -> None:
    mask, modules = _mask(base), dict(base.network.named_modules())
    name = mask.modules[0]
    width = modules[name].weight.shape[1]
    concept, surrogate, retain = _states(width)
    moved, missed = [], []
    for weight in (0.1, 1.0, 100.0):
        moments = text_moments(concept, surrogate, retain, retain_weight=weight, ridge=RIDGE)
        change = closed_form(base.denoiser, moments, mask, rank=1000)[name]
        matrix = change.B @ change.A
        moved.append(float((retain @ matrix.T).square().mean()))
        aim = (surrogate - concept) @ modules[name].weight.detach().T
        missed.append(float((concept @ matrix.T - aim).square().mean()))
    assert moved[0] > moved[1] > moved[2]
    assert missed[0] < missed[1] < missed[2]


def test_an_adapter_begins_with_it_and_stays_inside_its_mask(base: StableDiffusion) -> None:
    modules = dict(base.network.named_modules())
    mask = _mask(base)
    rows = {name: torch.arange(modules[name].weight.shape[0]) % 2 == 0 for name in mask.modules}
    columns = {name: torch.arange(modules[name].weight.shape[1]) % 3 > 0 for name in mask.modules}
    masked = replace(mask, granularity="neuron", rows=rows, columns=columns)
    width = modules[mask.modules[0]].weight.shape[1]
    changes = closed_form(base.denoiser, _moments(width), masked, rank=2)  # type: ignore[arg-type]
    add_sparse_lora(base.network, masked, rank=3, alpha=6.0, seed=1, name="student")
    begin_with(base.network, "student", changes)
    for name, layer in lora_layers(base.network).items():
        expected = changes[name].B @ changes[name].A
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(layer.get_delta_weight("student"), expected, rtol=1e-5, atol=1e-6)
    check_inside_mask(base.network, masked, "student")
    with pytest.raises(MaskMismatchError, match="of rank 5; the adapter holds rank 3"):
        begin_with(base.network, "student", closed_form(base.denoiser, _moments(width), masked, rank=5))  # type: ignore[arg-type]


def test_what_it_cannot_do_is_an_error_that_says_so(base: StableDiffusion) -> None:
    concept, surrogate, retain = _states()
    with pytest.raises(DataError, match="must be paired"):
        text_moments(concept[:3], surrogate, retain, retain_weight=1.0, ridge=RIDGE)
    with pytest.raises(DataError, match="0 to retain"):
        text_moments(concept, surrogate, retain[:0], retain_weight=1.0, ridge=RIDGE)
    elsewhere = Mask("module", ("conv_in",), 1, 1)
    with pytest.raises(MaskMismatchError, match=r"holds 0 of them.*distill\.start"):
        closed_form(base.denoiser, _moments(32), elsewhere, rank=1)  # type: ignore[arg-type]


def test_shut_directions_leave_what_is_retained_and_no_state_reaches_them() -> None:
    generator = torch.Generator().manual_seed(8)
    basis = torch.linalg.qr(torch.randn(8, 8, generator=generator).double())[0]
    retained, own = torch.randn(40, 5, generator=generator).double() @ basis[:5], basis[5]
    concept = retained[:6] + 3 * own
    forget, keep = (states.T @ states / len(states) for states in (concept, retained))
    weight = torch.randn(12, 8, generator=generator).double()
    left = open_projection(forget, keep, metric_of_answers([weight]), 3)
    torch.testing.assert_close(retained @ left.T, retained, rtol=1e-4, atol=1e-4)
    assert (concept @ left.T - concept).abs().max() > 0.5
    anything = 1000 * torch.randn(20, 8, generator=generator).double()
    assert (anything @ left.T @ own).abs().max() < 1.0  # of about a thousand
    assert torch.linalg.matrix_rank(left, rtol=1e-12) == 5
    # Asked for more, it shuts as many as leave the retained answers where they are.
    assert torch.linalg.matrix_rank(open_projection(forget, keep, metric_of_answers([weight]), 7), rtol=1e-12) == 5
    more = open_projection(forget, keep, metric_of_answers([weight]), 7, moved=math.inf)
    assert torch.linalg.matrix_rank(more, rtol=1e-12) == 1


def test_all_projections_together_have_as_many_directions_less_as_are_shut(base: StableDiffusion) -> None:
    mask, modules = _mask(base), dict(base.network.named_modules())
    concept, surrogate, retain = _states(32)
    retain[..., 24:] = 0.0  # what is retained uses 24 of 32 directions
    moments, spread = text_moments(concept, surrogate, retain, retain_weight=RETAIN_WEIGHT, ridge=RIDGE), {}
    for shut in (0, 6):
        found = closed_form(base.denoiser, moments, mask, rank=2, shut=shut)
        assert all(len(change.A) == 2 + shut for change in found.values())
        whole = [modules[name].weight.detach() + change.B @ change.A for name, change in found.items()]
        spread[shut] = torch.linalg.svdvals(torch.cat(whole))
    assert spread[0][-1] > 1e-2 * spread[0][0]
    assert spread[6][-6] < 1e-5 * spread[6][0]
    assert spread[6][-7] > 1e-2 * spread[6][0]


def test_directions_are_shut_in_whole_projections_and_without_training(base: StableDiffusion) -> None:
    modules = dict(base.network.named_modules())
    rows = {name: torch.ones(modules[name].weight.shape[0], dtype=torch.bool) for name in base.denoiser.text_sites()}
    with pytest.raises(MaskMismatchError, match="got a mask of rows and columns"):
        closed_form(base.denoiser, _moments(32), _mask(base, rows=rows), rank=2, shut=4)  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=r"expected distill\.start closed_form and distill\.steps 0, got zero and 120"
    ):
        load_settings(ROOT / "params.yaml", changes={"distill.closed_form.shut": 4})


def test_captions_that_occur_twice_count_once() -> None:
    concept, surrogate, _ = _states()
    again = torch.cat([concept[:3], concept[:2]]), torch.cat([surrogate[:3], surrogate[:1], surrogate[4:5]])
    first, second = distinct(*again)
    torch.testing.assert_close(first, torch.cat([concept[:3], concept[1:2]]), rtol=0, atol=0)
    torch.testing.assert_close(second, torch.cat([surrogate[:3], surrogate[4:5]]), rtol=0, atol=0)


INSTANT = {
    "distill.start": "closed_form",
    "distill.steps": 0,
    "distill.rank": 1,
    "mask.granularity": "none",
    "saliency.score": "random",
}


@pytest.mark.parametrize("shut", [0, 5])
def test_without_training_the_adapter_is_the_closed_form_alone(workspace: Path, tmp_path: Path, shut: int) -> None:
    settings = load_settings(Path("params.yaml"), changes={**INSTANT, "distill.closed_form.shut": shut})
    spec = prepare_spec("astronaut", "cameraman", project=PROJECT, settings=settings)
    row = run_trial(spec, root=tmp_path)
    folder = tmp_path / spec.id
    assert (row["steps"], read_json(folder / "adapter" / "card.json")["steps"]) == (0, 0)
    assert pd.read_csv(folder / "curve.csv").empty
    tensors = load_file(folder / "adapter" / "pytorch_lora_weights.safetensors")
    assert tensors
    assert all(".attn2.to_k." in name or ".attn2.to_v." in name for name in tensors)
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_B" in name)
    (rank,) = {len(tensor) for name, tensor in tensors.items() if "lora_A" in name}
    assert (shut > 0) < rank <= 1 + shut


def test_no_steps_and_no_start_change_nothing_and_are_refused(workspace: Path) -> None:
    with pytest.raises(ConfigError, match=r"distill\.steps is 0, so nothing would change"):
        load_settings(Path("params.yaml"), changes={"distill.steps": 0})


@pytest.mark.parametrize("way", [0.3, 0.6, 0.75])
def test_the_weight_that_reaches_a_share_of_the_way_is_the_one_whose_change_goes_so_far(way: float) -> None:
    concept, surrogate, retain = _states()
    weight = weight_reaching(way, concept, surrogate, retain, ridge=RIDGE)
    gone = []
    for tried in (weight, 2 * weight):
        moments = text_moments(concept, surrogate, retain, retain_weight=tried, ridge=RIDGE)
        change = torch.linalg.solve(moments.metric, moments.towards.T).T
        apart = (surrogate - concept).double()
        gone.append(float(((concept.double() @ change.T) * apart).sum() / apart.square().sum()))
    assert gone[0] == pytest.approx(way, abs=1e-5)
    assert gone[1] < way - 0.01
    assert weight_reaching(1.0, concept, surrogate, retain, ridge=RIDGE) == pytest.approx(LEAST_WEIGHT, rel=1e-5)
    assert weight_reaching(0.0, concept, surrogate, retain, ridge=RIDGE) == pytest.approx(MOST_WEIGHT, rel=1e-5)


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_neighbours_that_are_a_share_of_what_is_retained_move_less_at_the_same_way(share: float) -> None:
    concept, surrogate, retain = _states()
    retain = torch.cat([retain, retain[:1]])  # equal captions count once
    near = concept[:2] + 0.3 * retain[:2]
    assert len(retained_states([retain, near], 0.0)) == 14
    moved, ways = [], []
    for states in (retained_states([retain, near], 0.0), retained_states([retain, near], share)):
        weight = weight_reaching(0.6, concept, surrogate, states, ridge=RIDGE)
        moments = text_moments(concept, surrogate, states, retain_weight=weight, ridge=RIDGE)
        change = torch.linalg.solve(moments.metric, moments.towards.T).T
        moved.append(float((near.double() @ change.T).square().mean()))
        apart = (surrogate - concept).double()
        ways.append(float(((concept.double() @ change.T) * apart).sum() / apart.square().sum()))
    assert len(states) > 14
    assert (len(states) - 14) / len(states) == pytest.approx(share, abs=0.06)
    assert moved[1] < 0.9 * moved[0]
    assert ways == pytest.approx([0.6, 0.6], abs=1e-4)


def test_what_a_longer_name_moves_is_paired_with_itself() -> None:
    """A surrogate of a word more: behind it each state says what the concept's said one position before."""
    generator = torch.Generator().manual_seed(4)
    concept, word = torch.randn(3, 7, 128, generator=generator), torch.randn(3, 1, 128, generator=generator)
    other = torch.randn(3, 1, 128, generator=generator)
    longer = torch.cat([concept[:, :1], other, word, concept[:, 2:6]], dim=1) + 0.01
    found = aligned(concept, longer)
    assert not torch.equal(found, longer)
    torch.testing.assert_close(found[:, 2:6], concept[:, 2:6] + 0.01)
    torch.testing.assert_close(found[:, :2], longer[:, :2])
    same = concept.clone()
    same[:, 1:2] = other
    assert torch.equal(aligned(concept, same), same)  # of as many words nothing is moved


def test_the_whole_way_is_gone_in_the_mean_where_the_least_squares_fall_short(base: StableDiffusion) -> None:
    mask, modules = _mask(base), dict(base.network.named_modules())
    width = modules[mask.modules[0]].weight.shape[1]
    f, s, _ = (part.flatten(0, 1).double() for part in _states(width))

    def gone(changes: dict[str, LowRank]) -> float:
        """Of the way from f to s, over all projections."""
        asked = made = 0.0
        for name, change in changes.items():
            way = (s - f) @ modules[name].weight.detach().double().T
            asked += float(way.square().sum())
            made += float((way * (f @ (change.B.double() @ change.A.double()).T)).sum())
        return made / asked

    lightly = text_moments(*_states(width), retain_weight=0.01, ridge=RIDGE)
    short = closed_form(base.denoiser, lightly, mask, rank=1000)
    whole = closed_form(base.denoiser, lightly, mask, rank=1000, whole=True)
    assert 1 / MOST_LONGER < gone(short) < 0.99
    assert gone(whole) == pytest.approx(1.0, abs=1e-4)
    far = closed_form(base.denoiser, _moments(width), mask, rank=4)  # type: ignore[arg-type]
    most = closed_form(base.denoiser, _moments(width), mask, rank=4, whole=True)  # type: ignore[arg-type]
    assert gone(far) < 1 / MOST_LONGER
    assert gone(most) == pytest.approx(MOST_LONGER * gone(far), rel=1e-4)
