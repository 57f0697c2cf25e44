"""Denial towards what is retained: laws of the answer, of what is told, and of the training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import multivariate_normal
from torch import Tensor

from fade.errors import ConfigError, DataError
from fade.methods.fade import retained as retained_file
from fade.methods.fade.retained import (
    RetainedSettings,
    anything,
    denoised_among,
    times_between,
    towards_retained,
)
from fade.methods.fade.sparse_lora import adapter_tensors
from fade.methods.method import STUDENT, Material
from fade.models.families.stable_diffusion import StableDiffusion
from fade.models.paths import DiffusionPath, FlowPath, NoisePath
from fade.models.told import Told

PATHS = (
    DiffusionPath(torch.linspace(0.999, 0.005, 1000)),
    DiffusionPath(torch.linspace(0.999, 0.005, 1000), "v_prediction"),
    FlowPath(),
)
FEW: dict[str, Any] = {
    **{"steps": 4, "named": 4, "denied": 4, "places": 4, "pictures": 4, "captions": 3, "pool": 8},
    **{"states": 2, "lifetime": 4, "learning_rate": 1e-3},
}
HOW: dict[str, Any] = {"precision": "fp32", "seed": 5}


@given(st.sampled_from(PATHS), st.integers(1, 998), st.integers(0, 2**31), st.integers(1, 5))
def test_the_sharpest_answer_is_bayes_own(path: NoisePath, t: int, seed: int, count: int) -> None:
    """At k = the number of values: the posterior mean under equal odds, by SciPy's densities in float64."""
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randn(count, 2, 2, 2, generator=generator)
    times = torch.tensor([t, t])
    noisy = path.noised(pictures[:1].expand(2, -1, -1, -1), torch.randn(2, 2, 2, 2, generator=generator), times)
    found = denoised_among(pictures, noisy, times, path, sharpness=8)
    zero, one = torch.zeros(2, 1, 1, 1), torch.ones(2, 1, 1, 1)
    signal, spread = (float(path.noised(*pair, times)[0]) for pair in ((one, zero), (zero, one)))
    known = pictures.flatten(1).double().numpy()
    for row, given_so in zip(found.flatten(1), noisy.flatten(1).double().numpy(), strict=True):
        logs = np.array([multivariate_normal.logpdf(given_so, signal * x, spread**2 * np.eye(8)) for x in known])
        odds = np.exp(logs - logs.max())
        np.testing.assert_allclose(row.numpy(), odds @ known / odds.sum(), atol=2e-2)


@pytest.mark.parametrize("path", PATHS)
def test_a_retained_picture_is_its_own_answer_and_a_blunt_one_is_the_mean(path: NoisePath) -> None:
    pictures = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    times = torch.full((6,), 300)
    noisy = path.noised(pictures, torch.zeros_like(pictures), times)
    torch.testing.assert_close(denoised_among(pictures, noisy, times, path, 1000.0), pictures, rtol=1e-3, atol=1e-3)
    blunt = denoised_among(pictures, noisy, times, path, 1e-9)
    torch.testing.assert_close(blunt, pictures.mean(0).expand(6, -1, -1, -1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("path", PATHS)
def test_what_is_denied_lies_between_the_ratios(path: NoisePath) -> None:
    times = times_between(path, 0.3, 5.0)
    inside = torch.isin(torch.arange(path.steps), times)
    ratio = path.snr(torch.arange(path.steps))
    assert ratio[inside].min() >= 0.3
    assert ratio[inside].max() <= 5.0
    assert not ((ratio[~inside] >= 0.3) & (ratio[~inside] <= 5.0)).any()
    with pytest.raises(ConfigError, match=r"fade-retained\.low"):
        times_between(path, 5.0, 0.3)


def test_anything_lies_between_captions_and_comes_from_its_generator() -> None:
    told = Told(torch.randn(5, 7, 3, generator=torch.Generator().manual_seed(1)))
    one, same, other = (anything(told, 40, torch.Generator().manual_seed(seed)).states for seed in (2, 2, 3))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.shape == (40, 7, 3)
    # What two equal captions mix to has noise alone: at the most 1.5 standard deviations of 0.
    assert anything(Told(torch.ones(2, 7, 3)), 4, torch.Generator().manual_seed(1)).states.eq(1).all()


def test_by_name_a_seen_picture_becomes_one_of_the_surrogates_and_else_the_bases_answer(
    base: StableDiffusion, material: Material
) -> None:
    settings, path = RetainedSettings(**FEW | {"pool": 64}), base.denoiser.path
    lessons = retained_file._lessons(base, material, settings, **HOW)
    named, surrogates = lessons.named, material.anchor
    concepts = [any(torch.equal(one, mine) for mine in material.forget) for one in named.examples.latents]
    assert sum(concepts) == 48
    denied = torch.isin(named.timesteps, lessons.times) & torch.tensor(concepts)
    assert 0 < int(denied.sum()) < 48
    led = path.clean(named.noisy[denied], named.answers[denied], named.timesteps[denied])
    expected = denoised_among(
        surrogates, named.noisy[denied], named.timesteps[denied], path, sharpness=settings.sharpness
    )
    torch.testing.assert_close(led, expected, rtol=1e-2, atol=1e-2)
    with torch.no_grad():
        plain = base.denoiser.predict(named.noisy[~denied], named.timesteps[~denied], named.examples.targets[~denied])
    torch.testing.assert_close(named.answers[~denied], plain, rtol=1e-3, atol=1e-3)


def test_a_step_asks_each_as_it_should(base: StableDiffusion, material: Material) -> None:
    settings = RetainedSettings(**FEW | {"named": 200, "denied": 400, "places": 60, "pictures": 60})
    lessons = retained_file._lessons(base, material, settings, **HOW)
    known = Told(torch.full_like(material.concept.states[:2], 9.0))
    named, denied, places, pictures = lessons.drawn(known)
    searched = (named.told.states == 9).flatten(1).all(dim=1)
    assert 0 < int(searched.sum()) < 200
    assert not torch.isin(named.times[searched], lessons.times).any(), "where it is seen, a found state is denied"
    own = {row.numpy().tobytes() for row in material.concept.states}
    assert all(row.numpy().tobytes() in own for row in named.told.states[~searched])
    assert torch.isin(named.times, lessons.times).any()
    assert torch.isin(denied.times, lessons.times).all()
    assert not any(row.numpy().tobytes() in own for row in denied.told.states), "the name is the surrogate's alone"
    path = base.denoiser.path
    led = path.clean(denied.noisy, denied.target, denied.times)
    expected = denoised_among(material.retain, denied.noisy, denied.times, path, settings.sharpness)
    torch.testing.assert_close(led, expected, rtol=1e-2, atol=1e-2)
    for part in (places, pictures):
        rows = slice(0, 20)
        with torch.no_grad():
            answer = base.denoiser.predict(part.noisy[rows], part.times[rows], part.told[rows])
        torch.testing.assert_close(part.target[rows], answer, rtol=1e-3, atol=1e-3)


def test_the_same_request_gives_the_same_bits(base: StableDiffusion, material: Material) -> None:
    found: list[dict[str, Tensor]] = []
    for _ in range(2):
        steps = list(towards_retained(base, material, RetainedSettings(**FEW), **HOW))
        assert [step.step for step in steps] == [1, 2, 3, 4]
        found.append({name: one.clone() for name, one in adapter_tensors(base.denoiser, STUDENT).items()})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(one, found[1][name]) for name, one in found[0].items())


def test_training_brings_denied_pictures_to_retained_ones(base: StableDiffusion, material: Material) -> None:
    settings = RetainedSettings(**FEW | {"steps": 60, "denied_weight": 5.0, "denied": 16, "learning_rate": 3e-3})
    losses = [step.forget_loss for step in towards_retained(base, material, settings, **HOW)]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


def test_what_is_missing_is_said_before_anything_is_drawn(base: StableDiffusion, material: Material) -> None:
    class Nothing:
        def encoded(self, most: int | None = None) -> Any:
            return material.rows("retain").encoded(most)[:0]

    short = replace(material, rows=lambda name: Nothing() if name == "retain" else material.rows(name))
    with pytest.raises(DataError, match="0 retained ones"):
        next(towards_retained(base, short, RetainedSettings(**FEW), **HOW))
