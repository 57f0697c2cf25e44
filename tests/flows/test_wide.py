"""The wide benchmark: its prompts, its figures against ones counted by hand, and the command on a tiny base."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from fade.concepts import Concept, caption
from fade.data.catalog import load_concepts
from fade.errors import ConfigError, DataError
from fade.evaluation.wide import PARTS, wide_figures, wide_protocol, wide_scatter
from fade.files import write_json
from fade.studies.trial import JUDGED_BY
from flows.cli.app import app
from flows.studies.wide import drawn_concepts, plan_wide, wide_table
from tests.tiny import PROJECT

NAMES = (["cat", "dog", "cow", "hen", "owl"], ["photo", "ink", "oil", "wax"])
CAT, DOG, INK = Concept("cat", "object"), Concept("dog", "object"), Concept("ink", "style")


def test_the_concepts_prompts_are_drawn_whole_and_every_other_object_in_two_styles() -> None:
    parts = wide_protocol(CAT, DOG, ["cow"], NAMES, [1, 2, 3])
    assert tuple(parts) == PARTS
    assert len(parts["concept"]) == len(parts["surrogate"]) == 4 * 3
    assert set(parts["surrogate"]["object"]) == {"dog"}
    assert len(parts["neighbours"]) == 4
    rest = parts["rest"]
    assert "cat" not in set(rest["object"])
    assert rest.groupby("object")["style"].nunique().eq(2).all()
    assert rest.duplicated(["object", "style"]).sum() == 0
    assert rest["prompt"].tolist() == [caption(o, s) for o, s in zip(rest["object"], rest["style"], strict=True)]
    # What is asked of others is the same for every concept, but for its own prompts.
    other = wide_protocol(DOG, CAT, [], NAMES, [1, 2, 3])["rest"]
    both = ["object", "style", "seed"]
    assert len(other.merge(rest, on=both)) == len(rest[rest["object"] != "dog"])
    style = wide_protocol(INK, None, ["oil"], NAMES, [1, 2, 3])
    assert len(style["concept"]) == len(style["neighbours"]) == 5
    assert style["surrogate"].empty
    assert "ink" not in set(style["rest"]["style"])
    with pytest.raises(DataError, match="needs a seed"):
        wide_protocol(CAT, DOG, [], NAMES, [])


def _seen(part: pd.DataFrame, objects: list[str], styles: list[str] | None = None) -> pd.DataFrame:
    return part.assign(seen_object=objects, seen_style=styles if styles is not None else part["style"])


def test_the_figures_are_those_counted_by_hand() -> None:
    parts = wide_protocol(CAT, DOG, ["cow"], NAMES, [1])
    rest = len(parts["rest"])
    right = {name: _seen(part, part["object"].tolist()) for name, part in parts.items()}
    # Of the surrogate's own pictures one in four is called a cat: more than three in four nobody can reach.
    before = {**right, "surrogate": _seen(parts["surrogate"], ["dog", "dog", "hen", "cat"])}
    after = {
        "concept": _seen(parts["concept"], ["dog", "dog", "cat", "scrambled"]),
        "surrogate": before["surrogate"],
        "neighbours": _seen(parts["neighbours"], ["cow", "cow", "cow", "dog"]),
        "rest": _seen(parts["rest"], ["owl", *parts["rest"]["object"][1:]], ["?", *parts["rest"]["style"][1:]]),
    }
    pictures = (np.zeros((rest, 2, 2, 3), np.uint8), np.full((rest, 2, 2, 3), 51, np.uint8))
    row = wide_figures(before, after, pictures, CAT, DOG)
    assert row["ua"] == 3 / 4
    assert row["base_ua"] == 0
    assert row["reachable_ua"] == 3 / 4
    assert row["surrogate_share"] == row["reachable_surrogate"] == 2 / 4
    assert (row["mush"], row["base_mush"]) == (1 / 4, 0)
    assert (row["neighbours"], row["base_neighbours"]) == (3 / 4, 1)
    assert row["ira"] == row["cra"] == (rest - 1) / rest
    assert row["base_ira"] == row["base_cra"] == 1
    assert row["drift"] == pytest.approx(0.2)
    assert row["harmonic"] == pytest.approx(3 / (1 / row["ua"] + 1 / row["ira"] + 1 / row["cra"]))
    nothing = wide_figures({**before, "surrogate": before["surrogate"][:0]}, after, pictures, CAT, None)
    assert not {"reachable_ua", "surrogate_share"} & set(nothing)
    table = wide_table([{"method": "a", **row}, {"method": "a", **row, "ua": 0.5}, {"method": "b", **nothing}])
    first = table.set_index("method").loc["a"]
    assert first["ua"] == pytest.approx(0.625)
    assert first["worst_ua_of_reachable"] == pytest.approx(0.5 / 0.75)
    panels = wide_scatter([{"method": "a", **row}, {"method": "b", **row}]).axes
    assert [tuple(panels[0].collections[1].get_offsets()[0])] == [pytest.approx((-25.0, 1.0))]
    assert len(panels) == 4


def test_concepts_are_drawn_alike_each_time_and_a_wrong_plan_is_refused(workspace: Path) -> None:
    drawn = drawn_concepts(PROJECT, 3, seed=0)
    assert drawn == drawn_concepts(PROJECT, 3, seed=0) != drawn_concepts(PROJECT, 3, seed=1)
    assert "astronaut" not in drawn_concepts(PROJECT, 13, seed=0), "persons are left out"
    with pytest.raises(ConfigError, match="has 13"):
        drawn_concepts(PROJECT, 14, seed=0)
    with pytest.raises(ConfigError, match="given twice"):
        plan_wide(PROJECT, ["ours", "fade"], ["cat:horse"], changes={})
    with pytest.raises(ConfigError, match="Did you mean 'uce'"):
        plan_wide(PROJECT, ["uces"], ["cat:horse"], changes={})
    for given in ([], ["--concepts", "cat", "--random", "2"]):
        result = CliRunner().invoke(app, ["benchmark", "wide", *given])
        assert result.exit_code != 0
        assert "either --concepts" in result.output


def test_all_methods_get_the_surrogate_that_ours_finds(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (nearest,) = plan_wide(PROJECT, ["uce"], ["cat"], changes={})
    found = load_concepts(Path(PROJECT.catalog))["motorcycle"]
    assert nearest.spec.surrogate != found.name
    monkeypatch.setattr("fade.asking.prepare.surrogate_by_pictures", lambda *_, **__: (found, "it differs"))
    entries = plan_wide(PROJECT, ["uce", "ours"], ["cat", "horse:coins"], changes={"settings": "auto"})
    assert [(one.method, one.spec.surrogate) for one in entries] == [
        *(("uce", name) for name in (found.name, "coins")),
        *(("ours", name) for name in (found.name, "coins")),
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_command_writes_a_row_for_each_erasure_and_finds_what_it_has_done(workspace: Path, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    asked = ["benchmark", "wide", "--concepts", "cat:horse", "--methods", "fade-closed-form"]
    result = CliRunner().invoke(app, [*asked, "--json", str(file)])
    assert result.exit_code == 0, result.output
    rows = json.loads(file.read_text())["rows"]
    assert [(row["method"], row["concept"], row["surrogate"]) for row in rows] == [
        ("fade-closed-form", "cat", "horse"),
    ]
    wanted = {"ua", "ira", "cra", "drift", "surrogate_share", "mush", "base_mush", "reachable_ua", "neighbours"}
    wanted |= {"base_neighbours", "tries", "method_seconds", "adapter_bytes", "harmonic"}
    assert all(wanted <= set(row) for row in rows)
    made = {path: path.stat().st_mtime_ns for path in Path("data/trials/wide").glob("*/adapter/*.safetensors")}
    assert len(made) == 1
    assert CliRunner().invoke(app, asked).exit_code == 0
    assert made == {path: path.stat().st_mtime_ns for path in Path("data/trials/wide").glob("*/adapter/*.safetensors")}
    # A row that other code judged is judged again, by the adapter that is there.
    (row,) = Path("data/trials/wide").glob("*/wide.json")
    write_json(row, {"ua": -1})
    write_json(row.parent / JUDGED_BY, {"code": "another"})
    assert CliRunner().invoke(app, [*asked, "--json", str(file)]).exit_code == 0
    assert json.loads(file.read_text())["rows"] == rows
    assert made == {path: path.stat().st_mtime_ns for path in Path("data/trials/wide").glob("*/adapter/*.safetensors")}
