"""Erasures by name alone: what is planned of a name, what is refused before anything is drawn, and who judges."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from fade.asking.budgets import SOLVED, budget_changes
from fade.asking.by_name import Prepared, prepare_by_name
from fade.asking.planned import Asked, guess_kind
from fade.config import Settings
from fade.data.canvas import OBJECTS
from fade.data.catalog import load_catalog, load_concepts
from fade.data.styles import STYLES
from fade.errors import ConfigError, DataError, LineageError
from fade.evaluation import zero_shot
from fade.evaluation.clip_score import load_clip
from fade.evaluation.damage import SCRAMBLED
from fade.evaluation.judges import judge_pictures
from fade.evaluation.zero_shot import NOBODY, Classes, calibrated, open_judge, save_zero_shot
from fade.models.family import load_base
from fade.models.prompts import hardly_met, readers, spelt_out
from fade.models.source import find_base
from fade.models.training import networks
from fade.names import mention, name_key
from fade.project import Project
from fade.spec import make_spec
from fade.steps.generate import named
from fade.steps.given import load_given
from fade.words import KINDS, kept_prompts, known_word, sentence, templates, vocabulary
from tests.tiny import plain_spec, save_tiny_base

WORDS = ["a cat image in neon style.", "a picture of a horse"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("by-name") / "base"
    save_tiny_base(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP of 16 x 16 pictures."""
    return save_clip(tmp_path_factory.mktemp("clips") / "tiny")


def save_clip(folder: Path, *, seed: int = 4) -> Path:
    tokenizer = networks.build_tokenizer(WORDS, max_length=16)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    text |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    vision = {**small, "image_size": 16, "patch_size": 8}
    torch.manual_seed(seed)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def prepared(base: Path, concept: str = "cat", settings: Settings | None = None, **asked: Any) -> Prepared:
    project = Project(name="tiny", catalog="nowhere", base=str(base), judges="nowhere")
    return prepare_by_name(Asked(concept, budget="small", **asked), project=project, settings=settings or Settings())


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_words_that_ship_are_many_and_name_nothing_twice() -> None:
    kinds = Counter(word.kind for word in vocabulary())
    assert set(kinds) == set(KINDS)
    assert len(vocabulary()) > 400
    names = Counter(key for word in vocabulary() for key in word.keys)
    assert [name for name, count in names.items() if count > 1] == []
    assert len(kept_prompts()) >= 400
    assert len({prompt for _, prompt in kept_prompts()}) == len(kept_prompts())
    for section in ("both", *KINDS):
        assert len(templates(section)) >= 24, section
        assert len(set(templates(section))) == len(templates(section))
    # What its prompts give instead is itself a word.
    assert all(known_word(word.instead) for word in vocabulary() if word.instead)


def test_the_canvas_is_part_of_the_words_so_that_it_needs_no_list_of_its_own() -> None:
    found = {name: known_word(name) for name in (*OBJECTS, *STYLES)}
    assert [name for name, word in found.items() if word is None] == []
    for name, known in OBJECTS.items():
        word = found[name]
        assert word is not None
        assert (word.kind == "person") == known.person
        # Another word for it is no other thing, which would be kept while it is erased.
        assert {name_key(alias) for alias in known.aliases} <= word.keys


@pytest.mark.parametrize(
    ("template", "names", "said"),
    [
        ("a photo of a {object}", {"object": "cat"}, "a photo of a cat"),
        ("a photo of a {object}", {"object": "owl"}, "a photo of an owl"),
        ("a photo of a {object}", {"object": "unicorn"}, "a photo of a unicorn"),
        ("a {style} photo of a {object}", {"object": "hour", "style": "ukiyo-e"}, "a ukiyo-e photo of an hour"),
        ("a photo of a {object}", {"object": "umbrella"}, "a photo of an umbrella"),
        ("a photo of a {object}", {"object": "Ada Lovelace"}, "a photo of Ada Lovelace"),
        ("a {style} picture of a {object}", {"object": "cat", "style": "Monet"}, "Monet picture of a cat"),
    ],
)
def test_sentences_take_the_article_that_a_name_has(template: str, names: dict[str, str], said: str) -> None:
    assert sentence(template, **names) == said


def test_a_word_that_a_tokenizer_spells_letter_by_letter_is_not_known_to_it(base: Path) -> None:
    reading = readers(find_base(base))
    assert spelt_out(reading, ["a cat image in neon style."]) == [False]
    assert spelt_out(reading, ["a giraffe", "a wolf in a park"]) == [True, True]


def test_a_token_that_training_never_made_longer_is_not_known_to_the_base(base: Path) -> None:
    loaded = load_base(base)
    words = ["cat", "horse", "neon", "oil", "photo"]
    assert hardly_met(loaded, words) == [False] * 5
    weight = loaded.pipeline.text_encoder.get_input_embeddings().weight
    (number,) = loaded.pipeline.tokenizer("horse", add_special_tokens=False).input_ids
    before = weight[number].clone()
    try:
        with torch.no_grad():
            weight[number] *= 0.1
        assert hardly_met(loaded, words) == [False, True, False, False, False]
    finally:
        with torch.no_grad():
            weight[number] = before


def test_a_plan_keeps_neighbours_and_others_and_never_the_concept_or_another_word_for_it(base: Path) -> None:
    found = prepared(base, "cat")
    plan, spec = found.plan, found.spec
    assert (found.kind, spec.concept, spec.data_free, spec.by_name) == ("object", "cat", True, True)
    assert found.guessed is not None
    assert len(plan.neighbours) == 2
    assert spec.aliases == (), "the tiny base spells a kitten letter by letter"
    assert prepared(base, "cat", aliases=("moggy",)).spec.aliases == ("moggy",), "who asks knows better"
    said = [*plan.neighbours, *plan.others, *plan.across, plan.surrogate, *plan.content["kept"]]
    assert not any(re.search(mention("cat", "kitten", "tabby"), one) for one in said)
    assert set(plan.neighbours).isdisjoint(plan.others)
    concepts = load_concepts(plan.folder)
    assert set(concepts) == {"cat", plan.surrogate, *plan.neighbours, *plan.others, *plan.across}
    assert len(load_catalog(plan.folder)) == 0
    assert prepared(base, "cat").spec == spec, "asked again it is the same erasure"


def test_every_word_that_the_base_reads_is_told_though_few_are_drawn(base: Path) -> None:
    plan = prepared(base, "cat").plan
    told, drawn = plan.content["told"], {one["name"] for one in plan.content["concepts"]}
    assert len(set(told)) == len(told)
    assert not any(re.search(mention("cat", "kitten", "tabby"), one) for one in told)
    read = {word.name for word in vocabulary() if not any(spelt_out(readers(find_base(base)), [word.name]))}
    beside = [name for name in read - {"cat"} if any(re.search(mention(name), one) for one in told)]
    assert set(beside) == read - {"cat"}
    assert len(beside) > len(drawn)
    times = {name: sum(bool(re.search(mention(name), one)) for one in told) for name in (*plan.neighbours, "coins")}
    assert "coins" not in plan.neighbours
    assert all(times[name] > times["coins"] for name in plan.neighbours)


def test_the_concept_is_told_away_beside_every_word_that_the_base_reads_by_each_of_its_names(base: Path) -> None:
    found = prepared(base, "neon", aliases=("glowing", "blinking"))
    pairs, surrogate = found.plan.content["told_away"], found.plan.surrogate
    subjects = {word.name for word in vocabulary() if name_key(word.name) in {name_key(name) for name in OBJECTS}}
    drawn = {one["name"] for one in found.plan.content["concepts"]}
    assert len(subjects - drawn) > 3, "few of them are drawn"
    for name in subjects:
        assert any(f" {name} image in neon style" in concept for concept, _ in pairs), name
    for concept, instead in pairs:
        (said,) = [name for name in ("neon", "glowing", "blinking") if name in concept.replace(",", " ").split()]
        assert instead == concept.replace(said, surrogate)
    assert {"glowing", "blinking"} <= {word for concept, _ in pairs for word in concept.split()}
    assert prepared(base, "neon", surrogate="nothing").plan.content["told_away"] == []


def test_where_nothing_is_trained_other_forms_of_sentences_are_told_away_without_a_picture(base: Path) -> None:
    captions = Settings.model_validate({"distill": {"start": "closed_form", "steps": 0}})
    trained, solved = (
        [tuple(one) for one in prepared(base, "neon", settings).plan.content["told_away"]]
        for settings in (Settings(), captions)
    )
    further = [concept for concept, _ in solved if concept not in {one for one, _ in trained}]
    assert any(not any(name in concept for name in OBJECTS) for concept in further), "alone"
    assert any("image in neon style" not in concept and "cat" in concept for concept in further), "in other words"
    assert solved[: len(trained)] == trained


def test_what_is_drawn_names_its_subject_and_the_concept_by_all_its_names(base: Path) -> None:
    found = prepared(base, "cat", aliases=("chelsea",))
    wanted = list(named(found.spec, found.plan.content))
    assert len(wanted) == found.drawn
    assert len({(one.object, one.style, one.split, one.index) for one in wanted}) == len(wanted)
    mine = [one for one in wanted if one.object == "cat"]
    assert mine
    assert all(re.search(mention(*found.spec.names), one.prompt or "") for one in mine)
    assert any("chelsea" in str(one.prompt) for one in mine)
    rest = [one for one in wanted if one.object != "cat"]
    assert rest
    assert not any(re.search(mention(*found.spec.names), one.prompt or "") for one in rest)


def test_a_style_and_a_person_are_planned_in_their_own_domains(base: Path) -> None:
    style, person = prepared(base, "neon").spec, prepared(base, "astronaut").spec
    assert (style.kind, style.person) == ("style", False)
    assert (person.kind, person.person) == ("object", True)
    assert known_word(person.surrogate) is not None
    assert prepared(base, "neon", kind="object").spec.kind == "object"


def test_a_kind_is_guessed_by_vocabulary_writing_and_neighbourhood(base: Path) -> None:
    loaded = load_base(base)
    known = [word for word in vocabulary() if not any(spelt_out(readers(find_base(base)), [word.name]))]
    for name, kind in (("Van Gogh", "style"), ("vincent van gogh", "style"), ("nude", "notion"), ("dog", "object")):
        assert guess_kind(loaded, name, known)[0] == kind
    assert guess_kind(loaded, "Erika Mustermann", known)[0] == "person"
    assert guess_kind(loaded, "glitch art", known)[0] == "style"
    kind, why = guess_kind(loaded, "zorp", known)
    assert kind in KINDS
    assert "nearest" in why


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"concept": "  "}, "needs a name"),
        ({"concept": "cat " * 30}, r"is cut: .* takes \d+ tokens, and the base reads 16"),
        ({"surrogate": "a grumpy cat"}, "the surrogate 'a grumpy cat' contains the concept"),
        (
            {"keep": ("dog", "two cats in a park")},
            "1 of what shall be kept name the concept itself: two cats in a park",
        ),
        ({"kind": "animal"}, "the kind is 'animal': expected one of style, person, object, notion"),
        ({"surrogate": "cat", "kind": "animal"}, "the kind is 'animal'.*contains the concept"),
    ],
)
def test_what_contradicts_itself_is_refused_before_anything_is_drawn(
    base: Path, asked: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        prepared(base, **{"concept": "cat", **asked})
    assert not Path("data").exists()


def test_what_is_no_clip_is_refused_before_anything_is_drawn(base: Path, clip: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"No CLIP in nowhere: config\.json is missing"):
        prepared(base, clip="nowhere")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "clip_text_model"}')
    (other / "model.safetensors").write_bytes((clip / "model.safetensors").read_bytes())
    with pytest.raises(DataError, match="kind 'clip_text_model', not a CLIP"):
        prepared(base, clip=str(other))
    assert not Path("data").exists()
    assert prepared(base, clip=str(clip)).spec.clip_sha256 != prepared(base).spec.clip_sha256 is None


def test_given_pictures_are_read_before_anything_is_drawn_and_bound_to_what_is_asked(
    base: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "given"
    with pytest.raises(DataError, match="No folder of pictures"):
        prepared(base, pictures=folder)
    folder.mkdir()
    for number in range(5):
        with pytest.raises(DataError, match=f"holds {number} pictures: expected 5 to 50"):
            prepared(base, pictures=folder)
        pixels = np.random.default_rng(number).integers(0, 255, (70, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    found = prepared(base, pictures=folder)
    wanted = list(named(found.spec, found.plan.content))
    begins = [one.begin for one in wanted if one.begin is not None]
    assert begins == [number % 5 for number in range(len(begins))]
    assert {one for one in wanted if one.begin is not None} == {one for one in wanted if one.object == "cat"}
    assert found.spec.id != prepared(base).spec.id
    given = found.plan.content["given"]
    assert load_given(given, size=64).shape == (5, 64, 64, 3)
    (folder / "3.png").write_bytes(b"no picture")
    with pytest.raises(LineageError, match=r"3\.png is gone, or is not the picture"):
        load_given(given, size=64)
    with pytest.raises(DataError, match=r"1 of the pictures .* cannot be read: 3\.png"):
        prepared(base, pictures=folder)
    assert not Path("data/erasures").exists()


def test_a_small_budget_solves_for_captions_and_trains_where_pictures_are_given() -> None:
    solved, trained = (budget_changes("small", pictures=given) for given in (False, True))
    assert (solved["distill.start"], solved["distill.steps"]) == ("closed_form", 0)
    assert set(solved) - set(trained) == set(SOLVED)
    assert solved["split.forget_per_pair"] < trained["split.forget_per_pair"], "what is solved reads captions alone"
    assert budget_changes("normal", pictures=False) == budget_changes("normal", pictures=True)
    with pytest.raises(ConfigError, match="no budget 'tiny': expected one of small, normal"):
        budget_changes("tiny", pictures=False)


def test_names_found_everywhere_do_not_win_everywhere() -> None:
    """The third name rings in every picture: its text lies where all pictures do."""
    texts = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0.3, 1], [0, 0, 0, -1]])
    texts = torch.nn.functional.normalize(texts, dim=1)
    shown = ["a"] * 20 + ["b"] * 20 + ["c"] * 20
    generator = torch.Generator().manual_seed(1)
    middle = torch.tensor([[0.3, 0, 0, 1], [0, 0.3, 0, 1], [0, 0, 0.3, 1]]).repeat_interleave(20, dim=0)
    pictures = torch.nn.functional.normalize(middle + 0.01 * torch.randn(60, 4, generator=generator), dim=1)
    raw = (pictures @ texts.T).argmax(dim=1)
    assert (raw == 2).all(), "without levels c wins everywhere"
    found = calibrated(("a", "b", "c"), texts, pictures, shown, shuffled=-pictures)
    assert np.mean([one == other for one, other in zip(found.called(pictures), shown, strict=True)]) > 0.9
    assert found.called(-pictures) == [SCRAMBLED] * 60


def test_a_zero_shot_judge_is_bound_to_its_clip_and_keeps_its_classes(clip: Path, tmp_path: Path) -> None:
    copy = save_clip(tmp_path / "copy")
    part = {
        kind: Classes(names, torch.randn(len(names) + 1, 8), torch.zeros(len(names) + 1), -10.0)
        for kind, names in (("object", ("cat", "dog")), ("style", ("neon",)))
    }
    save_zero_shot(tmp_path / "judges", "report", clip=str(copy), classes=part)
    judge = open_judge(tmp_path / "judges", "report")
    assert (judge.objects, judge.styles) == (("cat", "dog", SCRAMBLED), ("neon", SCRAMBLED))
    pictures = np.random.default_rng(1).integers(0, 255, (3, 64, 64, 3), dtype=np.uint8)
    assert set(judge_pictures(judge, pictures).objects) <= set(judge.objects)
    looked = mock.Mock(side_effect=zero_shot.embedded_pictures)
    with mock.patch.object(zero_shot, "embedded_pictures", looked):
        assert judge.features(pictures).shape == (3, 8)
        assert looked.call_count == 0, "it has looked at them before"
        more = np.concatenate([pictures[:1], 255 - pictures[:1]])
        np.testing.assert_array_equal(judge.features(more)[0], judge.features(pictures)[0])
    assert [len(call.args[1]) for call in looked.call_args_list] == [1]
    save_clip(copy, seed=5)
    with pytest.raises(LineageError, match="is not the one that was calibrated"):
        open_judge(tmp_path / "judges", "report")


def test_nobody_sees_nothing(tmp_path: Path) -> None:
    empty = torch.zeros(1, 1)
    save_zero_shot(
        tmp_path, "report", clip=NOBODY, classes={k: Classes((), empty, empty[0], 1.0) for k in ("object", "style")}
    )
    judge = open_judge(tmp_path, "report")
    pictures = np.zeros((2, 16, 16, 3), dtype=np.uint8)
    assert judge_pictures(judge, pictures).objects == [SCRAMBLED] * 2
    assert judge.features(pictures).shape == (2, 192)


def test_a_siglip_is_loaded_and_prepares_pictures_whole(tmp_path: Path) -> None:
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = networks.build_tokenizer(WORDS, max_length=16)
    text = {**small, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "projection_size": 32}
    text |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    SiglipModel(
        SiglipConfig(text_config=text, vision_config={**small, "image_size": 16, "patch_size": 8})
    ).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_clip(tmp_path)
    assert loaded.whole
    assert loaded.mean == (0.5, 0.5, 0.5)


def test_where_nobody_judges_a_gate_that_asks_nothing_of_the_judge_is_refused(base: Path, clip: Path) -> None:
    settings = Settings(gate={"recognised": 0.0})
    project = Project(name="tiny", catalog="nowhere", base=str(base), judges="nowhere")
    with pytest.raises(ConfigError, match=r"nobody judges, and gate\.recognised is 0"):
        prepare_by_name(Asked("cat", budget="small"), project=project, settings=settings)
    assert prepare_by_name(
        Asked("cat", budget="small", clip=str(clip)), project=project, settings=settings
    ).spec.by_name


def test_an_erasure_by_name_has_no_pictures_and_judges_of_its_own(tmp_path: Path) -> None:
    spec = plain_spec(by_name=True, data_free=True)
    assert spec.judges_folder(tmp_path) == tmp_path / "judges"
    assert spec.as_judged(tmp_path).catalog == str(tmp_path / "judges")
    assert plain_spec().as_judged(tmp_path) == plain_spec()
    assert "by_name" not in plain_spec().model_dump(), "other erasures keep their ids"
    with pytest.raises(ConfigError, match="has no pictures"):
        make_spec(**plain_spec().model_dump(), by_name=True)
