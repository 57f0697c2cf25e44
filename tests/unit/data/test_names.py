"""One concept under every spelling of its name: in keys, catalogs, messages, requests, judges and captions."""

from __future__ import annotations

import itertools
import re
import unicodedata
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fade.concepts import Concept
from fade.data.catalog import find_concept, load_catalog, load_concepts
from fade.data.intake import add, build
from fade.data.sets import Item, PictureSet
from fade.data.splits import differs_in_names_alone, make_splits
from fade.errors import ConfigError, DataError
from fade.evaluation.judges import load_judge, new_judge, save_judge
from fade.files import read_json, write_json
from fade.names import mention, name_key, respelled, spelling
from fade.requests.entering import concept_key
from fade.requests.messages import Message
from fade.spec import Pair
from tests.tiny import PROJECT

SPELLINGS = {
    "Roh Moo-hyun": ["roh moo hyun", "Roh_Moo-hyun", " ROH  MOO\N{EN DASH}HYUN", "roh\u00a0moo\u2011hyun"],
    "café au lait": ["Cafe\u0301 au lait", "CAFÉ_AU_LAIT", "ca\N{SOFT HYPHEN}fé\u3000au lait", "\ufeffcafé au lait"],
    "O'Brien": ["o\N{RIGHT SINGLE QUOTATION MARK}brien", "O\N{MODIFIER LETTER APOSTROPHE}BRIEN"],
    "straße": ["STRASSE", "Straße", "stra\N{LATIN CAPITAL LETTER SHARP S}e"],
    "cat": ["\N{FULLWIDTH LATIN SMALL LETTER C}\N{FULLWIDTH LATIN SMALL LETTER A}t", "Cat", "CAT ", "_cat_"],
}  # fmt: skip


def test_every_spelling_has_one_key_and_other_names_another() -> None:
    for name, others in SPELLINGS.items():
        assert all(other != name for other in others)
        assert {name_key(other) for other in others} == {name_key(name)}
    assert len({name_key(name) for name in SPELLINGS}) == len(SPELLINGS)
    assert name_key("Beyonce") != name_key("Beyoncé")
    assert name_key("cats") != name_key("cat")


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=20))
def test_a_key_is_its_own_key_and_forms_and_case_do_not_move_it(text: str) -> None:
    assert name_key(name_key(text)) == name_key(text)
    for form in ("NFC", "NFD", "NFKC"):
        assert name_key(unicodedata.normalize(form, text)) == name_key(text)
    assert name_key(spelling(text)) == name_key(text)
    assert spelling(spelling(text)) == spelling(text)


def test_what_is_shown_keeps_case_and_hyphens() -> None:
    assert spelling("  Roh_Moo-hyun ") == "Roh Moo-hyun"
    assert respelled(["CAT", "dog"], ["Cat", "horse"]) == ("Cat", "dog")


def test_a_concept_is_found_by_every_spelling_and_by_name_before_alias() -> None:
    concepts = {name: Concept(name, "object") for name in SPELLINGS}
    concepts = {"kitty": Concept("kitty", "object", aliases=("Cat", "tom-cat")), **concepts}
    for name, others in SPELLINGS.items():
        for other in others:
            assert find_concept(concepts, other).name == name
    assert find_concept(concepts, "Tom_Cat").name == "kitty"
    with pytest.raises(ConfigError, match=r"Did you mean 'Roh Moo-hyun'\?"):
        find_concept(concepts, "ROH MU HYUN")


def test_a_catalog_of_two_spellings_of_one_name_is_refused(tmp_path: Path) -> None:
    entry = {"kind": "object", "aliases": [], "person": False, "domain": "object"}
    write_json(tmp_path / "concepts.json", {"concepts": [{"name": name, **entry} for name in ("Tom-Cat", "dog")]})
    assert set(load_concepts(tmp_path)) == {"Tom-Cat", "dog"}
    write_json(tmp_path / "concepts.json", {"concepts": [{"name": name, **entry} for name in ("Tom-Cat", "tom cat")]})
    with pytest.raises(DataError, match=r"spelling alone: 'Tom-Cat' and 'tom cat'"):
        load_concepts(tmp_path)


def _set(*labels: str, start: int = 0, captions: bool = False, concepts: Any = ()) -> PictureSet:
    """A picture of noise for each label."""
    draws = np.random.default_rng(start)
    items = [
        Item(f"p{number}", f"p{number}", draws.integers(0, 255, (32, 32, 3), np.uint8), label,
             caption=f"a {label}, seen from above" if captions else None)
        for number, label in enumerate(labels, start)
    ]  # fmt: skip
    return PictureSet(items, "noise", own_captions=captions, concepts=concepts)


def _taken(steps: Iterator[int], out: Path) -> pd.DataFrame:
    list(steps)
    return load_catalog(out).set_index("image_id")


@pytest.mark.parametrize("captions", [False, True])
def test_a_catalog_holds_one_spelling_of_a_name_whatever_is_added(captions: bool, tmp_path: Path) -> None:
    name, others = "Roh Moo-hyun", SPELLINGS["Roh Moo-hyun"][:3]
    assert len({name, *others}) == 4
    out = tmp_path / "out"
    table = _taken(build(out, _set(name, "dog", *others, captions=captions), workers=1), out)
    assert table["object"].tolist() == [name, "dog", name, name, name]
    again = _set(*others, "Dog", "horse", start=5, captions=captions)
    table = _taken(add(out, again, workers=1), out)
    assert table["object"].value_counts().to_dict() == {name: 7, "dog": 2, "horse": 1}
    assert [one.name for one in load_concepts(out).values()] == [name, "dog", "horse", "photo"]
    assert read_json(out / "rejected.json")["rejected"] == []
    rest = table[table["object"] != find_concept(load_concepts(out), others[0]).name]
    assert not any(re.search(mention(name), said) for said in rest["caption"])


def test_an_alias_as_a_label_is_its_concept(tmp_path: Path) -> None:
    entry = {"name": "cat", "kind": "object", "aliases": ["tom-cat"], "person": False, "domain": "object"}
    table = _taken(build(tmp_path, _set("Tom_Cat", "dog", concepts=(entry,)), workers=1), tmp_path)
    assert table["object"].tolist() == ["cat", "dog"]


@pytest.mark.parametrize("label", ["Photo", "Nothing", "AUTO", "scrambled", "- _"])
def test_a_label_that_can_be_no_concepts_name_is_set_aside(label: str, tmp_path: Path) -> None:
    table = _taken(build(tmp_path, _set("cat", label), workers=1), tmp_path)
    assert table["object"].tolist() == ["cat"]
    (entry,) = read_json(tmp_path / "rejected.json")["rejected"]
    assert "rename it" in entry["reason"]


def test_messages_about_one_concept_have_one_key_in_every_spelling() -> None:
    def key(concept: str) -> str | None:
        return concept_key(Message(id=uuid.uuid4(), kind="person", concept=concept), PROJECT, b"key")

    for name, others in SPELLINGS.items():
        assert {key(other) for other in others} == {key(name)}
    assert key("cat") != key("dog")


def test_a_surrogate_is_not_the_concept_under_another_spelling() -> None:
    for concept, surrogate in itertools.permutations(SPELLINGS["cat"], 2):
        with pytest.raises(ValueError, match="must differ from the concept"):
            Pair(concept=concept, kind="object", surrogate=surrogate)
    assert Pair(concept="cat", kind="object", surrogate="dog").surrogate == "dog"


def test_a_judges_classes_take_the_catalogs_spelling(tmp_path: Path) -> None:
    save_judge(tmp_path, "report", new_judge("plain", ["Tom_Cat", "dog"], ["pop art"], seed=1))
    assert load_judge(tmp_path, "report").objects == ("Tom_Cat", "dog", "scrambled")
    judge = load_judge(tmp_path, "report", called=["tom cat", "Pop-Art", "horse"])
    assert judge.objects == ("tom cat", "dog", "scrambled")
    assert judge.styles == ("Pop-Art", "scrambled")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("tabby cat", "a Tabby_Cat on grass"),
        ("Tabby_Cat", "two tabby cats."),
        ("O'Brien", "here is O\N{RIGHT SINGLE QUOTATION MARK}Brien, left"),
        ("C++", "a book on c++ and C"),
        ("\u732b", "\u4e00\u53ea\u732b\u5728\u6c99\u53d1\u4e0a"),
    ],
)
def test_a_sentence_mentions_a_name_in_any_spelling(name: str, sentence: str) -> None:
    assert name not in sentence or len(name) < 2
    assert re.search(mention("horse", name), sentence)
    assert not re.search(mention("horse"), sentence)


def test_a_name_within_another_word_is_no_mention() -> None:
    assert re.search(mention("cat"), "a cat")
    for sentence in ("a catalogue", "concat", "scattered", "a bobcat"):
        assert not re.search(mention("cat"), sentence)


def test_captions_give_way_in_every_spelling_and_the_pair_is_told_so() -> None:
    said = {"cat": "a Tabby_Cat and two tabby cats", "horse": "some Draft horses"}
    rows = [
        {"image_id": f"{name}/{i}", "path": "", "object": spelled, "style": "photo", "split": split, "caption": text}
        for name, spelled in (("cat", "tabby-cat"), ("horse", "draft horse"), ("dog", "dog"))
        for text in [said.get(name, "a dog")]
        for i, split in enumerate(("train", "train", "holdout"))
    ]
    cat, horse = Concept("tabby-cat", "object"), Concept("draft horse", "object")
    splits = make_splits(
        pd.DataFrame(rows),
        [(cat, horse)],
        forget_per_pair=2,
        retain_per_pair=2,
        holdout_per_pair=1,
        seed=0,
        templates=None,
    )
    forget = splits["forget"]
    assert set(forget["caption"]) == {said["cat"]}
    assert set(forget["surrogate_caption"]) == {"a draft horse and two draft horses"}
    assert set(splits["surrogate"]["caption"]) == {"some tabby-cats"}
    pairs = [(["tabby-cat"], "draft horse")]
    assert differs_in_names_alone(said["cat"], "a draft horse and two draft horses", pairs)
    assert not differs_in_names_alone(said["cat"], "a draft horse and three draft horses", pairs)
    assert not differs_in_names_alone("a dog", "a dog", pairs)
