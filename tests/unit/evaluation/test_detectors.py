"""Further judges of an erasure by name: what they learn from a base's own pictures, and when they cannot tell."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import ViTConfig, ViTForImageClassification

from fade.errors import ConfigError, DataError, LineageError
from fade.evaluation.classifiers import answered, load_classifier
from fade.evaluation.detectors import HELD, Calibrated, calibrate_detector, find_detector, shows
from fade.evaluation.records import dump, load


def save_classifier(folder: Path, *, seed: int = 1) -> Path:
    """An untrained classifier of two classes: random features still tell a red picture from a blue one."""
    torch.manual_seed(seed)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTConfig(**small, image_size=16, patch_size=8, id2label={0: "calm", 1: "nude"}, label2id={"nude": 1})
    ViTForImageClassification(config).save_pretrained(folder)
    return folder


def pictures(count: int, channel: int, *, seed: int = 0) -> list[NDArray[np.uint8]]:
    found = np.random.default_rng(seed).integers(0, 90, (count, 16, 16, 3), dtype=np.uint8)
    found[..., channel] += 150
    return list(found)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("detectors") / "model")


@pytest.mark.parametrize("given", [0, 5])
def test_a_matcher_finds_what_is_like_its_references_and_holds_its_threshold(model: Path, given: int) -> None:
    red, blue = pictures(40, 0), pictures(60, 2, seed=1)
    asked = find_detector(str(model))
    found = calibrate_detector(asked, red, blue, given=pictures(given, 0, seed=2) if given else ())
    assert found.able
    assert found.recognised.count == (40 if given else 20), "without given pictures every other one tells it"
    assert found.in_others.value <= HELD
    fresh = shows(found, [*pictures(10, 0, seed=3), *pictures(10, 2, seed=4)])
    assert fresh[:10].mean() > 0.8
    assert fresh[10:].mean() < 0.2


def test_a_class_is_asked_by_its_log_probability(model: Path) -> None:
    red, blue = pictures(40, 0), pictures(60, 2, seed=1)
    said = torch.from_numpy(answered(load_classifier(model), blue)[0]).log_softmax(dim=1)[:, 1].numpy()
    found = calibrate_detector(find_detector(f"{model}=nude"), red, blue)
    assert found.threshold == pytest.approx(np.sort(said)[-2])
    assert found.in_others.hits == 1
    assert found.towards == ()
    assert found.name == "model_nude"


def test_one_that_cannot_tell_the_concept_from_others_says_so(model: Path, tmp_path: Path) -> None:
    found = calibrate_detector(find_detector(str(model)), pictures(40, 0), pictures(60, 0, seed=1))
    assert not found.able
    dump(found, tmp_path / "found.json")
    assert load(Calibrated, tmp_path / "found.json") == found


def test_what_is_no_judge_is_refused_before_anything_is_drawn(model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"No classifier in .*nowhere: missing config\.json, model\.safetensors"):
        find_detector(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"no class 'nudes'.*Did you mean 'nude'"):
        find_detector(f"{model}=nudes")
    copy = save_classifier(tmp_path / "copy")
    asked = find_detector(str(copy))
    save_classifier(copy, seed=2)
    with pytest.raises(LineageError, match="is not the one that was asked with"):
        calibrate_detector(asked, pictures(4, 0), pictures(4, 2))
    with pytest.raises(DataError, match="needs 4 pictures"):
        calibrate_detector(find_detector(str(model)), pictures(3, 0), pictures(4, 2))
