"""Models that a user gives for figures: a CLIP and feature extractors, tiny and random, against sums by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, ViTConfig, ViTForImageClassification

from fade.asking.prepare import prepare_spec
from fade.concepts import Concept
from fade.config import load_settings
from fade.errors import ConfigError, DataError
from fade.evaluation.clip_score import MEAN, STD, clip_scores, load_clip, mean_scores
from fade.evaluation.distances import fid, kid
from fade.evaluation.extractors import load_extractor
from fade.evaluation.records import dump
from fade.evaluation.unlearncanvas import OBJECTS, STYLES, MadeWith, unlearncanvas_protocol
from fade.files import write_json
from fade.models.training import networks
from fade.steps.evaluate import by_given_models
from fade.studies.unlearncanvas import judge
from tests.tiny import PROJECT

PROMPTS = ["a cat image in neon style", "a horse image in oil style", "a cat"]


def pictures(count: int, *, height: int = 40, seed: int = 1) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, height, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP of 16 x 16 pictures."""
    folder = tmp_path_factory.mktemp("clip") / "Tiny-CLIP"
    tokenizer = networks.build_tokenizer(PROMPTS, max_length=12)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=12,
        eos_token_id=tokenizer.eos_token_id,
        projection_dim=8,
        **small,
    )
    seen = CLIPVisionConfig(image_size=16, patch_size=8, projection_dim=8, **small)
    torch.manual_seed(4)
    CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=seen.to_dict(), projection_dim=8)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


class _Scripted(nn.Module):
    """As Inception is published for FID: uint8 pictures, features only if they are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 6)

    def forward(self, pictures: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        mean = pictures.float().mean(dim=(2, 3))
        if return_features:
            return torch.cat([mean, mean * mean], dim=1)
        return self.linear(mean)


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scripts") / "inception-2015.pt"
    torch.jit.script(_Scripted()).save(str(path))
    return path


def test_a_clip_score_is_the_cosine_by_hand(clip: Path) -> None:
    loaded, shown = load_clip(clip), pictures(3, height=48)
    assert loaded.name == "tiny_clip"
    found = clip_scores(loaded, shown, PROMPTS, batch=2)
    model = loaded.model
    for i, prompt in enumerate(PROMPTS):
        ids = loaded.tokenizer([prompt], return_tensors="pt").input_ids
        # 32 x 48 becomes 16 x 24, of which the middle 16 rows are seen.
        small = Image.fromarray(shown[i]).resize((16, 24), Image.Resampling.BICUBIC).crop((0, 4, 16, 20))
        pixels = (torch.from_numpy(np.array(small)) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
        with torch.no_grad():
            said = model.text_projection(model.text_model(ids).pooler_output)[0].numpy()
            seen = model.visual_projection(model.vision_model(pixels.permute(2, 0, 1)[None]).pooler_output)[0].numpy()
        cosine = (said @ seen) / np.sqrt((said @ said) * (seen @ seen))
        assert found[i] == pytest.approx(100 * max(cosine, 0), abs=1e-3)
    assert found.std() > 0
    with pytest.raises(DataError, match="got 3 and 2"):
        clip_scores(loaded, shown, PROMPTS[:2])
    figures = mean_scores(loaded, shown, PROMPTS, np.array([True, False, True]))
    # A batch of three rounds otherwise than two and one: by float32's 1e-7 of a score's range (100), not of its value.
    assert figures == pytest.approx((found[1], found[[0, 2]].mean()), abs=1e-3)
    assert mean_scores(loaded, shown, PROMPTS, np.array([True, True, True]))[0] is None


def test_what_is_no_clip_is_refused(clip: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"config.json is missing"):
        load_clip(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((clip / "model.safetensors").read_bytes())
    write_json(tmp_path / "config.json", {"model_type": "vit"})
    with pytest.raises(DataError, match="kind 'vit', not a CLIP"):
        load_clip(tmp_path)


def test_a_script_gives_the_features_it_was_asked_for(script: Path) -> None:
    extractor = load_extractor(script)
    assert extractor.name == "inception_2015"
    shown = pictures(40)
    mean = shown.mean(axis=(1, 2))
    np.testing.assert_allclose(extractor.features(shown), np.concatenate([mean, mean**2], axis=1), rtol=1e-5)


def test_a_classifiers_folder_gives_what_its_last_layer_decides_by(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "Mine v2")
    extractor = load_extractor(tmp_path / "Mine v2")
    assert extractor.name == "mine_v2"
    assert extractor.features(pictures(3)).shape == (3, 32)
    with pytest.raises(DataError, match="No feature extractor"):
        load_extractor(tmp_path / "none")
    (tmp_path / "text.pt").write_text("no script")
    with pytest.raises(DataError, match="no TorchScript file"):
        load_extractor(tmp_path / "text.pt")


def test_an_erasures_figures_carry_the_models_names(workspace: Path, clip: Path, script: Path) -> None:
    changes = {"evaluate.clip": str(clip), "evaluate.features": str(script)}
    spec = prepare_spec("cat", "horse", project=PROJECT, settings=load_settings(Path("params.yaml"), changes=changes))
    samples = pd.DataFrame({"object": ["cat", "horse", "horse", "coffee"], "style": ["photo"] * 4})
    samples["prompt"] = [f"a {name}" for name in samples["object"]]
    before, after = pictures(4, height=32), pictures(4, height=32, seed=2)
    features, scored = by_given_models(spec, samples, before, after, [Concept("cat", "object")])
    assert features is not None
    assert scored is not None
    found = features.flat() | scored.flat()
    scores = ("clip_score_tiny_clip", "clip_score_tiny_clip_erased")
    assert set(found) == {"fid_inception_2015", "kid_inception_2015", *scores, *(f"{name}_base" for name in scores)}
    real, drawn = (load_extractor(script).features(shown[1:]) for shown in (before, after))
    assert found["fid_inception_2015"] == fid(real, drawn)
    assert found["kid_inception_2015"] == kid(real, drawn, paired=True)
    alone = clip_scores(load_clip(clip), after[:1], ["a cat"])[0]
    assert found["clip_score_tiny_clip_erased"] == pytest.approx(alone, abs=1e-3)
    # Who looks at the pictures does not decide them, and what is missing is said before anything runs.
    plain = prepare_spec("cat", "horse", project=PROJECT, settings=load_settings(Path("params.yaml")))
    assert plain.evaluate.drawing == spec.evaluate.drawing
    assert by_given_models(plain, samples, before, after, [Concept("cat", "object")]) == (None, None)
    missing = load_settings(Path("params.yaml"), changes={"evaluate.clip": "nowhere"})
    with pytest.raises(ConfigError, match=r"evaluate.clip is nowhere"):
        prepare_spec("cat", "horse", project=PROJECT, settings=missing)


def test_unlearncanvas_is_judged_by_them_too(clip: Path, script: Path, tmp_path: Path) -> None:
    part = {"styles": ("Monet", "Rust"), "objects": ("Cats", "Sea")}
    out, real, classifiers = tmp_path / "out", tmp_path / "real", tmp_path / "classifiers"
    out.mkdir()
    dump(MadeWith(base_sha256="0" * 64, target="Cats", steps=1, guidance=9.0), out / "made_with.json")
    (out / "pictures").mkdir()
    table = unlearncanvas_protocol(part["styles"], part["objects"])
    for number, file in enumerate(table["file"]):
        Image.fromarray(pictures(1, seed=number)[0]).save(out / "pictures" / file)
    for style in part["styles"]:
        (real / style / "Sea").mkdir(parents=True)
        for number in range(1, 6):
            Image.fromarray(pictures(1, seed=number)[0] // 2).save(real / style / "Sea" / f"{number}.jpg")
    for domain, names in (("style", STYLES), ("object", OBJECTS)):
        config = ViTConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16,
            patch_size=8, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)},
        )  # fmt: skip
        ViTForImageClassification(config).save_pretrained(classifiers / domain)
    found = judge(out, classifiers, real=real, features=script, clip=clip, **part)
    assert found.features is not None
    assert found.features.name == "inception_2015"
    assert found.features.fid > 0
    scores = clip_scores(
        load_clip(clip),
        [np.asarray(Image.open(out / "pictures" / file)) for file in table["file"]],
        table["prompt"].tolist(),
    )
    named = (table["object"] == "Cats").to_numpy()
    assert found.clip is not None
    assert found.clip.retained == pytest.approx(scores[~named].mean())
    assert found.clip.erased == pytest.approx(scores[named].mean())
    with pytest.raises(ConfigError, match="give --real too"):
        judge(out, classifiers, features=script, **part)
