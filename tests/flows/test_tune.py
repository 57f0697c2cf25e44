"""An erasure that finds its own settings: its points, which is taken, another one by a person; when it does not."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from fade import pipeline
from fade.adapters.card import load_card
from fade.asking.prepare import prepare_spec
from fade.config import load_settings
from fade.errors import ConfigError
from fade.evaluation.looks import Look
from fade.evaluation.measured import Evaluation
from fade.evaluation.points import Points
from fade.evaluation.records import load
from fade.files import read_json, sha256_file, write_json
from fade.spec import Spec, load_spec
from fade.steps.drawn import look_seeds
from flows.erasing.erase import prepare_folder
from flows.erasing.points import other_point
from tasks.dvc import versioning
from tests.tiny import PROJECT
from tests.unit.evaluation.test_looks import GOOD

AUTO = {"settings": "auto", "tune.steps": [2, 3], "tune.pictures": 4, "tune.solver_steps": 1, "tune.tries": 4}
WEIGHTS = "pytorch_lora_weights.safetensors"


def _asked(**changes: Any) -> Spec:
    settings = load_settings(PROJECT.params, changes={**AUTO, **changes})
    return prepare_spec("astronaut", "cameraman", project=PROJECT, settings=settings)


def _run(spec: Spec, folder: Path, *names: str) -> None:
    for step in pipeline.steps_of(spec):
        if not names or step.name in names:
            for _ in pipeline.run(step, folder):
                pass


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks that say: the concept shows, by the nearer closed form others move, then neighbours moved, then nothing."""
    said = [{"shown": 9}, {"rest_lost": 9}, {"near_lost": 9, "drift": 0.5}, {}]
    looks = iter([*said, *said])
    monkeypatch.setattr("fade.steps.tune.Looking.look", lambda _, short=False: Look(**{**GOOD, **next(looks)}))


@pytest.mark.usefixtures("workspace", "faulty")
def test_points_are_tried_until_one_has_no_fault_and_equal_requests_give_equal_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fade.steps.tune.LEAST_RETAINED", 0.0)
    spec = _asked(**{"distill.seed": 5})
    assert not spec.why_fixed
    assert [step.name for step in pipeline.steps_of(spec)][-3:] == ["tune", "choose", "evaluate"]
    folder = prepare_folder(spec)
    _run(spec, folder, "split", "saliency", "mask", "tune", "choose")
    points = load(Points, folder / "points" / "points.json")
    assert [one.controls.made for one in points.tried] == ["solved", "solved", "distilled", "distilled"]
    assert [one.controls.steps for one in points.tried] == [0, 0, 2, 3]
    far, nearer = (one.controls.solved_weight for one in points.tried[:2])
    assert nearer > far > 0
    assert [one.controls.retain_weight for one in points.tried[2:]] == [2.0, 4.0]  # others had moved, then neighbours
    assert points.chosen == 3
    assert not set(points.seeds) & set(spec.evaluate.seeds)
    card = load_card(folder / "adapter")
    assert (card["point"], card["tries"], card["settings"], card["steps"]) == (3, 4, "auto", 3)
    hashes = [sha256_file(folder / "points" / str(number) / WEIGHTS) for number in range(4)]
    assert len(set(hashes)) == 4
    assert sha256_file(folder / "adapter" / WEIGHTS) == hashes[3]
    assert len((folder / "curve.csv").read_text().splitlines()) == 1 + 3
    again = {path: path.read_bytes() for path in sorted((folder / "points").rglob("*")) if path.is_file()}
    _run(spec, folder, "tune")
    assert {path: path.read_bytes() for path in sorted((folder / "points").rglob("*")) if path.is_file()} == again


@pytest.mark.parametrize(
    ("said", "tried", "chosen"),
    [
        ([{"drift": 0.02}], 1, 0),  # it goes far and costs next to nothing
        ([{"surrogate": 23, "drift": 0.01}, {"drift": 0.02}], 2, 1),  # and on, while less is reached than can be
        ([{"mush": 1, "reached_mush": 2, "drift": 0.01}], 1, 0),
        ([{"surrogate": 23, "drift": 0.01}, {"drift": 0.03}], 2, 0),  # where it is free
        ([{"surrogate": 23, "drift": 0.01}, {"surrogate": 22, "reached_surrogate": 23, "drift": 0.01}] * 2, 3, 0),
        ([{"drift": 0.03}, {"drift": 0.01}], 2, 1),
        ([{"drift": 0.03}, {"shown": 9}, {"drift": 0.02}], 3, 2),
        ([{"drift": 0.03}, {"shown": 9}, {"shown": 9}], 3, 0),  # nearer is too near: what it costs is paid
        ([{"rest_lost": 9, "drift": 0.03}, {"drift": 0.01}], 2, 1),
    ],
)
@pytest.mark.usefixtures("workspace")
def test_a_closed_form_goes_as_far_as_it_costs_nothing_and_no_further_than_it_must(
    said: list[dict[str, Any]], tried: int, chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fade.steps.tune.LEAST_RETAINED", 0.0)
    looks = iter(said)
    monkeypatch.setattr("fade.steps.tune.Looking.look", lambda _, short=False: Look(**{**GOOD, **next(looks)}))
    spec = _asked(**{"distill.seed": 7})
    folder = prepare_folder(spec)
    _run(spec, folder, "split", "saliency", "mask", "tune")
    points = load(Points, folder / "points" / "points.json")
    assert [one.controls.made for one in points.tried] == ["solved"] * tried
    assert points.chosen == chosen
    weights = [one.controls.solved_weight for one in points.tried]
    if points.tried[0].free:
        assert weights == sorted(weights, reverse=True)
    else:
        assert weights[0] == min(weights)
        assert weights[1:] == sorted(weights[1:], reverse=True)


@pytest.mark.usefixtures("workspace")
def test_a_person_takes_another_point_and_nothing_is_trained_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = {"ua": 0.0, "ira_loss": 1.0, "cra_loss": 1.0, "neighbours_loss": 1.0, "surrogate": 0.0, "mush": 1.0}
    spec = _asked(**{"gate.sure": {**bounds, "most": 1}, "tune.steps": [1]})
    with pytest.raises(ConfigError, match="has not been run"):
        other_point(spec, 0)
    with monkeypatch.context() as patched:
        looks = iter([{"shown": 9, "rest_lost": 9}, {}])
        patched.setattr("fade.steps.tune.Looking.look", lambda _, short=False: Look(**{**GOOD, **next(looks)}))
        origin = prepare_folder(spec)
        for step in pipeline.steps_of(spec)[:-1]:
            _run(spec, origin, step.name)
            versioning.record(origin, step.name)
    write_json(origin / pipeline.TIMINGS, {"tune": {"seconds": 1.0, "peak_mib": 2.0}})
    with pytest.raises(ConfigError, match="No point 7 was tried: there are 0 to 1"):
        other_point(spec, 7)
    other = other_point(spec, 0)
    folder = Path("data/erasures") / other.id
    assert other.id != spec.id
    assert other.gate.sure is not None
    assert other.gate.sure.error_rate == pytest.approx(0.05 / 2)
    assert load_spec(folder) == other
    assert [one.name for one in pipeline.steps_of(other) if not versioning.is_current(folder, one.name)] == [
        "choose",
        "evaluate",
    ]
    _run(other, folder, "choose", "evaluate")
    assert sha256_file(folder / "adapter" / WEIGHTS) == sha256_file(origin / "points" / "0" / WEIGHTS)
    assert sha256_file(folder / "adapter" / WEIGHTS) != sha256_file(origin / "adapter" / WEIGHTS)
    assert load_card(folder / "adapter")["erasure"] == other.id
    page = (folder / "evaluation" / "report.html").read_text()
    assert "What was tried" in page
    assert "0 (taken): closed form" in page
    assert "as a person chose it" in page
    assert read_json(folder / "timings.json")["tune"] == {"seconds": 1.0, "peak_mib": 2.0}


@pytest.mark.usefixtures("workspace")
def test_a_look_draws_its_own_seeds_and_a_bad_erasure_is_soon_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"tune.tries": 1, "distill.seed": 6, "evaluate.seeds": [188, 288]}
    spec = _asked(**changes, **{"gate.sure": {"most": 2}})
    folder = prepare_folder(spec)
    _run(spec, folder, "split", "saliency", "mask", "tune")
    (one,) = load(Points, folder / "points" / "points.json").tried
    assert (one.look.erased, one.look.reached, one.look.near, one.look.rest) == (4, 4, 4, 16)
    assert 0 < one.look.drift < 1
    assert min(look_seeds(spec)) > 2**30
    # Judged: where the first pictures say that it is surely bad, no more are drawn, and the page is whole.
    _run(spec, folder, "choose")
    monkeypatch.setattr("fade.evaluation.rounds.hopeless", lambda *_: True)
    _run(spec, folder, "evaluate")
    found = load(Evaluation, folder / "evaluation" / "metrics.json")
    assert 8 + 12 <= found.samples < 32  # of 96: the concept's own, and a few of the rest
    assert (folder / "evaluation" / "sheet.png").is_file()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"settings": "fixed"}, "is asked for"),
        ({"distill.steps": 3}, "is asked for"),  # whoever gives one gives all
        ({"mask.density": 0.5}, "is asked for"),
        ({"method": "uce"}, "is asked for"),
        ({"settings": "auto", "method": "uce"}, "the method uce"),
        ({"settings": "auto", "distill.depth": "deep"}, "depth deep"),
        ({"settings": "auto", "mask.granularity": "weight"}, "masks by weight"),
        ({"settings": "auto"}, ""),
        ({"settings": "auto", "distill.seed": 3}, ""),
    ],
)
@pytest.mark.usefixtures("workspace")
def test_settings_that_somebody_gave_stay_as_they_are(changes: dict[str, Any], why: str) -> None:
    found = load_settings(PROJECT.params, changes=changes).why_fixed
    assert why in found
    assert bool(why) == bool(found)


@pytest.mark.parametrize("concept", ["neon", "cat"])
@pytest.mark.parametrize("head", ["object", "style"])
@pytest.mark.usefixtures("workspace")
def test_a_surrogate_whose_own_pictures_are_mush_is_passed_over(
    concept: str, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of its two names the judge gives up: the gate counts both."""
    mush: list[str] = []

    def named(_: Any, pictures: NDArray[np.uint8], samples: pd.DataFrame) -> pd.DataFrame:
        seen = samples.assign(seen_object=samples["object"], seen_style=samples["style"])
        hit = (samples["object"].isin(mush) | samples["style"].isin(mush)) & (np.arange(len(samples)) % 4 == 0)
        return seen.assign(**{f"seen_{head}": seen[f"seen_{head}"].mask(hit, "scrambled")})

    def drawn(*asked: Any) -> Generator[Any, None, NDArray[np.uint8]]:
        yield 0
        return np.random.default_rng(1).integers(0, 256, (len(asked[-1]), 8, 8, 3), dtype=np.uint8)

    monkeypatch.setattr("fade.asking.surrogate.named_by", named)
    monkeypatch.setattr("fade.asking.surrogate.base_pictures", drawn)
    settings = load_settings(PROJECT.params, changes=AUTO)
    nearest = prepare_spec(concept, "auto", project=PROJECT, settings=settings)
    assert "the judge calls 16 by its own name" in nearest.surrogate_why
    mush.append(nearest.pairs[0].surrogate)
    other = prepare_spec(concept, "auto", project=PROJECT, settings=settings)
    assert other.pairs[0].surrogate not in mush
    assert "none mush" in other.surrogate_why
