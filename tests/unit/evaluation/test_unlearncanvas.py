"""UnlearnCanvas: its numbers on hand-made tables, its quirk, its layout, its shards, its classifiers."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification
from typer.main import get_command
from typer.testing import CliRunner

from fade.errors import ConfigError, DataError
from fade.evaluation.classifiers import DOMAINS, classify, from_timm, load_classifiers
from fade.evaluation.records import load
from fade.evaluation.unlearncanvas import (
    GUIDANCE,
    OBJECTS,
    SEED_IMAGES,
    STEPS,
    STYLES,
    UnlearnCanvas,
    kind_of_target,
    unlearncanvas_figures,
    unlearncanvas_protocol,
)
from fade.studies.unlearncanvas import begin, draw, judge
from flows.cli.app import app


def test_the_protocol_is_the_published_one() -> None:
    table = unlearncanvas_protocol()
    assert (len(STYLES), len(OBJECTS)) == (51, 20)
    assert len(table) == 51 * 20 * 5
    assert not table["file"].duplicated().any()
    first = table.iloc[0]
    assert (first["file"], first["seed"]) == ("Abstractionism_Architectures_seed188.jpg", 188)
    assert "A Cats image in Van Gogh style." in set(table["prompt"])
    assert "A Sea image in Seed Images style." in set(table["prompt"])
    assert STYLES.index("Seed_Images") == 38
    assert table.groupby("seed").size().to_dict() == dict.fromkeys((188, 288, 588, 688, 888), 51 * 20)
    assert table.groupby(["style", "object"]).size().to_dict() == dict.fromkeys(product(STYLES, OBJECTS), 5)
    for row in table.itertuples():
        assert row.prompt == f"A {row.object} image in {str(row.style).replace('_', ' ')} style."
        assert row.file == f"{row.style}_{row.object}_seed{row.seed}.jpg"
    assert (STEPS, GUIDANCE) == (100, 9.0)
    asked = {option.name: option.default for option in get_command(app).commands["unlearncanvas"].params}
    assert (asked["steps"], asked["guidance"], asked["seed_images"]) == (100, 9.0, True)


@pytest.fixture
def confusion() -> pd.DataFrame:
    """Styles Monet, Rust and the photographs; objects Cats and Sea; what was seen is written by hand."""
    rows = [
        # style, object, seen style, seen object
        ("Monet", "Cats", "Rust", "Cats"),
        ("Monet", "Cats", "Monet", "Sea"),
        ("Monet", "Sea", "Rust", "Sea"),
        ("Monet", "Sea", "Winter", "Sea"),
        ("Rust", "Cats", "Rust", "Cats"),
        ("Rust", "Sea", "Monet", "Sea"),
        ("Seed_Images", "Cats", "Winter", "Sea"),
        ("Seed_Images", "Sea", "Seed_Images", "Sea"),
    ]
    return pd.DataFrame(rows, columns=["style", "object", "seen_style", "seen_object"])


def test_figures_equal_hand_computed_ones_with_and_without_the_quirk(confusion: pd.DataFrame) -> None:
    def values(target: str, *, seed_images: bool) -> list[float]:
        found = unlearncanvas_figures(confusion, target, seed_images=seed_images)
        return [rate.value for rate in found.rates.values()]

    # Monet: 3 of its 4 are not seen as Monet; of the 4 others 2 keep their style; of all 8 objects 6 are right.
    assert values("Monet", seed_images=True) == [3 / 4, 2 / 4, 6 / 8]
    # Without the photographs' theme: 1 of Rust's 2; objects 5 of 6.
    assert values("Monet", seed_images=False) == [3 / 4, 1 / 2, 5 / 6]
    # Cats: 2 of 4 are not seen as Cats; all 4 seas are; styles: 3 of 8.
    assert values("Cats", seed_images=True) == [2 / 4, 4 / 4, 3 / 8]
    assert values("Cats", seed_images=False) == [1 / 3, 3 / 3, 2 / 6]


def test_what_is_no_target_is_refused(confusion: pd.DataFrame) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'Van_Gogh'"):
        kind_of_target("Van_Goh")
    with pytest.raises(ConfigError, match="no style to erase"):
        kind_of_target(SEED_IMAGES)
    with pytest.raises(DataError, match="seen_style"):
        unlearncanvas_figures(confusion.drop(columns="seen_style"), "Monet")


def _timm_state(width: int, outputs: int, *, depth: int = 2, patch: int = 8, size: int = 32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(outputs)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    state = {
        "cls_token": draw(1, 1, width),
        "pos_embed": draw(1, (size // patch) ** 2 + 1, width),
        "patch_embed.proj.weight": draw(width, 3, patch, patch),
        "patch_embed.proj.bias": draw(width),
        "norm.weight": 1 + draw(width),
        "norm.bias": draw(width),
        "head.weight": draw(outputs, width),
        "head.bias": draw(outputs),
    }
    for i in range(depth):
        for name, shape in {
            "norm1": (width,),
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
            "norm2": (width,),
            "mlp.fc1": (2 * width, width),
            "mlp.fc2": (width, 2 * width),
        }.items():
            state[f"blocks.{i}.{name}.weight"] = draw(*shape)
            state[f"blocks.{i}.{name}.bias"] = draw(shape[0])
    return state


def _plain_vit(state: dict[str, Tensor], pictures: Tensor, *, heads: int, depth: int = 2) -> Tensor:
    """The published network, written out: pre-norm, one class token, exact GELU."""
    x = F.conv2d(pictures, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=8)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], dim=1) + state["pos_embed"]
    width = x.shape[-1]

    def linear(y: Tensor, name: str) -> Tensor:
        return F.linear(y, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(y: Tensor, name: str) -> Tensor:
        return F.layer_norm(y, (width,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    for i in range(depth):
        at = f"blocks.{i}"
        q, k, v = linear(norm(x, f"{at}.norm1"), f"{at}.attn.qkv").chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + linear((weights @ v).transpose(1, 2).flatten(2), f"{at}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{at}.norm2"), f"{at}.mlp.fc1")), f"{at}.mlp.fc2")
    return linear(norm(x, "norm")[:, 0], "head")


def test_a_published_classifiers_tensors_give_the_published_networks_answers() -> None:
    state = _timm_state(128, len(STYLES))
    classifier = from_timm(state, STYLES, origin="here")
    pictures = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = classifier.model(pictures).logits
    expected = _plain_vit(state, pictures, heads=2)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (classifier.size, classifier.labels) == (32, STYLES)


def test_a_foreign_or_wrong_classifier_is_refused(tmp_path: Path) -> None:
    state = _timm_state(64, 7)
    with pytest.raises(DataError, match="has 7 outputs; expected 51"):
        from_timm(state, STYLES, origin="here")
    with pytest.raises(DataError, match=r"lacks .*cls_token"):
        from_timm({"conv": torch.zeros(1)}, STYLES, origin="here")
    with pytest.raises(DataError, match="Pickled checkpoints"):
        load_classifiers(tmp_path)


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One in timm's file, one in transformers' folder."""
    folder = tmp_path_factory.mktemp("classifiers")
    save_file(_timm_state(64, len(STYLES)), folder / "style.safetensors")
    torch.manual_seed(1)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        num_labels=len(OBJECTS), id2label=dict(enumerate(OBJECTS)), label2id={n: i for i, n in enumerate(OBJECTS)},
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder / "object")
    return folder


PART = {"styles": ("Monet", "Seed_Images"), "objects": ("Cats", "Sea")}


def test_it_draws_in_shards_resumes_and_never_mixes_runs(tiny_base: Path, classifiers: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    begin(out, base=str(tiny_base), target="Monet", steps=1)
    with pytest.raises(DataError, match="20 of 20 pictures are not drawn"):
        judge(out, classifiers, **PART)
    assert list(draw(out, base=str(tiny_base), shard=0, shards=2, batch=4, **PART))[-1] == (10, 10)
    first = {path.name: path.read_bytes() for path in (out / "pictures").iterdir()}
    assert len(first) == 10
    # Killed half-way: what is there stays, the rest is drawn, to the same bytes.
    gone = sorted(first)[0]
    (out / "pictures" / gone).unlink()
    assert [done for done, _ in draw(out, base=str(tiny_base), shard=0, shards=2, batch=4, **PART)] == [9, 10]
    assert (out / "pictures" / gone).read_bytes() == first[gone]
    assert list(draw(out, base=str(tiny_base), shard=1, shards=2, batch=5, **PART))[-1] == (10, 10)
    metrics = judge(out, classifiers, **PART)
    samples = pd.read_parquet(out / "samples.parquet")
    assert len(samples) == 20
    assert metrics.ua == unlearncanvas_figures(samples, "Monet").ua
    assert [rate.count for rate in metrics.rates.values()] == [10, 10, 20]
    assert load(UnlearnCanvas, out / "metrics.json") == metrics
    with pytest.raises(ConfigError, match=r"pictures of another run .*target 'Monet'"):
        begin(out, base=str(tiny_base), target="Cats", steps=1)
    with pytest.raises(ConfigError, match="Shard 2 of 2"):
        next(draw(out, base=str(tiny_base), shard=2, shards=2))


def test_classifying_names_every_picture(classifiers: Path) -> None:
    loaded = load_classifiers(classifiers)
    assert set(loaded) == set(DOMAINS)
    pictures = [np.random.default_rng(i).integers(0, 255, (64, 64, 3), np.uint8) for i in range(3)]
    names, features = classify(loaded["style"], pictures, batch=2)
    assert len(names) == 3
    assert set(names) <= set(STYLES)
    assert features.shape == (3, 64)


@pytest.mark.slow
def test_one_command_runs_it_on_a_checkpoint(workspace: Path, classifiers: Path, tmp_path: Path) -> None:
    real = tmp_path / "real"
    for style in PART["styles"]:
        for thing in PART["objects"]:
            (real / style / thing).mkdir(parents=True)
            for number in range(1, 6):
                pixels = np.random.default_rng(number).integers(0, 255, (64, 64, 3), np.uint8)
                Image.fromarray(pixels).save(real / style / thing / f"{number}.jpg")
    arguments = [
        *("unlearncanvas", "--base", "data/base/canvas", "--target", "Cats", "--classifiers", str(classifiers)),
        *("--styles", ",".join(PART["styles"]), "--objects", ",".join(PART["objects"]), "--steps", "1"),
        *("--real", str(real), "-o", str(tmp_path / "out"), "--json", str(tmp_path / "found.json")),
        *("--parallel", "2"),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["kind"], found["ua"]["count"], found["seed_images"]) == ("object", 10, True)
    assert found["features"]["name"] == "style_classifier"
    assert found["features"]["fid"] > 0
    assert found["real_pictures"] == 10  # Cats left out
    assert "UA" in result.output
    # Asked again without the quirk: no picture is drawn again, and the photographs' theme is left out.
    drawn = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/pictures").iterdir()}
    assert len(drawn) == 20
    assert CliRunner().invoke(app, [*arguments, "--no-seed-images"]).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in drawn} == drawn
    without = json.loads((tmp_path / "found.json").read_text())
    assert (without["seed_images"], without["pictures"], without["ira"]["count"]) == (False, 10, 5)
