"""What an attacker may search, new words before the text encoder or the states behind it, and what is counted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fade.attacks.inversion import Curve, invert_concept, invert_words, success_curve
from fade.errors import ConfigError, DataError
from fade.models.base import Base
from fade.models.denoiser import weights_sha256
from fade.models.families.stable_diffusion import StableDiffusion
from fade.models.family import load_base
from fade.models.inversion import InversionStep, NewTokens
from fade.models.told import Told
from fade.seeding import torch_generator

SENTENCE = "a {}"


def _tokens(base: Base, count: int, rows: int = 2) -> NewTokens:
    return NewTokens(base, SENTENCE, rows=rows, count=count, generator=torch_generator(3, "test"))


@pytest.mark.parametrize("count", [1, 4])
def test_new_tokens_with_a_words_own_vector_read_as_that_word(base: StableDiffusion, count: int) -> None:
    word, tokenizer = "horse", base.pipeline.tokenizer
    plain = base.encode_prompts([SENTENCE.format(" ".join([word] * count))])
    free = _tokens(base, count)
    assert not torch.allclose(free.told().states[0], plain.states[0], atol=1e-3)
    (vector,) = tokenizer(word, add_special_tokens=False).input_ids
    with torch.no_grad():
        free.values[0][0] = base.pipeline.text_encoder.get_input_embeddings().weight[vector]
    torch.testing.assert_close(free.told().states[0], plain.states[0])
    assert not torch.allclose(free.told().states[1], plain.states[0], atol=1e-3)


def test_a_search_of_words_moves_the_new_tokens_and_nothing_else(base: StableDiffusion) -> None:
    encoder, latents = base.pipeline.text_encoder, torch.randn(4, *base.denoiser.latent_shape)
    before = weights_sha256(encoder), weights_sha256(base.network), base.encode_prompts(["a horse image"]).states
    begun = _tokens(base, 1).told().states
    how: dict[str, Any] = {"template": SENTENCE, "tokens": 1, "restarts": 2, "steps": 3, "batch": 4}
    *_, last = invert_words(base, latents, learning_rate=0.1, precision="fp32", seed=1, **how)
    found = last.states.states
    # Before the new token stand begin and "a", and a CLIP reads from left to right.
    torch.testing.assert_close(found[:, :2], begun[:, :2])
    assert not torch.allclose(found[:, 2:], begun[:, 2:], atol=1e-3)
    assert not torch.allclose(found[0], found[1], atol=1e-3)
    assert before[:2] == (weights_sha256(encoder), weights_sha256(base.network))
    assert torch.equal(before[2], base.encode_prompts(["a horse image"]).states)
    assert not any(p.requires_grad or p.grad is not None for p in (*encoder.parameters(), *base.network.parameters()))


def test_where_a_denoiser_is_told_the_pooled_state_too_words_reach_it(bases: dict[str, Path]) -> None:
    base = load_base(bases["sd3"])
    free = _tokens(base, 1)
    assert len(free.values) == 2  # a CLIP each
    told = free.told()
    gradients = torch.autograd.grad(told.others["pooled"].sum(), free.values)
    assert all(bool(one.any()) for one in gradients)


def test_a_base_without_a_clip_has_no_place_for_new_tokens(bases: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="New tokens need a CLIP"):
        _tokens(load_base(bases["pixart-sigma"]), 1)


@pytest.mark.parametrize("space", ["state", "word"])
def test_what_a_search_has_found_by_a_step_is_what_a_search_of_so_many_steps_finds(
    base: StableDiffusion, space: str
) -> None:
    latents = torch.randn(4, *base.denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
    how: dict[str, Any] = {"restarts": 2, "batch": 4, "learning_rate": 0.1, "precision": "fp32", "seed": 5}

    def search(steps: int) -> list[InversionStep]:
        if space == "state":
            return list(invert_concept(base, latents, prompts=["a cat", ""], steps=steps, **how))
        return list(invert_words(base, latents, template=SENTENCE, tokens=1, steps=steps, **how))

    longer, shorter = search(4), search(2)
    assert not torch.equal(longer[3].states.states, longer[1].states.states)
    assert torch.equal(longer[1].states.states, shorter[1].states.states)


def _looks(*seen: list[bool]) -> tuple[Iterator[InversionStep], Any]:
    """A search whose states say which look they are at, and what is seen there."""
    steps = (InversionStep(i, Told(torch.full((1, 1, 1), float(i))), 0.0) for i in range(1, len(seen) + 1))

    def shows(states: Told) -> NDArray[np.bool_]:
        return np.array(seen[int(states.states) - 1])

    return steps, shows


def _curve(search: Iterator[InversionStep], shows: Any, stops: list[int]) -> tuple[Curve, int]:
    running, taken = success_curve(search, shows, stops), 0
    while True:
        try:
            next(running)
            taken += 1
        except StopIteration as end:
            return end.value, taken


def test_a_picture_counts_from_the_first_look_that_shows_it() -> None:
    curve, taken = _curve(*_looks([True, False, False], [False] * 3, [False, True, False]), [1, 3])
    assert curve == Curve((1, 3), (1, 2), 3)
    assert taken == 3


def test_a_search_ends_when_every_picture_has_shown_it() -> None:
    curve, taken = _curve(*_looks([True, False], [False, True], [False, False]), [1, 2, 3])
    assert curve == Curve((1, 2, 3), (1, 2, 2), 2)
    assert taken == 2


def test_a_search_that_ends_before_its_last_look_is_refused() -> None:
    with pytest.raises(DataError, match="looked at after 1, 5 steps"):
        _curve(*_looks([False], [False]), [1, 5])
