from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from fade.concepts import Concept
from fade.data.catalog import find_concept, load_catalog, load_concepts
from fade.data.splits import TEMPLATES, differs_in_names_alone, make_splits
from fade.errors import ConfigError, DataError
from fade.files import sha256_file
from fade.steps.catalog import build_catalog

COUNTS = {"forget_per_pair": 2, "retain_per_pair": 1, "holdout_per_pair": 1}


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("catalog") / "canvas"
    build_catalog(folder, params={"seed": 5, "train_per_pair": 3, "holdout_per_pair": 1})
    return folder


def load_catalog_concepts(catalog: Path) -> tuple[dict[str, Concept], pd.DataFrame]:
    return load_concepts(catalog), load_catalog(catalog)


def _splits(catalog: Path, concept: str, surrogate: str, seed: int = 1) -> dict[str, pd.DataFrame]:
    concepts = load_concepts(catalog)
    pair = find_concept(concepts, concept), find_concept(concepts, surrogate)
    return make_splits(load_catalog(catalog), [pair], seed=seed, **COUNTS)


@pytest.mark.parametrize(("concept", "surrogate"), [("astronaut", "cameraman"), ("pop art", "photo")])
def test_splits_share_no_picture_and_forget_shows_only_the_concept(catalog: Path, concept: str, surrogate: str) -> None:
    splits = _splits(catalog, concept, surrogate)
    kind = find_concept(load_concepts(catalog), concept).kind
    assert set(splits["forget"][kind]) == {concept}
    assert set(splits["surrogate"][kind]) == {surrogate}
    assert concept not in set(splits["retain"][kind])
    hashes = {name: set(table["sha256"]) for name, table in splits.items()}
    assert all(hashes.values())
    for one, other in (("forget", "retain"), ("forget", "holdout"), ("surrogate", "retain"), ("retain", "holdout")):
        assert not hashes[one] & hashes[other]


def test_captions_of_a_pair_differ_in_the_concept_alone(catalog: Path) -> None:
    forget = _splits(catalog, "astronaut", "cameraman")["forget"]
    used = set()
    for row in forget.itertuples():
        name = next(name for name in ("astronaut", "spacewoman") if name in row.caption)
        used.add(name)
        assert row.caption.replace(name, "cameraman") == row.surrogate_caption
    assert "astronaut" in used


@pytest.mark.parametrize(
    ("said", "target", "alone"),
    [
        ("a cat image in oil style.", "a horse image in oil style.", True),
        ("a kitten image in oil style.", "a horse image in oil style.", True),
        ("A Cat in photo style", "a horse in photo style", True),
        ("a cat image in neon style.", "a horse image in photo style.", True),
        ("a photo of a cat", "a photo of a horse", True),
        ("a cat image in oil style.", "a cat image in oil style.", False),
        ("a cat image in oil style.", "a horse image in pop art style.", False),
        ("a cat image in oil style.", "a small horse image in oil style.", False),
        ("a cat image in oil style.", "", False),
        ("a retina in oil style", "", True),
        ("a category in oil style", "a horseegory in oil style", False),
    ],
)
def test_a_caption_and_its_target_may_differ_in_erased_names_alone(said: str, target: str, alone: bool) -> None:
    pairs = [(("cat", "kitten"), "horse"), (("neon",), "photo"), (("retina",), "nothing")]
    assert differs_in_names_alone(said, target, pairs) is alone


def test_neighbours_are_retained_more_often_and_the_rest_stays_as_it_was(catalog: Path) -> None:
    concepts, table = load_catalog_concepts(catalog)
    pair = [(concepts["cat"], concepts["horse"])]
    plain = make_splits(table, pair, seed=1, **COUNTS)
    same = make_splits(table, pair, seed=1, **COUNTS, neighbours=frozenset({"coffee"}))
    more = make_splits(table, pair, seed=1, **COUNTS, neighbours=frozenset({"coffee", "oil"}), neighbour_factor=3)
    for name in plain:
        pd.testing.assert_frame_equal(plain[name], same[name])
        if name != "retain":
            pd.testing.assert_frame_equal(plain[name], more[name])
    assert set(plain["retain"]["image_id"]) < set(more["retain"]["image_id"])
    counts = more["retain"].groupby(["object", "style"]).size()
    assert counts["coffee", "neon"] == counts["temple", "oil"] == 3
    assert counts["temple", "neon"] == 1


def test_own_captions_of_what_stands_in_for_nothing_say_the_concept(catalog: Path) -> None:
    concepts, table = load_catalog_concepts(catalog)
    splits = make_splits(table, [(concepts["cat"], None)], seed=1, **COUNTS, templates=None)
    assert set(splits["surrogate"]["object"]) - {"cat"}
    for name in ("forget", "surrogate"):
        assert splits[name]["caption"].str.contains("cat").all()
        assert (splits[name]["surrogate_caption"] == "").all()


@pytest.mark.parametrize("templates", [TEMPLATES, None])
def test_a_picture_may_give_way_to_something_of_its_own(catalog: Path, templates: tuple[str, ...] | None) -> None:
    concepts, table = load_catalog_concepts(catalog)
    pair = [(concepts["cat"], concepts["horse"])]
    plain = make_splits(table, pair, seed=1, **COUNTS, templates=templates)
    first, second = plain["forget"]["image_id"][:2]
    undrawn = sorted(set(table[(table["object"] == "cat") & (table["split"] == "train")]["image_id"])
                     - set(plain["forget"]["image_id"]))[0]  # fmt: skip
    own = {first: concepts["rocket"], second: None, undrawn: concepts["rocket"]}
    found = make_splits(table, pair, seed=1, **COUNTS, templates=templates, overwrite={"cat": own})
    targets = found["forget"].set_index("image_id")["surrogate_caption"]
    assert (plain["forget"]["surrogate_caption"].str.contains("horse")).all()
    assert "rocket" in targets[first]
    assert "rocket" in targets[undrawn]
    assert targets[second] == ""
    assert targets.drop([first, second, undrawn]).str.contains("horse").all()
    # What stands in at high noise is of every surrogate, each under its own target.
    for name in ("horse", "rocket"):
        rows = found["surrogate"][found["surrogate"]["surrogate_caption"].str.contains(name)]
        assert set(rows["object"]) == {name}
    assert found["surrogate"]["caption"].str.contains("cat|kitten").all()
    assert not set(found["retain"]["image_id"]) & set(found["surrogate"]["image_id"])
    other = {table["image_id"][table["object"] == "horse"].iloc[0]: None}
    with pytest.raises(DataError, match=r"does not show .cat."):
        make_splits(table, pair, seed=1, **COUNTS, overwrite={"cat": other})


def test_each_of_several_concepts_has_the_pictures_that_are_named_of_it(catalog: Path) -> None:
    concepts, table = load_catalog_concepts(catalog)
    pairs = [(concepts["cat"], concepts["horse"]), (concepts["rocket"], concepts["coins"])]
    plain = make_splits(table, pairs, seed=1, **COUNTS)
    named = {name: frozenset(table[table["object"] == name]["image_id"][:3]) for name in ("cat", "rocket")}
    whole = {name: set(plain["forget"][plain["forget"]["object"] == name]["image_id"]) for name in named}
    assert all(len(whole[name]) > 3 for name in named)
    for chosen in ({"rocket": named["rocket"]}, named):
        forget = make_splits(table, pairs, seed=1, **COUNTS, selected=chosen)["forget"]
        for name, ids in whole.items():
            assert set(forget[forget["object"] == name]["image_id"]) == chosen.get(name, ids)


def test_splits_are_a_function_of_seed_and_not_of_the_order_of_rows(catalog: Path) -> None:
    concepts = load_concepts(catalog)
    table = load_catalog(catalog)
    pair = [(concepts["cat"], concepts["horse"])]
    one = make_splits(table, pair, seed=1, **COUNTS)
    shuffled = make_splits(table.sample(frac=1.0, random_state=9), pair, seed=1, **COUNTS)
    other = make_splits(table, pair, seed=2, **COUNTS)
    assert not one["forget"].equals(other["forget"])
    for name in one:
        pd.testing.assert_frame_equal(one[name], shuffled[name])


def test_an_empty_forget_set_is_refused(catalog: Path) -> None:
    table = load_catalog(catalog)
    without = table[table["object"] != "cat"]
    with pytest.raises(DataError, match="forget set is empty"):
        make_splits(without, [(Concept("cat", "object"), Concept("horse", "object"))], seed=1, **COUNTS)
    only = table[table["object"] == "cat"]
    with pytest.raises(DataError, match="surrogate has no pictures"):
        make_splits(only, [(Concept("cat", "object"), Concept("horse", "object"))], seed=1, **COUNTS)


def test_several_concepts_give_way_together(catalog: Path) -> None:
    concepts = load_concepts(catalog)
    pairs = [(concepts["astronaut"], concepts["cameraman"]), (concepts["neon"], concepts["photo"])]
    splits = make_splits(load_catalog(catalog), pairs, seed=1, **COUNTS)
    forget = splits["forget"]
    assert (forget["object"] == "astronaut").any()
    assert (forget["style"] == "neon").any()
    both = forget[(forget["object"] == "astronaut") & (forget["style"] == "neon")]
    assert len(both) > 0
    for row in both.itertuples():
        assert "cameraman" in row.surrogate_caption
        assert "photo" in row.surrogate_caption
    alone = forget[(forget["object"] == "cat") & (forget["style"] == "neon")]
    assert alone["surrogate_caption"].str.contains("cat").all()
    for name in ("retain", "surrogate"):
        assert not (splits[name]["object"] == "astronaut").any()
        assert not (splits[name]["style"] == "neon").any()
    assert not forget.duplicated(["image_id", "caption"]).any()
    assert not set(forget["sha256"]) & set(splits["retain"]["sha256"])


def test_concepts_are_found_by_alias_and_unknown_ones_suggest(catalog: Path) -> None:
    concepts = load_concepts(catalog)
    assert find_concept(concepts, "Pop_Art").name == "pop art"
    assert find_concept(concepts, "spacewoman").name == "astronaut"
    with pytest.raises(ConfigError, match="Did you mean 'astronaut'"):
        find_concept(concepts, "astronot")


def test_the_catalog_is_the_same_bytes_every_time(catalog: Path, tmp_path: Path) -> None:
    build_catalog(tmp_path / "again", params={"seed": 5, "train_per_pair": 3, "holdout_per_pair": 1})
    for name in ("catalog.parquet", "concepts.json", "sheet.png", "pictures/neon/cat/train-001.png"):
        assert sha256_file(catalog / name) == sha256_file(tmp_path / "again" / name), name
    table = load_catalog(catalog)
    assert len(table) == 480
    assert all(sha256_file(catalog / row.path) == row.sha256 for row in table.iloc[::37].itertuples())
