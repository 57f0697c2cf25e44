"""What is asked of a concept (its names, what it is, its pictures) reaches the erasure, alone and with others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fade.asking.prepare import Wanted, asked_again, prepare_spec
from fade.config import Gate, GateBounds, load_settings
from fade.data.catalog import given_names, load_catalog, load_concepts
from fade.data.splits import find_pairs
from fade.errors import ConfigError
from fade.evaluation.aliases import alias_figures, alias_samples
from fade.evaluation.figures import JudgeFigures, OfName, rate
from fade.evaluation.gate import verdict
from fade.evaluation.records import as_json, parse
from fade.spec import Spec, save_spec
from fade.steps.split import split
from flows.erasing.erase import asked_together
from flows.erasing.rebase import on_base
from tests.figures import judged_figures
from tests.tiny import PROJECT

CATALOG = Path("data/catalog/canvas")


def _request(concept: str = "cat", surrogate: str = "horse", **asked: Any) -> Spec:
    return prepare_spec(concept, surrogate, project=PROJECT, settings=load_settings(Path("params.yaml")), **asked)


def test_further_names_are_in_the_forget_set(workspace: Path, tmp_path: Path) -> None:
    known = load_concepts(CATALOG)["cat"].aliases
    request = _request(aliases=["Moggy", "CAT", *known])
    assert request.aliases == (*known, "Moggy")  # each once, in any spelling
    assert request.id != _request().id
    assert find_pairs(load_concepts(CATALOG), request.pairs)[0][0].aliases == request.aliases
    save_spec(request, tmp_path)
    split(tmp_path)
    forget, surrogate = (pd.read_parquet(tmp_path / f"splits/{name}.parquet") for name in ("forget", "surrogate"))
    for table in (forget, surrogate):
        said = table["caption"].str.contains("Moggy")
        assert 0 < said.sum() < len(table)
        assert not table[said]["surrogate_caption"].str.contains("Moggy").any()


def test_a_name_that_the_catalog_does_not_know_is_found_by_its_aliases(workspace: Path) -> None:
    request = _request("Felis", aliases=["cat"])
    assert (request.concept, request.aliases[-1]) == ("cat", "Felis")
    with pytest.raises(ConfigError, match="Unknown concept"):
        _request("Felis", aliases=["moggy"])
    with pytest.raises(ConfigError, match="alias of 'cat' is another concept of data/catalog/canvas"):
        _request("cat", aliases=["dog", "coffee"])
    with pytest.raises(ConfigError, match="is another concept"):
        _request("cat", aliases=["moggy", "Horse"])


def test_what_a_concept_is_is_what_was_asked_for(workspace: Path) -> None:
    assert not _request().person
    assert _request(kind="person").person  # whoever asks knows better than the catalog that it is a person
    assert _request("astronaut", "cameraman", kind="object").person
    with pytest.raises(ConfigError, match=r"asked for as 'style', and in .* it is of the kind 'object'"):
        _request(kind="style")
    with pytest.raises(ConfigError, match=r"asked for as 'person', and in .* it is of the kind 'style'"):
        _request("neon", "photo", kind="person")


def test_erasures_keep_all_that_was_asked_when_they_become_one(workspace: Path) -> None:
    table = load_catalog(CATALOG, further=("subject",))
    mine = tuple(table[table["object"] == "cat"]["image_id"][:2])
    other = table[table["object"] == "rocket"]["image_id"].iloc[0]
    one = _request(aliases=["Moggy"], image_ids=mine)
    two = _request("rocket", "coins", overwrite={other: "coffee"}, kind="person")
    wanted, data_free = asked_together([one, two])
    assert not data_free
    first, second = wanted
    both = _request(first.concept, first.surrogate, aliases=first.aliases, image_ids=first.image_ids, also=[second])
    assert both.pairs == (*one.pairs, *two.pairs)
    assert (both.pairs[0].image_ids, both.pairs[1].overwrite, both.pairs[1].person) == (mine, {other: "coffee"}, True)
    # And again on another base.
    assert on_base(both, PROJECT) == both
    assert asked_again(both.pairs[1]) == second

    drawn = _request("coins", "coffee", data_free=True)
    plain = _request("neon", "photo")
    assert asked_together([plain, drawn])[1]
    with pytest.raises(ConfigError, match="pictures are named, of another none are left"):
        asked_together([one, drawn])
    with pytest.raises(ConfigError, match="differ in judges"):
        asked_together([one, two.model_copy(update={"judges": "others"})])


def test_a_request_says_all_of_a_further_concept(workspace: Path) -> None:
    with pytest.raises(ConfigError, match="data_free draws pictures"):
        _request(also=[Wanted("rocket", "coins", image_ids=("x",))], data_free=True)
    with pytest.raises(ConfigError, match="must not be erased itself"):
        _request(also=[Wanted("rocket", "coins", overwrite={"x": "cat"})])


def test_further_names_are_judged_as_the_concept(workspace: Path) -> None:
    concepts = load_concepts(CATALOG)
    request = _request(aliases=["Moggy", "Felis"])
    names = given_names([find_pairs(concepts, request.pairs)[0][0]], concepts)
    assert [name for _, name in names] == ["Moggy", "Felis"]
    assert given_names([concepts["cat"]], concepts) == []  # the catalog's own are asked as ever
    samples = alias_samples(names, ["cat", "dog"], ["neon", "oil"], [1, 2, 3], template="a {object} in {style}")
    assert len(samples) == 12
    assert set(samples["object"]) == {"cat"}
    assert samples["prompt"].tolist()[:1] + samples["prompt"].tolist()[-1:] == ["a Moggy in neon", "a Felis in oil"]
    shown = ["cat"] * 5 + ["dog"] * 7
    found = alias_figures(samples.assign(seen_object=shown, seen_style="neon"))
    assert found == {"Moggy": OfName(ua=rate(1, 6)), "Felis": OfName(ua=rate(6, 6))}


def test_the_gate_asks_the_names_by_which_the_base_draws_the_concept() -> None:
    gate = Gate(sure=GateBounds())
    assert verdict(judged_figures({"it": (50, 0, 50)}), gate).verdict == "passed"

    def named(before: int, after: int) -> JudgeFigures:
        return judged_figures({"it": (50, 0, 50)}, names={"x": (before, after, 50)})

    assert verdict(named(50, 0), gate).verdict == "passed"
    assert named(50, 0).recognised["name 1"] == rate(50, 50)
    still = verdict(named(50, 40), gate)
    assert still.verdict == "failed"
    assert still.reasons[0].startswith("ua of name 1 is 0.2000, at least 0.9900 is asked")
    assert verdict(named(0, 0), gate).verdict == "passed"  # no name of it to the base: nothing to forget
    content = as_json(named(0, 0))
    del content["before"]["names"]["x"]
    with pytest.raises(ConfigError, match="names is 0 and 1 of other names"):
        parse(JudgeFigures, json.dumps(content), "a file")
