from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch

from fade.concepts import Concept
from fade.config import Gate
from fade.data.canvas import OBJECTS, render_all
from fade.data.styles import STYLES
from fade.errors import DataError
from fade.evaluation.accuracy import (
    canvas_protocol,
    domain_accuracy,
    drift,
    scrambled_rate,
    summary,
    surrogate_rate,
    unlearn_accuracy,
)
from fade.evaluation.damage import shuffle_patches
from fade.evaluation.figures import JudgeFigures, rate
from fade.evaluation.gate import verdict
from fade.evaluation.judges import judge_pictures, load_judge
from fade.lineage import ROOT
from fade.models.latents import to_tensor
from tests.figures import judged_figures

CAT, NEON = Concept("cat", "object"), Concept("neon", "style")


@pytest.fixture
def confusion() -> pd.DataFrame:
    """Hand-made: of 4 cats 3 are forgotten (2 as dogs); of 6 others 5 keep their object, 4 their style."""
    rows = [
        *[("cat", "neon", seen, "neon") for seen in ("dog", "dog", "scrambled", "cat")],
        *[("dog", "neon", "dog", style) for style in ("neon", "neon", "oil")],
        *[("cow", "oil", seen, style) for seen, style in (("cow", "oil"), ("cow", "oil"), ("dog", "scrambled"))],
    ]
    return pd.DataFrame(rows, columns=["object", "style", "seen_object", "seen_style"])


def test_rates_equal_the_hand_counted_ones(confusion: pd.DataFrame) -> None:
    assert unlearn_accuracy(confusion, CAT).value == 3 / 4
    assert domain_accuracy(confusion, [CAT], "object").value == 5 / 6
    assert domain_accuracy(confusion, [CAT], "style").value == 4 / 6
    assert surrogate_rate(confusion, CAT, "dog").value == 2 / 4
    assert scrambled_rate(confusion).value == 2 / 10
    found = summary(confusion, [(CAT, "dog")], ["dog", "cow"])
    assert {name: near.value for name, near in found.neighbours.items()} == {"dog": 1, "cow": 2 / 3}
    assert [found.ua.value, found.ira.value, found.cra.value] == [3 / 4, 5 / 6, 4 / 6]
    assert found.surrogate is not None
    assert found.surrogate.value == 2 / 4


def test_for_an_erased_style_the_domains_change_places(confusion: pd.DataFrame) -> None:
    found = summary(confusion, [(NEON, "oil")], [])
    assert [rate.value for rate in found.rates.values()] == [1 / 7, 2 / 3, 2 / 3]
    assert found.ira == domain_accuracy(confusion, [NEON], "style")


def test_several_concepts_are_pooled_and_the_rest_names_none_of_them(confusion: pd.DataFrame) -> None:
    found = summary(confusion, [(CAT, "dog"), (NEON, "oil")], ["cow"])
    # Of cats 3 of 4, of neon prompts 1 of 7; the rest are the three cows.
    assert found.erased["cat"].ua.value == 3 / 4
    assert found.erased["neon"].ua.value == 1 / 7
    assert found.ua.count == 11
    assert found.ua.value == pytest.approx(4 / 11)
    assert found.ira == found.cra  # both domains have an erased concept
    assert found.ira.value == 4 / 6
    assert found.neighbours["cow"].value == 2 / 3


@pytest.mark.parametrize(("hits", "count"), [(0, 10), (3, 10), (50, 50), (599, 600)])
def test_intervals_equal_wilsons_formula(hits: int, count: int) -> None:
    z, p = 1.959963984540054, hits / count
    centre = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    found = rate(hits, count)
    assert found.value == p
    assert found.low == pytest.approx(max(0.0, centre - half), abs=1e-9)
    assert found.high == pytest.approx(min(1.0, centre + half), abs=1e-9)


def test_a_rate_over_nothing_is_an_error() -> None:
    with pytest.raises(DataError, match="over 0 pictures"):
        rate(0, 0)


def test_drift_is_the_mean_rms_and_zero_only_for_equal_pictures() -> None:
    before = np.zeros((2, 4, 4, 3), np.uint8)
    after = before.copy()
    after[1] = 51
    assert drift(before, before) == 0
    assert drift(before, after) == pytest.approx(0.1)
    with pytest.raises(DataError, match="equal, non-empty"):
        drift(before, after[:1])


def test_the_protocol_has_every_pair_with_every_seed() -> None:
    protocol = canvas_protocol(["cat", "dog"], ["neon", "oil", "photo"], [188, 288])
    assert len(protocol) == 12
    assert not protocol.duplicated().any()
    assert protocol["prompt"][0] == "a cat image in neon style."


def _figures(ira: int, cra: int, *ua: int) -> JudgeFigures:
    """Of 100 pictures each; the base has 100 of the erased concepts' domain right and 99 of the other one."""
    erased = {f"concept {i}": (100, 100 - value, 100) for i, value in enumerate(ua)}
    return judged_figures(erased, ira=(100, ira, 100), cra=(99, cra, 100))


def test_the_gate_names_every_reason() -> None:
    gate = Gate(ua=0.99, ira_loss=0.01, cra_loss=0.01)
    passed = verdict(_figures(99, 98, 99), gate)
    assert (passed.passed, passed.reasons, passed.verdict) == (True, (), "passed")
    failed = verdict(_figures(98, 97, 90), gate)
    assert not failed.passed
    assert [reason.split()[0] for reason in failed.reasons] == ["ua", "ira", "cra"]
    # Of several concepts none may hide behind the others' figures, and none is called by its name.
    (reason,) = verdict(_figures(99, 98, 100, 90, 100), gate).reasons
    assert reason.startswith("ua of concept 2 is 0.9000")


@pytest.mark.parametrize("name", ["development", "report"])
def test_the_shipped_judges_know_fresh_holdout_pictures_and_are_not_fooled_by_patches(name: str) -> None:
    pictures = list(render_all(split="holdout", per_pair=3, seed=991))
    pixels = np.stack([picture.pixels for picture in pictures])
    judge = load_judge(ROOT / "data/judges", name)
    verdict = judge_pictures(judge, pixels)
    assert np.mean([v == p.object for v, p in zip(verdict.objects, pictures, strict=True)]) >= 0.99
    assert np.mean([v == p.style for v, p in zip(verdict.styles, pictures, strict=True)]) >= 0.99
    shuffled = shuffle_patches(to_tensor(pixels), 16, torch.Generator().manual_seed(5))
    control = ((shuffled + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    named = judge_pictures(judge, control)
    assert np.mean([v == p.object for v, p in zip(named.objects, pictures, strict=True)]) <= 0.05


def test_the_two_judges_differ_in_architecture() -> None:
    judges = [load_judge(ROOT / "data/judges", name) for name in ("development", "report")]
    assert judges[0].architecture != judges[1].architecture
    assert judges[0].objects == (*OBJECTS, "scrambled")
    assert judges[0].styles == (*STYLES, "scrambled")


def test_shuffling_moves_patches_and_keeps_their_pixels() -> None:
    pictures = torch.arange(2 * 3 * 8 * 8, dtype=torch.float32).reshape(2, 3, 8, 8)
    shuffled = shuffle_patches(pictures, 4, torch.Generator().manual_seed(1))
    assert not torch.equal(shuffled, pictures)
    assert torch.equal(shuffled.flatten(1).sort().values, pictures.flatten(1).sort().values)


def test_a_missing_judge_is_named(tmp_path: object) -> None:
    with pytest.raises(DataError, match="No judge 'report'"):
        load_judge(tmp_path, "report")  # type: ignore[arg-type]
