"""Many concepts at once: the file, what is added and taken out, the benchmark's figures, and the commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from typer.testing import CliRunner

from fade.asking.assigned import assigned
from fade.asking.concepts import MANY, changed, in_order, read_concepts
from fade.asking.interference import interference
from fade.asking.prepare import Wanted
from fade.concepts import Concept
from fade.errors import ConfigError, DataError
from fade.evaluation.many import many_figures, many_protocol
from fade.models.family import load_base
from fade.spec import Pair
from fade.steps.encoded import SplitRows
from fade.studies.trial import TRIALS
from flows.cli.app import app
from flows.erasing.many import settings_for_many, spec_for_many
from flows.studies.many import drawn_together, many_plot, plan_many
from tests.tiny import FEW_STEPS, PROJECT, plain_spec, write_project

NAMES = (["cat", "dog", "cow", "hen", "owl"], ["photo", "ink", "oil", "wax"])
CAT, DOG, COW = (Concept(name, "object") for name in ("cat", "dog", "cow"))
INK, OIL = Concept("ink", "style"), Concept("oil", "style")


def test_a_file_of_concepts_is_read_in_the_order_of_their_names_and_conflicts_are_all_named(tmp_path: Path) -> None:
    file = tmp_path / "many.csv"
    file.write_text("concept,surrogate,aliases\nhen,,\ncat, dog ,kitty|tomcat\nCow,nothing,\n")
    found = read_concepts(file)
    assert [(one.concept, one.surrogate, one.aliases) for one in found] == [
        ("cat", "dog", ("kitty", "tomcat")),
        ("Cow", "nothing", ()),
        ("hen", "auto", ()),
    ]
    table = tmp_path / "many.json"
    table.write_text(json.dumps([{"concept": "hen"}, {"concept": "cat", "surrogate": "dog"}]))
    assert [one.concept for one in read_concepts(table)] == ["cat", "hen"]
    wrong = "concept,surrogate\ncat,dog\nCat,cow\nhen,owl\nowl,cat\n"
    file.write_text(wrong)
    with pytest.raises(ConfigError, match="Cat is there more than once") as error:
        read_concepts(file)
    assert "hen is to give owl" in str(error.value)
    assert "owl is to give cat" in str(error.value)
    for text, said in (
        ("name\ncat\n", "has the column name"),
        ("concept,surrogate\ncat,dog\n,dog\n", "row 2 names no concept"),
        ("concept\n", "names no concept"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=said):
            read_concepts(file)
    with pytest.raises(ConfigError, match="cannot be read as a table"):
        read_concepts(tmp_path / "none.csv")


def test_what_is_added_and_taken_out_is_asked_as_if_from_the_start() -> None:
    pairs = [Pair(concept=name, kind="object", surrogate="owl", aliases=(f"{name}s",)) for name in ("cat", "hen")]
    more = changed(pairs, add=[Wanted("dog", "cow")])
    assert [one.concept for one in more] == ["cat", "dog", "hen"]
    assert changed(pairs, without=["Hens"]) == changed(pairs[:1])
    assert in_order(reversed(more)) == more
    for options, said in (
        ({"without": ["fox"]}, "no concept fox"),
        ({"without": ["cat", "hen"]}, "Nothing would be left"),
        ({"add": [Wanted("owl", "dog")]}, "which is erased itself"),
    ):
        with pytest.raises(ConfigError, match=said):
            changed(pairs, **options)  # type: ignore[arg-type]


def test_erased_objects_are_asked_for_in_kept_styles_and_everything_kept_takes_turns() -> None:
    parts = many_protocol([(CAT, COW), (DOG, None)], NAMES, [1], neighbours=frozenset({"hen"}))
    assert parts["erased"].groupby("concept").size().to_dict() == {"cat": 4, "dog": 4}
    assert set(parts["instead"]["object"]) == {"cow"}, "nothing has no prompts"
    assert set(parts["instead"]["concept"]) == {"cat"}
    assert set(parts["kept"]["concept"]) == {"cow", "hen", "owl"}
    assert set(parts["kept"][parts["kept"]["near"]]["concept"]) == {"hen"}
    assert not parts["kept"].duplicated(["object", "style", "seed"]).any()
    both = many_protocol([(CAT, COW), (INK, OIL)], NAMES, [1, 2], neighbours=frozenset())
    assert "ink" not in set(both["erased"][both["erased"]["concept"] == "cat"]["style"])
    assert set(both["kept"]["concept"]) == {"dog", "cow", "hen", "owl", "photo", "oil", "wax"}
    many = [(Concept(f"a{number}", "object"), COW) for number in range(100)]
    wide = ([*(one.name for one, _ in many), "cow"], NAMES[1])
    assert many_protocol(many, wide, [1], neighbours=frozenset())["erased"].groupby("concept").size().eq(2).all()
    for pairs, seeds, said in (([], [1], "got 0 and 1"), ([(CAT, COW)], [], "got 1 and 0")):
        with pytest.raises(DataError, match=said):
            many_protocol(pairs, NAMES, seeds, neighbours=frozenset())
    with pytest.raises(DataError, match="Nothing is kept of the kind style"):
        many_protocol([(Concept(name, "style"), None) for name in NAMES[1]], NAMES, [1], neighbours=frozenset())


def _seen(part: pd.DataFrame, objects: list[str]) -> pd.DataFrame:
    return part.assign(seen_object=objects, seen_style=part["style"])


def test_the_figures_of_many_are_those_counted_by_hand() -> None:
    pairs: list[tuple[Concept, Concept | None]] = [(CAT, COW), (DOG, COW)]
    parts = many_protocol(pairs, NAMES, [1], neighbours=frozenset({"hen"}))
    kept, own = len(parts["kept"]), parts["kept"]["object"].tolist()
    before = {
        # Of the surrogate's own pictures in the cat's place one is called a cat.
        "instead": _seen(parts["instead"], ["cat", *["cow"] * 7]),
        "kept": _seen(parts["kept"], own),
    }
    hen = own.index("hen")
    after = {
        "erased": _seen(parts["erased"], ["cow", "cow", "dog", "scrambled", *["dog"] * 4]),
        "kept": _seen(parts["kept"], [*own[:hen], "owl", *own[hen + 1 :]]),
    }
    pictures = (np.zeros((kept, 2, 2, 3), np.uint8), np.full((kept, 2, 2, 3), 51, np.uint8))
    row = many_figures(before, after, pictures, pairs)
    assert row["erased"] == 4 / 8, "a cat that is called a dog is erased, a dog that is called one is not"
    assert row["concepts"] == {"cat": 1.0, "dog": 0.0}
    assert row["reachable"] == 7 / 8
    assert row["reachable_surrogate"] == 7 / 8
    assert (row["surrogate_share"], row["mush"]) == (2 / 8, 1 / 8)
    assert row["kept"] == (kept - 1) / kept
    assert (row["neighbours"], row["others"]) == (3 / 4, 1.0)
    assert row["base_kept"] == row["base_neighbours"] == row["beside"] == row["base_beside"] == 1
    assert row["drift"] == pytest.approx(0.2)
    assert row["moved"] == pytest.approx(dict.fromkeys(("cow", "hen", "owl"), 0.2))
    assert row["harmonic"] == pytest.approx(2 / (1 / row["erased"] + 1 / row["kept"]))
    assert row["erased_low"] < row["erased"] < row["erased_high"]
    rows = [{"method": "a", "at_once": 1, **row}, {"method": "a", "at_once": 2, **row}]
    assert [axes.get_title() for axes in many_plot(rows).axes] == ["erased", "kept", "neighbours kept"]


def test_rows_of_a_split_are_taken_at_shares_of_the_way_and_say_whose_they_are() -> None:
    spec = plain_spec(also=[Pair(concept="oil", kind="style", surrogate="photo")])
    table = pd.DataFrame({"object": ["cat", "cat", "dog", "cow"], "style": ["ink", "oil", "oil", "oil"]})
    rows = SplitRows(None, spec, Path(), table)  # type: ignore[arg-type]
    assert rows.whose() == ["cat", "cat", "oil", "oil"]
    assert rows.at(torch.tensor([0.0, 0.49, 0.99])).table["object"].tolist() == ["cat", "cat", "cow"]


def test_each_gets_the_surrogate_whose_captions_read_most_alike(tiny_base: Path) -> None:
    base = load_base(tiny_base)
    beside = [Concept(name, "style") for name in ("neon", "oil", "mosaic")]
    names = ("horse", "coffee", "rocket", "dog")
    free = [Concept(name, "object") for name in names]
    found = assigned(base, [Concept("cat", "object"), Concept("flower", "object")], free, beside)
    weights = [dict(base.network.named_modules())[name].weight for name in base.denoiser.text_sites()]

    def apart(one: str, other: str) -> float:
        said = [[f"a {name} image in {style.name} style." for style in beside] for name in (one, other)]
        states = [base.encode_prompts(part).states for part in said]
        return sum(float((states[0] @ w.T - states[1] @ w.T).square().sum()) for w in weights)

    for concept in ("cat", "flower"):
        distances = {name: apart(concept, name) for name in names}
        assert found[concept].name == min(distances, key=lambda name: distances[name])
    with pytest.raises(ConfigError, match="every style of the catalog is erased"):
        assigned(base, [Concept("oil", "style")], free, beside)


def test_what_reads_like_the_erased_is_told_to_be_in_danger(tiny_base: Path) -> None:
    base = load_base(tiny_base)
    beside = [Concept(name, "style") for name in ("neon", "oil", "mosaic")]
    kept = [Concept(name, "object") for name in ("dog", "coffee", "rocket")]
    few = interference(base, [(Concept("cat", "object"), Concept("horse", "object"))], kept, beside)
    assert set(few) == {"dog", "coffee", "rocket"}
    assert list(few.values()) == sorted(few.values(), reverse=True)
    # What is retained more is moved less.
    tight = interference(
        base, [(Concept("cat", "object"), Concept("horse", "object"))], kept, beside, retain_weight=1e3
    )
    assert all(tight[name] < few[name] for name in few)


def test_concepts_are_drawn_alike_each_time_and_some_are_kept(workspace: Path) -> None:
    with pytest.raises(ConfigError, match="20 are to be kept"):
        drawn_together(PROJECT, 3, seed=0)
    with pytest.raises(ConfigError, match="given twice"):
        plan_many(PROJECT, ["uce", "uce"], ["cat:horse", "coffee:rocket"], changes={})
    with pytest.raises(ConfigError, match="horse, which is erased itself"):
        plan_many(PROJECT, ["uce"], ["cat:horse", "horse:rocket"], changes={})


def test_no_surrogate_is_erased_and_one_taken_out_leaves_the_spec_that_never_had_it(workspace: Path) -> None:
    settings = settings_for_many(PROJECT, 3, {}, None)
    assert settings.method == MANY == "layerwise-tuned"
    three = spec_for_many([Wanted(n) for n in ("cat", "coffee", "horse")], project=PROJECT, settings=settings)
    erased = {pair.concept for pair in three.pairs}
    assert not erased & {pair.surrogate for pair in three.pairs}
    left = changed(three.pairs, without=["coffee"])
    without = spec_for_many(left, project=PROJECT, settings=settings)
    named = [Wanted(pair.concept, pair.surrogate) for pair in reversed(three.pairs) if pair.concept != "coffee"]
    assert without.id == spec_for_many(in_order(named), project=PROJECT, settings=settings).id != three.id
    own = settings_for_many(PROJECT, 9, {}, "fade")
    assert own.distill.batch == 4 * settings.distill.batch


@pytest.mark.parametrize(("named", "taken"), [("fade", MANY), ("layerwise", "layerwise"), ("esd-x", MANY)])
def test_the_method_that_a_project_names_is_taken_where_it_erases_several(
    workspace: Path, named: str, taken: str
) -> None:
    before = Path("params.yaml").read_text()
    params = yaml.safe_load(before)
    params["erasure"]["method"] = named
    Path("params.yaml").write_text(yaml.safe_dump(params))
    try:
        assert settings_for_many(PROJECT, 3, {}, None).method == taken
    finally:
        Path("params.yaml").write_text(before)  # others share this workspace


def test_the_preview_says_what_is_erased_and_makes_nothing(workspace: Path, tmp_path: Path) -> None:
    table, file = tmp_path / "many.csv", tmp_path / "found.json"
    table.write_text("concept,surrogate\ncat,horse\ncoffee,\n")
    before = set(Path("data/erasures").glob("*"))
    result = CliRunner().invoke(app, ["erase", "--concepts", str(table), "--preview", "--json", str(file)])
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    assert [row["concept"] for row in found["pairs"]] == ["cat", "coffee"]
    assert found["pairs"][0]["surrogate"] == "horse"
    assert found["method"] == MANY
    assert not {"cat", "coffee"} & {row["concept"] for row in found["kept"]}
    assert set(Path("data/erasures").glob("*")) == before
    for given, said in (
        (["--concepts", str(table), "--concept", "cat"], "Name what to erase"),
        ([], "Name what to erase"),
        (["--add", "cat"], "name it, --of ID"),
        (["--concepts", str(table), "--of", "e1"], "not both"),
        (["--concepts", str(table), "--alias", "kitty"], "is about one"),
    ):
        refused = CliRunner().invoke(app, ["erase", *given])
        assert refused.exit_code != 0
        assert said in refused.output


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_taken_out_leaves_the_bits_of_an_adapter_made_without_it(workspace: Path, tmp_path: Path) -> None:
    def erased(*given: str) -> dict[str, str]:
        file = tmp_path / "row.json"
        result = CliRunner().invoke(app, ["erase", *given, "--json", str(file)])
        assert result.exit_code == 0, result.output
        row: dict[str, str] = json.loads(file.read_text())
        return {**row, "erasure": Path(row["folder"]).name}

    write_project(Path("params.yaml"), PROJECT, methods=FEW_STEPS)
    three, two = tmp_path / "three.csv", tmp_path / "two.csv"
    three.write_text("concept,surrogate\ncat,horse\ncoffee,rocket\nflower,rocket\n")
    two.write_text("concept,surrogate\nflower,rocket\ncat,horse\n")
    whole = erased("--concepts", str(three))
    less = erased("--of", whole["erasure"], "--without", "coffee")
    anew = erased("--concepts", str(two))
    assert whole["adapter_sha256"] != less["adapter_sha256"] == anew["adapter_sha256"]
    page = Path("data/erasures", whole["erasure"], "evaluation", "report.html").read_text()
    assert "Each of the 3 concepts" in page


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_benchmark_of_many_writes_the_row_that_is_asked_for(workspace: Path, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    asked = ["benchmark", "wide", "--at-once", "2", "--concepts", "cat:horse,coffee:rocket", "--methods", "layerwise"]
    result = CliRunner().invoke(app, [*asked, "--sequential", "--json", str(file)])
    assert result.exit_code == 0, result.output
    row, stacked = json.loads(file.read_text())["rows"]
    assert (stacked["method"], stacked["adapters"]) == ("layerwise stacked", 2)
    assert stacked["samples"] == row["samples"]
    assert stacked["drift"] != row["drift"]
    adapters = sorted((TRIALS / "many" / stacked["erasure"] / "alone").glob("*/adapter/*.safetensors"))
    assert stacked["adapter_bytes"] == sum(path.stat().st_size for path in adapters) > row["adapter_bytes"]
    wanted = {"erased", "reachable", "kept", "base_kept", "neighbours", "base_neighbours", "harmonic", "drift"}
    wanted |= {"seconds", "cpu_seconds", "adapter_bytes", "method", "at_once", "erased_low", "kept_count"}
    wanted |= {"rank_correlation"}
    assert wanted <= set(row)
    assert 0 < row["cpu_seconds"] < stacked["cpu_seconds"]
    assert (row["method"], row["at_once"]) == ("layerwise", 2)
    # Asked for it alone the file is its row, and nothing is made again.
    assert CliRunner().invoke(app, [*asked, "--json", str(file)]).exit_code == 0
    assert json.loads(file.read_text())["adapter_sha256"] == row["adapter_sha256"]
