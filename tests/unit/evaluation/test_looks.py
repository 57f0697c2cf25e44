"""Looks and points: what few pictures say of an erasure, and which of those tried is taken."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from fade.asking.surrogate import Candidate, chosen
from fade.concepts import Concept
from fade.evaluation.looks import Look, look_samples, looked
from fade.evaluation.points import Controls, Point, Points, best_of, points_figure
from fade.evaluation.records import as_json, parse
from fade.steps.tune import moved

NAMES = {"object": ["cat", "dog", "cow", "hen", "pig"], "style": ["oil", "neon", "photo"]}
CAT = Concept("cat", "object")
GOOD = {
    **{"erased": 24, "shown": 0, "mush": 0, "base_mush": 0, "surrogate": 24},
    **{"reached": 24, "reached_shown": 0, "reached_mush": 0, "reached_surrogate": 24},
    **{"near": 24, "base_near": 24, "near_lost": 0, "near_gained": 0},
    **{"rest": 96, "base_rest": 96, "rest_lost": 0, "rest_gained": 0, "drift": 0.0},
}


def _look(**changes: Any) -> Look:
    return Look(**{**GOOD, **changes})


def _controls(**changes: Any) -> Controls:
    plain = {"forget_weight": 1.0, "retain_weight": 1.0, "surrogate_share": 0.5, "timesteps": "power"}
    return Controls(**{"made": "distilled", "rank": 2, "solved_weight": 3.0, "steps": 60, **plain, **changes})


@pytest.mark.parametrize(
    ("changes", "faults"),
    [
        ({}, ()),
        ({"shown": 1}, ("shows",)),
        ({"surrogate": 21}, ("surrogate",)),
        ({"mush": 1}, ("mush",)),
        ({"near_lost": 3}, ("near",)),
        ({"near_lost": 1}, ()),
        ({"rest_lost": 3}, ("rest",)),
        ({"rest_lost": 5, "rest_gained": 5}, ()),
        # What the base's own pictures of the surrogate do not reach is not asked.
        ({"shown": 2, "reached_shown": 2}, ()),
        ({"mush": 5, "base_mush": 5}, ()),
        ({"mush": 5, "reached_mush": 5}, ()),
        ({"surrogate": 18, "reached_surrogate": 20}, ()),
        ({"surrogate": None, "reached": 0, "reached_surrogate": 0}, ()),
    ],
)
def test_a_fault_is_what_few_pictures_can_say(changes: dict[str, Any], faults: tuple[str, ...]) -> None:
    assert _look(**changes).faults == faults


def test_the_score_is_the_harmonic_mean_of_what_was_reached_less_drift() -> None:
    assert _look().score == 1.0
    assert _look(drift=0.04).score == pytest.approx(0.96)
    half = _look(shown=12)
    assert half.score == pytest.approx(5 / (1 / 0.5 + 4))
    assert _look(shown=24, drift=0.02).score == pytest.approx(-0.02)
    assert _look(shown=2, reached_shown=2).score == 1.0


def test_a_look_counts_what_the_judge_saw_against_the_base() -> None:
    samples = look_samples(CAT, "dog", NAMES, ["cow"], count=6, seeds=(1, 2))
    parts = samples["part"].value_counts().to_dict()
    assert parts == {"erased": 6, "near": 6, "rest": 6, "surrogate": 6}
    assert set(samples[samples["part"] == "rest"]["object"]) <= {"dog", "hen", "pig"}
    own, instead = (samples[samples["part"] == part] for part in ("erased", "surrogate"))
    assert own[["style", "seed"]].to_numpy().tolist() == instead[["style", "seed"]].to_numpy().tolist()
    assert len(own.drop_duplicates(["style", "seed"])) == 6
    assert instead["prompt"].str.contains("dog").all()

    right = samples.assign(seen_object=samples["object"], seen_style=samples["style"])
    mine = right[right["part"] != "surrogate"].copy()
    mine.loc[mine["part"] == "erased", "seen_object"] = ["cat", "scrambled", "dog", "dog", "dog", "dog"]
    mine.loc[mine.index[mine["part"] == "near"][0], "seen_object"] = "cat"
    mine.loc[mine.index[mine["part"] == "rest"][0], "seen_style"] = "scrambled"
    before = np.zeros((len(mine), 4, 4, 3), np.uint8)
    found = looked(right, mine, (before, before + 51), concept=CAT, surrogate="dog")
    assert (found.shown, found.mush, found.surrogate, found.erased) == (1, 1, 4, 6)
    assert (found.reached, found.reached_surrogate, found.reached_shown) == (6, 6, 0)
    assert (found.near, found.near_lost, found.rest, found.rest_lost, found.base_rest) == (6, 1, 24, 2, 24)
    assert found.drift == pytest.approx(0.2)


def test_a_short_look_asks_the_concepts_prompts_alone_and_stands_below_a_whole_one() -> None:
    samples = look_samples(CAT, "dog", NAMES, ["cow"], count=6, seeds=(1, 2))
    right = samples.assign(seen_object=samples["object"], seen_style=samples["style"])
    mine = right[right["part"] == "erased"]
    pictures = np.zeros((len(mine), 4, 4, 3), np.uint8)
    short = looked(right, mine, (pictures, pictures), concept=CAT, surrogate="dog")
    assert (short.shown, short.near, short.rest, short.drift, short.whole) == (6, 0, 0, None, False)
    assert "shows" in short.faults
    assert parse(Look, json.dumps(as_json(short)), "here") == short  # what was not looked at is left out of the file
    short, whole = _point(_look(shown=1, near=0, rest=0, base_near=0, base_rest=0, drift=None)), _point(shown=9)
    assert short.score > whole.score
    assert best_of([short, whole])[0] == 1
    assert best_of([short])[0] == 0
    assert len(points_figure(Points(tried=(short, whole), chosen=1, why="so", seeds=(1,))).axes) == 2


def _point(look: Look | None = None, **changes: Any) -> Point:
    look = look or _look(**changes)
    return Point(controls=_controls(), look=look, score=look.score, faults=look.faults, adapter_bytes=9)


def test_without_a_fault_the_least_drift_is_taken_and_else_the_highest_score() -> None:
    tried = [_point(shown=20), _point(shown=2), _point(drift=0.2), _point()]
    assert best_of(tried)[0] == 3
    assert best_of(tried[:3])[0] == 2
    assert best_of(tried[:2]) == (1, "the highest score of 2, in all of which the pictures show a fault (here: shows)")
    points = Points(tried=tuple(tried), chosen=2, why="so", seeds=(1,))
    assert len(points_figure(points).axes) == 2


def test_a_single_point_is_drawn_as_bars() -> None:
    figure = points_figure(Points(tried=(_point(shown=6, drift=0.02),), chosen=0, why="so", seeds=(1,)))
    (axes,) = figure.axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[:2] == ["concept gone", "surrogate shown"]
    assert [bar.get_width() for bar in axes.patches][:2] == [0.75, 1.0]
    assert "drift 0.020" in axes.get_title()
    assert axes.get_legend() is None


def test_controls_move_as_the_pictures_say() -> None:
    start = _controls()
    assert moved(start, ["shows"]).forget_weight == 2.0
    assert moved(start, ["near", "shows"]).retain_weight == 2.0
    assert moved(start, ["near", "shows"]).forget_weight == 1.0
    assert moved(_controls(retain_weight=8.0), ["rest"]).retain_weight == 8.0
    more = moved(start, ["mush"])
    assert (more.surrogate_share, more.timesteps) == (0.75, "power")
    assert moved(more, ["mush"]).timesteps == "disagreement"


def test_a_surrogate_is_one_that_is_told_from_the_concept() -> None:
    def candidate(name: str, own: int, taken: int, apart: float, mush: int = 0) -> Candidate:
        return Candidate(Concept(name, "object"), own=own, taken=taken, mush=mush, count=16, apart=apart)

    near, far = candidate("near", 16, 0, 0.2), candidate("far", 16, 0, 0.3)
    assert chosen([near, far])[0].name == "near"  # nearest in text, if its pictures are as good
    alike = candidate("alike", 12, 4, 0.2)
    assert chosen([alike, near, far])[0].name == "near"  # what is taken for the concept stays it
    assert chosen([candidate("mush", 5, 0, 0.2), near])[0].name == "near"  # what the base cannot draw
    assert chosen([candidate("twin", 16, 0, 0.05), near, far])[0].name == "near"  # what looks alike stays alike
    # As well told but for a picture that is taken for the concept: it would count as not erased.
    assert chosen([candidate("once", 16, 1, 0.2), far])[0].name == "far"
    taken, why = chosen([alike, far])
    assert taken.name == "far"
    assert why.startswith("of the 2 nearest in text the second, the first that is told apart and differs enough: of 16")
    assert "far" not in why
