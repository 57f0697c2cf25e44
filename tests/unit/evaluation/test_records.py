"""Records: what is written is what is read, byte for byte, whatever the figures; what is no record is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from fade.config import Gate, GateBounds
from fade.errors import ConfigError
from fade.evaluation.attacked import Attack, AttackRun, Attacks, Part, Shown
from fade.evaluation.figures import BaseReport, JudgeFigures, JudgesReport, Rate, rate
from fade.evaluation.measured import ClipScores, Combination, Evaluation, FeatureDistances
from fade.evaluation.records import as_json, dump, load, parse
from fade.lineage import ROOT
from tests.figures import evaluation, judged_figures

SHARES = st.floats(0, 1)
NAMES = st.text(min_size=1, max_size=8)


@st.composite
def rates(draw: st.DrawFn) -> Rate:
    count = draw(st.integers(1, 5000))
    return rate(draw(st.integers(0, count)), count)


@st.composite
def counts(draw: st.DrawFn) -> tuple[int, int, int]:
    count = draw(st.integers(1, 300))
    return draw(st.integers(0, count)), draw(st.integers(0, count)), count


def by_name(values: st.SearchStrategy[tuple[int, int, int]], least: int) -> st.SearchStrategy[dict[str, tuple]]:
    return st.dictionaries(NAMES, values, min_size=least, max_size=3)


@st.composite
def attacks(draw: st.DrawFn) -> Attacks:
    found = draw(st.dictionaries(st.sampled_from(["paraphrase", "relearning", "ä"]), rates()))
    steps = draw(st.none() | st.integers(0, 50))
    return Attacks({name: Attack(**dict(one), base=draw(SHARES), steps_to_half=steps) for name, one in found.items()})


@st.composite
def judged(draw: st.DrawFn) -> JudgeFigures:
    return judged_figures(
        draw(by_name(counts(), 1)),
        ira=draw(counts()),
        cra=draw(counts()),
        neighbours=draw(by_name(counts(), 0)),
        names=draw(by_name(counts(), 0)),
    )


@st.composite
def evaluations(draw: st.DrawFn) -> Evaluation:
    return evaluation(
        draw(judged()),
        gate=draw(st.sampled_from([Gate(), Gate(sure=GateBounds(), attacks={"paraphrase": 0.2})])),
        attacks=draw(attacks()),
        drift=draw(SHARES),
        kid_judge=draw(st.floats(-1e6, 1e6)),
        features=draw(st.none() | st.builds(FeatureDistances, name=NAMES, fid=SHARES, kid=SHARES)),
        clip=draw(st.none() | st.builds(ClipScores, name=NAMES, retained=st.none() | SHARES, erased=SHARES)),
    )


def same_again(record: BaseModel, place: Path) -> None:
    dump(record, place)
    again = load(type(record), place)
    assert again == record
    first = place.read_bytes()
    dump(again, place)
    assert place.read_bytes() == first


ROUNDS = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


@ROUNDS
@given(evaluations())
def test_an_evaluation_is_read_as_it_was_written(tmp_path: Path, found: Evaluation) -> None:
    same_again(found, tmp_path / "metrics.json")
    together = {name: value for name, value in dict(found).items() if name in Combination.model_fields}
    same_again(Combination(**together, adapters={"e1": "a", "e0": "b"}), tmp_path / "metrics.json")


@ROUNDS
@given(attacks(), rates(), rates(), st.none() | st.floats(0, 9))
def test_attacks_are_read_as_they_were_written(
    tmp_path: Path, found: Attacks, base: Rate, erased: Rate, loss: float | None
) -> None:
    same_again(found, tmp_path / "attacked.json")
    shown = [Shown(development=one, report=one, loss=loss) for one in (base, erased)]
    by = {"0.4": Part(base=shown[0], erased=shown[1]), "none": Part(asked=0, reason="no other name")}
    same_again(AttackRun(settings={"seed": None}, base=shown[0], erased=shown[1], by=by), tmp_path / "run.json")


def test_a_record_is_not_changed_and_made_of_nothing_but_figures() -> None:
    found = rate(3, 7)
    with pytest.raises(ValidationError, match="frozen"):
        found.count = 8  # type: ignore[misc]
    for wrong in ({"value": "1.0"}, {"count": True}, {"low": float("nan")}, {"another": 1.0}):
        with pytest.raises(ValidationError):
            Rate(**{**dict(found), **wrong})


def test_the_shipped_figures_are_read_and_written_to_the_same_bytes(tmp_path: Path) -> None:
    for kind, name in ((BaseReport, "base/report"), (JudgesReport, "judges")):
        path = ROOT / "data" / name / "metrics.json"
        dump(load(kind, path), tmp_path / "again.json")
        assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_rates_in_the_shipped_results_are_rates_of_their_counts() -> None:
    seen = 0
    for path in sorted((ROOT / "benchmarks/results").glob("*.json")):
        for row in json.loads(path.read_text()).get("rows", []):
            for name in (one.removesuffix("_count") for one in row if one.endswith("_count")):
                parts = {part: row[f"{name}_{part}"] for part in ("low", "high", "count")}
                Rate(value=row[name], **parts)
                seen += 1
    assert seen > 100


def test_what_is_missing_or_no_json_says_where_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Missing file .*none\.json: expected figures there"):
        load(Evaluation, tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"samples": 1')
    with pytest.raises(ConfigError, match=r"half\.json is not JSON"):
        load(Evaluation, tmp_path / "half.json")
    with pytest.raises(ConfigError, match="value is nothing, expected a figure"):
        parse(Rate, "{}", "a file")
    assert "attacks" not in as_json(evaluation(judged_figures({"it": (5, 0, 5)}), gate=Gate()))
