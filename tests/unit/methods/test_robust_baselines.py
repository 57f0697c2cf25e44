"""Published methods that train against an attacker, or keep the rest by other means: a property of each one's paper."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from fade.methods import receler as receler_file
from fade.methods.adv_unlearn import AdvUnlearnSettings, adv_unlearn, attacked
from fade.methods.fade.sparse_lora import lora_layers
from fade.methods.method import STUDENT, Material
from fade.methods.negative_guidance import frozen_answers, negative_target
from fade.methods.receler import RecelerSettings, attended, attention_layers, behind, receler, shows, spilt
from fade.methods.spm import SpmSettings, anchors, spm
from fade.methods.stereo import StereoSettings, composed_target, erase_once, search, stereo
from fade.methods.trained_difference import modules_of, trained_difference
from fade.models.deltas import delta_weights, plain_modules
from fade.models.families.stable_diffusion import StableDiffusion
from fade.models.family import load_base
from fade.models.told import Told

FEW: dict[str, Any] = {"steps": 5, "batch": 2, "learning_rate": 1e-2, "sampling_steps": 2}
HOW: dict[str, Any] = {"precision": "fp32", "seed": 1}


def _noisy(base: StableDiffusion) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(8)
    return torch.randn((4, *base.denoiser.latent_shape), generator=generator), torch.tensor(600)


@torch.no_grad()
def _moved(base: StableDiffusion, told: Told) -> float:
    """How far the answers to prompts have moved from the base's, as mean squares."""
    noisy, timestep = _noisy(base)
    (before,) = frozen_answers(base, noisy, timestep, [told], precision="fp32")
    return float((base.denoiser.predict(noisy, timestep, told) - before).square().mean())


def test_anchors_lean_away_from_the_concept_at_about_its_norm() -> None:
    generator = torch.Generator().manual_seed(2)
    states = torch.tensor([3.0, 4.0]).expand(4000, 1, 2)
    found = anchors(states, generator)
    plain = torch.randn(found.shape, generator=generator)
    alike = [float(cosine_similarity(one.flatten(1), states.flatten(1)).mean()) for one in (plain, found)]
    assert abs(alike[0]) < 0.05
    # E cos under the weights min(1, 1 - cos), over all directions of a plane.
    assert alike[1] == pytest.approx(-math.pi / 2 / (2 * math.pi - 2), abs=0.03)
    norms = found.flatten(1).norm(dim=1)
    assert 4.0 <= float(norms.min()) < 4.1
    assert 5.9 < float(norms.max()) <= 6.0 + 1e-4


def test_spm_hangs_a_change_of_rank_one_on_every_module(base: StableDiffusion, material: Material) -> None:
    steps = list(spm(base, material, SpmSettings(**FEW | {"steps": 2}), **HOW))
    assert [step.step for step in steps] == [1, 2]
    layers = lora_layers(base.network)
    assert set(layers) == set(plain_modules(base.network))
    assert {layer.r[STUDENT] for layer in layers.values()} == {1}
    assert all(bool(layer.lora_B[STUDENT].weight.any()) for layer in layers.values())


def test_latent_anchoring_keeps_the_answers_to_what_is_nobodys_caption(tiny_base: Path, material: Material) -> None:
    def away(anchoring: float) -> float:
        base = load_base(tiny_base)
        list(spm(base, material, SpmSettings(**FEW, anchoring=anchoring), **HOW))
        states = anchors(material.concept.states, torch.Generator().manual_seed(77))
        return _moved(base, material.concept.with_tensors({"states": states}))

    without = away(1e-9)
    assert without > 1e-4
    assert away(1000.0) < without / 2


def test_the_attacker_comes_nearer_to_the_concept_within_its_radius(base: StableDiffusion, material: Material) -> None:
    settings = AdvUnlearnSettings(**FEW, radius=0.3, attack_steps=4)
    list(adv_unlearn(base, material, settings, **HOW))
    noisy, timestep = _noisy(base)
    told = material.concept
    (concept,) = frozen_answers(base, noisy, timestep, [told], precision="fp32")

    def left(asked: Told) -> float:
        with torch.no_grad():
            return float((base.denoiser.predict(noisy, timestep, asked) - concept).square().mean())

    found = attacked(base, noisy, timestep, told, concept, settings=settings, precision="fp32")
    assert left(told) > 1e-4
    assert left(found) < left(told)
    furthest = float((found.states - told.states).abs().max())
    assert 0 < furthest <= 0.3 * float(told.states.square().mean().sqrt()) + 1e-6


def test_retained_captions_keep_their_answers_by_their_weight(tiny_base: Path, material: Material) -> None:
    def away(weight: float) -> float:
        base = load_base(tiny_base)
        list(adv_unlearn(base, material, AdvUnlearnSettings(**FEW, attack_steps=1, retain_weight=weight), **HOW))
        return _moved(base, material.retain_prompts)

    without = away(1e-9)
    assert without > 1e-4
    assert away(30.0) < without / 2


def test_stereos_target_is_esds_where_the_anchor_says_nothing(base: StableDiffusion, material: Material) -> None:
    noisy, timestep = _noisy(base)
    plain = negative_target(base, noisy, timestep, material.concept, eta=2.0, precision="fp32")

    def composed(negative: list[Told], anchor: Told) -> Tensor:
        return composed_target(base, noisy, timestep, negative, anchor, eta=2.0, precision="fp32")

    nothing = base.unconditional().expand(4)
    torch.testing.assert_close(composed([material.concept], nothing), plain, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(composed([material.concept], material.surrogate), plain, atol=1e-3)
    # Of several the mean counts: the anchor among them takes half of what it gave.
    both = composed([material.concept, material.surrogate], material.surrogate)
    one = composed([material.concept], material.surrogate)
    (without,) = frozen_answers(base, noisy, timestep, [None], precision="fp32")
    torch.testing.assert_close(both - without, (one - without) / 2, rtol=1e-3, atol=1e-5)


def test_stereo_erases_once_and_from_the_base(tiny_base: Path, material: Material) -> None:
    settings = StereoSettings(**FEW, rounds=2, search_steps=2, search_batch=2)

    def differences(base: StableDiffusion) -> list[Tensor]:
        return [delta.parts[STUDENT]().detach() for _, delta in sorted(delta_weights(base.network).items())]

    whole = load_base(tiny_base)
    steps = list(stereo(whole, material, settings, **HOW))
    assert [step.step for step in steps] == list(range(1, 6))
    apart = load_base(tiny_base)
    names = modules_of(apart.denoiser, "text_attention")
    found: list[Told] = []
    list(search(apart, material, trained_difference(apart.network, names), found, settings=settings, **HOW))
    assert any(bool(one.any()) for one in differences(apart)), "the rounds erased something, which is thrown away"
    assert len(found) == 2
    assert not torch.equal(found[0].states, found[1].states)
    fresh = load_base(tiny_base)
    changes = trained_difference(fresh.network, names)
    list(erase_once(fresh, material, changes, found, settings=settings, steps=3, **HOW))
    assert all(torch.equal(a, b) for a, b in zip(differences(whole), differences(fresh), strict=True))


def test_recelers_attacker_stands_behind_the_caption(material: Material) -> None:
    attacker = torch.full((3, material.concept.states.shape[2]), 7.0)
    found = behind(material.concept, attacker).states
    assert not (material.concept.states == 7.0).any()
    assert torch.equal(found[:, :-3], material.concept.states[:, :-3])
    assert (found[:, -3:] == 7.0).all()


def test_recelers_attacker_is_carried_over_from_step_to_step(
    base: StableDiffusion, material: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    at: list[Tensor] = []

    def noted(told: Told, attacker: Tensor) -> Told:
        at.append(attacker.detach().clone())
        return behind(told, attacker)

    monkeypatch.setattr(receler_file, "behind", noted)
    list(receler(base, material, RecelerSettings(**FEW | {"steps": 2}, rank=2, tokens=2, attack_steps=2), **HOW))
    assert len(at) == 6  # twice the attacker's two and the eraser's one
    assert not torch.equal(at[0], at[1])
    assert not torch.equal(at[1], at[2])
    assert torch.equal(at[3], at[2])


def test_places_that_attend_to_the_concepts_words_show_it() -> None:
    attention = torch.tensor([[[0.9, 0.1, 0.0], [0.2, 0.4, 0.4], [0.0, 0.1, 0.9]]])
    words = torch.tensor([[False, True, True]])
    assert shows(attention, words, 0.1).tolist() == [[False, True, True]]  # 0.05, 0.4, 0.5: brought to 0, 0.78, 1
    assert shows(attention, words, 0.9).tolist() == [[False, False, True]]
    added = torch.zeros(1, 3, 2)
    added[0, 2] = 5.0
    assert spilt(added, torch.tensor([[True, True, True]])) == 0
    assert spilt(added, torch.tensor([[False, False, True]])) == 0
    assert spilt(added, torch.tensor([[True, False, False]])) == 12.5


def test_recelers_maps_are_the_attention_that_the_network_pays(base: StableDiffusion, material: Material) -> None:
    layers, (noisy, timestep) = attention_layers(base), _noisy(base)
    modules = dict(base.network.named_modules())
    given: dict[str, tuple[Tensor, Tensor]] = {}
    name = layers[0]
    hooks = [
        modules[f"{name}.to_v"].register_forward_hook(lambda module, inputs, output: given.update(values=output)),
        modules[f"{name}.to_out.0"].register_forward_pre_hook(lambda module, inputs: given.update(mixed=inputs[0])),
    ]
    with attended(base, layers) as seen:
        frozen_answers(base, noisy, timestep, [material.concept], precision="fp32")
    for hook in hooks:
        hook.remove()
    assert set(seen) == set(layers)
    torch.testing.assert_close(seen[name].sum(-1), torch.ones(seen[name].shape[:2]))
    assert seen[name].std(dim=1).max() > 1e-6, "places attend differently"
    if modules[name].heads == 1:
        torch.testing.assert_close(seen[name] @ given["values"], given["mixed"], rtol=1e-3, atol=1e-5)


def test_recelers_regularisation_keeps_the_eraser_where_the_concept_is(tiny_base: Path, material: Material) -> None:
    def outside(weight: float) -> list[float]:
        settings = RecelerSettings(**FEW, rank=2, tokens=2, attack_steps=1, regularisation=weight, threshold=0.5)
        return [step.retain_loss for step in receler(load_base(tiny_base), material, settings, **HOW)]

    without = outside(1e-9)
    assert without[0] == 0  # an eraser begins as nothing
    assert without[-1] > 1e-5
    assert outside(100.0)[-1] < without[-1] / 2
