"""What an attacker may search, new words before the text encoder or the states behind it, and what is counted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fade.attacks import vocabulary
from fade.attacks.inversion import Curve, invert_concept, invert_words, success_curve
from fade.attacks.vocabulary import PromptSearch, allowed_tokens, exchanges, invert_prompts
from fade.errors import ConfigError, DataError
from fade.models.base import Base
from fade.models.denoiser import weights_sha256
from fade.models.families.stable_diffusion import StableDiffusion
from fade.models.family import load_base
from fade.models.inversion import InversionStep, NewTokens, NoisedBatch
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


def test_a_search_of_prompts_says_words_of_the_vocabulary_and_never_the_concept(base: StableDiffusion) -> None:
    latents = torch.randn(4, *base.denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
    tokenizer = base.pipeline.tokenizer

    def words(without: list[str]) -> set[str]:
        return {tokenizer.decode([one]).strip() for one in allowed_tokens(tokenizer, len(tokenizer), without).tolist()}

    assert len(words([])) < len(tokenizer), "letters are no words"
    assert {"cat", "pop", "art", "horse"} <= words([])
    assert words(["cat", "pop art"]) == words([]) - {"cat", "pop", "art"}
    how: dict[str, Any] = {"template": SENTENCE, "tokens": 2, "restarts": 2, "batch": 8, "without": ["cat"]}
    steps = list(invert_prompts(base, latents, steps=4, precision="fp32", seed=2, **how))
    assert steps[0].prompts != steps[-1].prompts
    # What is written tells the network just what was searched.
    written = base.encode_prompts(steps[-1].prompts)
    torch.testing.assert_close(steps[-1].states.states, written.states)
    for prompt in (one for step in steps for one in step.prompts):
        assert "cat" not in prompt.split()


def test_the_exchange_that_is_made_is_the_best_of_all_that_are_tried(
    base: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = torch.randn(4, *base.denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
    tokenizer = base.pipeline.tokenizer
    few = torch.tensor(tokenizer("horse coffee rocket neon", add_special_tokens=False).input_ids)
    monkeypatch.setattr(vocabulary, "allowed_tokens", lambda *given: few)
    how: dict[str, Any] = {"rows": 2, "count": 2, "precision": "fp32", "candidates": 99, "without": []}
    search = PromptSearch(base, latents, SENTENCE, generator=torch_generator(1, "test"), **how)
    before = search.ids.clone()
    search.step(base.denoiser, batch=6, generator=torch.Generator().manual_seed(6))
    asked = NoisedBatch.drawn(base.denoiser, latents, 6, torch.Generator().manual_seed(6))

    @torch.no_grad()
    def loss(ids: list[int], row: int) -> float:
        rows = torch.arange(row, 6, 2)
        told = base.encode_prompts([SENTENCE.format(tokenizer.decode(ids))]).expand(3)
        return float(asked[rows].errors(base.denoiser, told, "fp32").mean())

    for row in range(2):
        now = before[row].tolist()
        single = [now, *([*now[:at], int(new), *now[at + 1 :]] for at in (0, 1) for new in few)]
        losses = [loss(ids, row) for ids in single]
        assert min(losses) < losses[0]
        assert search.ids[row].tolist() == single[int(np.argmin(losses))]


def test_exchanges_come_in_the_order_of_what_they_promise_and_exchange_one_token() -> None:
    table = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
    ids, gradients = torch.tensor([[0, 2]]), torch.tensor([[[-1.0, 0.0], [0.0, 3.0]]])
    # Of the first token 1 promises 1 and 2 nothing; of the second 0 and 1 promise 3 each. 3 is not allowed.
    found = exchanges(ids, torch.tensor([0, 1, 2]), [gradients], [table], 3)
    assert {tuple(one) for one in found[0, :2].tolist()} == {(0, 0), (0, 1)}
    assert found[0, 2].tolist() == [1, 2]
    # Two CLIPs count together.
    other = exchanges(ids, torch.tensor([0, 1, 2]), [gradients, -9 * gradients.flip(1)], [table, table], 1)
    assert other[0, 0].tolist() == [2, 2]
