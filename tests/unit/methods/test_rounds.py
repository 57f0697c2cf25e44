"""Erasing in rounds: what is kept where the base draws it, and what a round knows of the one before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fade.errors import DataError, MaskMismatchError
from fade.methods.fade import rounds
from fade.methods.fade.known_answers import DRAWN_GUIDANCE, DRAWN_STEPS, answered, places_passed
from fade.methods.fade.masks import Mask
from fade.methods.fade.rounds import RoundsSettings, in_rounds
from fade.methods.fade.sparse_lora import adapter_tensors, adapters_disabled
from fade.methods.method import STUDENT, Material
from fade.methods.trained_difference import modules_of
from fade.models.families.stable_diffusion import StableDiffusion
from fade.models.generate import first_latents, guided
from fade.models.told import Told
from fade.seeding import derive_seed
from tests.unit.methods.test_method import MODULES

FEW: dict[str, Any] = {
    **{"steps": 4, "rank": 2, "searches": 2, "search_steps": 4, "states": 2, "lifetime": 4, "batch": 4},
    **{"captions": 3, "told_nothing": 2, "pool": 8, "learning_rate": 1e-2},
}
HOW: dict[str, Any] = {"precision": "fp32", "seed": 5}


@pytest.fixture
def masked(material: Material) -> Material:
    return Material(material.rows, material.empty, Mask("module", MODULES, len(MODULES), len(MODULES)))


def test_places_are_those_that_drawing_passes_with_the_bases_answers(base: StableDiffusion, material: Material) -> None:
    told = material.retain_prompts[:3]
    places = places_passed(base, told, seed=5, precision="fp32")
    assert len(places) == 3 * DRAWN_STEPS
    # The same by the loop that draws pictures.
    noisy = first_latents([derive_seed(5, "place", row) for row in range(3)], base.denoiser.latent_shape)
    scheduler, answer = base.solver("ddim", DRAWN_STEPS), guided(base, told, DRAWN_GUIDANCE)
    with torch.no_grad():
        for step, timestep in enumerate(scheduler.timesteps):
            rows = slice(3 * step, 3 * step + 3)
            torch.testing.assert_close(places.noisy[rows], noisy, rtol=1e-4, atol=1e-4)
            assert places.caption[rows].tolist() == [0, 1, 2]
            for told_so, kept in ((told, places.answers), (base.unconditional().expand(3), places.unsaid)):
                expected = base.denoiser.predict(noisy, timestep, told_so)
                torch.testing.assert_close(kept[rows], expected, rtol=1e-3, atol=1e-3)
            noisy = scheduler.step(answer(noisy, timestep), timestep, noisy).prev_sample
    assert (places.answers - places.unsaid).abs().max() > 1e-4, "a caption says something"


def test_what_is_forgotten_is_answered_as_the_surrogate_is(base: StableDiffusion, material: Material) -> None:
    forget, surrogate = (material.rows(name).encoded() for name in ("forget", "surrogate"))
    found = answered(base, forget, surrogate, count=8, seed=5, precision="fp32")
    with torch.no_grad():
        expected, named = (
            base.denoiser.predict(found.noisy, found.timesteps, told)
            for told in (found.examples.targets, found.examples.prompts)
        )
    torch.testing.assert_close(found.answers, expected, rtol=1e-3, atol=1e-3)
    assert (named - expected).abs().max() > 1e-4


def test_a_round_knows_what_was_found_against_the_one_before_and_begins_at_the_base(
    base: StableDiffusion, masked: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    knew: list[int] = []
    plain, searched = rounds.drawn_from, rounds._searched

    def noted(known: Told, otherwise: Told, generator: torch.Generator) -> Told:
        knew.append(len(known))
        return plain(known, otherwise, generator)

    begun: list[float] = []

    def searching(one: StableDiffusion, *given: Any, **named: Any) -> Told:
        begun.append(sum(float(tensor.abs().sum()) for name, tensor in _student(one).items() if "lora_B" in name))
        return searched(one, *given, **named)

    monkeypatch.setattr(rounds, "drawn_from", noted)
    monkeypatch.setattr(rounds, "_searched", searching)
    settings = RoundsSettings(rounds=2, **FEW)
    steps = in_rounds(base, masked, settings, **HOW)
    moved = []
    for step in steps:
        moved.append((step.step, knew[-1]))
    assert [number for number, _ in moved] == [1, 2, 3, 4]
    assert max(known for _, known in moved[:2]) <= settings.states
    assert min(known for _, known in moved[2:]) >= 2 * settings.searches
    assert begun[0] > 0, "the search was against a student that had learnt something"
    assert masked.notes["found_states"] == 2 * settings.searches
    base.network.delete_adapters(STUDENT)
    once = list(in_rounds(base, masked, RoundsSettings(rounds=1, **FEW | {"steps": 2}), **HOW))
    assert len(once) == 2
    assert masked.notes["found_states"] == 0


def test_the_same_request_gives_the_same_bits_inside_the_mask(base: StableDiffusion, masked: Material) -> None:
    found = []
    for _ in range(2):
        list(in_rounds(base, masked, RoundsSettings(**FEW), **HOW))
        found.append(adapter_tensors(base.denoiser, STUDENT))
        base.network.delete_adapters(STUDENT)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
    assert any(bool(tensor.any()) for name, tensor in found[0].items() if name.endswith("lora_B.weight"))
    changed = {name.removeprefix("unet.").partition(".lora_")[0] for name in found[0]}
    assert changed == set(MODULES)


def test_training_brings_the_concepts_answer_to_the_surrogates(base: StableDiffusion, material: Material) -> None:
    modules = tuple(modules_of(base.denoiser, "cross_attention"))
    masked = Material(material.rows, material.empty, Mask("module", modules, len(modules), len(modules)))
    forget = masked.rows("forget").encoded()
    times = torch.full((len(forget),), 500)

    def apart() -> float:
        with torch.no_grad():
            named = base.denoiser.predict(forget.latents, times, forget.prompts)
            with adapters_disabled(base.network):
                return float((named - base.denoiser.predict(forget.latents, times, forget.targets)).square().mean())

    before = apart()
    list(
        in_rounds(
            base, masked, RoundsSettings(**FEW | {"steps": 120, "share": 0.2, "rounds": 1, "kept_weight": 0.1}), **HOW
        )
    )
    assert before > 0
    assert apart() < 0.7 * before


def test_what_is_missing_is_said_before_anything_is_drawn(base: StableDiffusion, masked: Material) -> None:
    with pytest.raises(MaskMismatchError, match="got none"):
        next(in_rounds(base, Material(masked.rows, masked.empty), RoundsSettings(**FEW), **HOW))

    class Nothing:
        def encoded(self, most: int | None = None) -> Any:
            return masked.rows("surrogate").encoded(most)[:0]

    short = Material(lambda name: Nothing() if name == "surrogate" else masked.rows(name), masked.empty, masked.mask)
    with pytest.raises(DataError, match="0 of its surrogate"):
        next(in_rounds(base, short, RoundsSettings(**FEW), **HOW))


def _student(base: StableDiffusion) -> dict[str, Tensor]:
    return dict(adapter_tensors(base.denoiser, STUDENT))
