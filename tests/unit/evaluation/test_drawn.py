"""The base's pictures: drawn once, and the same whatever they were drawn beside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fade.evaluation.accuracy import canvas_protocol
from fade.models import generate
from fade.models.families.stable_diffusion import StableDiffusion
from fade.models.told import Told
from fade.steps import drawn
from tests.tiny import plain_spec

SAMPLES = canvas_protocol(["cat", "dog", "hen"], ["oil", "neon", "photo"], (1, 2, 3))


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """How many pictures were drawn, part by part, in a project of its own."""
    monkeypatch.chdir(tmp_path)
    found: list[int] = []
    original = generate.generate_from

    def counted(base: StableDiffusion, told: Told, seeds: Sequence[int], **given: Any) -> Any:
        found.append(len(told))
        return original(base, told, seeds, **given)

    monkeypatch.setattr(generate, "generate_from", counted)
    return found


def test_a_picture_is_drawn_once_and_the_same_whatever_it_is_drawn_beside(
    sd: StableDiffusion, draws: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = plain_spec(evaluate={"steps": 2, "batch": 60})
    luck = np.random.default_rng(1)
    first, second = SAMPLES.iloc[luck.permutation(27)[:7]], SAMPLES.iloc[luck.permutation(27)[:20]]
    one, other = (drawn.ended(drawn.base_pictures(sd, spec, part)) for part in (first, second))
    shared = [label for label in first.index if label in second.index]
    assert 0 < len(shared) < 7
    assert draws == [12] * (1 + -(-(20 - len(shared)) // 12))  # of the second only what the first had not
    whole = drawn.ended(drawn.base_pictures(sd, spec, SAMPLES))
    known = len(draws)
    assert len({picture.tobytes() for picture in whole}) == 27
    np.testing.assert_array_equal(one, whole[first.index])
    np.testing.assert_array_equal(other, whole[second.index])
    again = drawn.ended(drawn.base_pictures(sd, spec, SAMPLES))
    assert len(draws) == known
    # In a project where nothing was drawn, all at once: the same bytes.
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    np.testing.assert_array_equal(drawn.ended(drawn.base_pictures(sd, spec, SAMPLES)), again)
    assert draws[known:] == [12, 12, 12]


def test_who_is_stopped_goes_on_from_the_last_pictures_that_were_drawn(sd: StableDiffusion, draws: list[int]) -> None:
    spec = plain_spec(evaluate={"steps": 2})
    stopped = drawn.base_pictures(sd, spec, SAMPLES)
    assert [next(stopped), next(stopped)] == [(12, 54), (24, 54)]
    stopped.close()
    begun = len(draws)
    again = drawn.base_pictures(sd, spec, SAMPLES)
    assert list(again) == [(3, 6)], "of 27 the first 24 were kept"
    assert draws[begun:] == [12]


def test_other_settings_are_other_pictures(sd: StableDiffusion, draws: list[int]) -> None:
    few = SAMPLES.iloc[:2]
    two, three = (drawn.ended(drawn.base_pictures(sd, plain_spec(evaluate={"steps": steps}), few)) for steps in (2, 3))
    assert draws == [12, 12]
    assert (two != three).any()


def test_large_pictures_are_drawn_alone_so_that_none_is_drawn_to_fill_up(
    sd: StableDiffusion, draws: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [generate.together(side) for side in (64, 128, 256, 512, 1024)] == [12, 12, 4, 1, 1]
    monkeypatch.setattr(generate, "TOGETHER_PIXELS", sd.picture_size**2)
    assert len(drawn.ended(drawn.base_pictures(sd, plain_spec(evaluate={"steps": 2}), SAMPLES.iloc[:3]))) == 3
    assert draws == [1, 1, 1]
