"""A base and judges from any catalog: the same bytes, also in another process and after a training was cut off."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from fade.concepts import caption_variants
from fade.data.canvas import OBJECTS
from fade.data.catalog import load_catalog, load_concepts, load_templates
from fade.data.intake import build
from fade.data.sets import Item, PictureSet
from fade.errors import ConfigError, DataError
from fade.evaluation.judges import load_judge
from fade.files import read_json, sha256_file
from fade.models.training import loop as training
from fade.models.training import networks
from fade.models.training.steps import Checkpoint, StepStats
from fade.steps import train
from fade.steps.base import build_base
from fade.steps.catalog import build_catalog
from tests.tiny import JUDGES

BASE: dict[str, Any] = {
    "seed": 7,
    "threads": 1,
    "autoencoder": {"channels": [16, 16, 16], "latent_channels": 4, "steps": 4, "batch": 4, "learning_rate": 1e-3},
    "denoiser": {
        **{"channels": [16, 32], "text_width": 32, "text_layers": 1, "max_tokens": 8},
        **{"steps": 4, "batch": 4, "learning_rate": 1e-3, "ema_decay": 0.99},
    },
}
REPORT = {"seeds": [1], "steps": 2, "guidance": 4.0, "solver": "ddim", "batch": 60, "precision": "fp32", "threads": 1}


@pytest.fixture(scope="module")
def canvas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("catalog") / "canvas"
    build_catalog(folder, params={"seed": 5, "train_per_pair": 1, "holdout_per_pair": 1})
    return folder


def _pixels() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)


def _autoencoder(loop: Any, **options: Any) -> dict[str, torch.Tensor]:
    vae = training.new_autoencoder(BASE, size=32)
    losses = [step.loss for step in loop(vae, _pixels(), steps=6, batch=4, learning_rate=1e-3, seed=3, **options)]
    assert len(losses) > 0
    return {**vae.state_dict(), "scaling_factor": torch.tensor(vae.config.scaling_factor)}


def _denoiser(loop: Any, **options: Any) -> dict[str, torch.Tensor]:
    captions = [("a cat", "cat"), ("a dog", "dog")] * 4
    tokenizer = networks.build_tokenizer(["a cat", "cat", "a dog", "dog"], max_length=8)
    networks.seed_weights(3, "denoiser")
    text_encoder = networks.make_text_encoder(tokenizer, width=32, layers=1)
    unet = networks.make_unet([16, 32], latent_size=8, text_width=32)
    latents = torch.randn((8, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    for _ in loop(
        *(unet, text_encoder, tokenizer, latents, captions),
        **{"steps": 6, "batch": 4, "learning_rate": 1e-3, "ema_decay": 0.9, "seed": 3},
        **options,
    ):
        pass
    return {**unet.state_dict(), **{f"text.{n}": t for n, t in text_encoder.state_dict().items()}}


@pytest.mark.parametrize(
    ("whole", "loop"), [(_autoencoder, training.train_autoencoder), (_denoiser, training.train_denoiser)]
)
def test_a_training_gives_the_same_bytes_cut_off_or_not(whole: Any, loop: Any, tmp_path: Path) -> None:
    untrained = whole(lambda *_, **__: iter([StepStats("", 0, 0, 0.0)]))
    checkpoint = Checkpoint(tmp_path / "kept.safetensors", 2, "these pictures")
    through = whole(loop, checkpoint=checkpoint)
    assert any(not torch.equal(untrained[name], through[name]) for name in through)
    checkpoint.path.unlink()
    whole(lambda *given, **options: islice(loop(*given, **options), 5), checkpoint=checkpoint)  # killed there
    assert checkpoint.path.is_file()
    resumed = whole(loop, checkpoint=checkpoint)
    for name, tensor in through.items():
        assert torch.equal(tensor, resumed[name]), name
    with pytest.raises(ConfigError, match="other pictures or settings"):
        whole(loop, checkpoint=Checkpoint(checkpoint.path, 2, "others"))


def test_the_stage_of_the_canvas_base_gives_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    """Among them the tokenizer, whose trainer numbers what it meets in an order of its own."""
    code = (
        "import sys, json; from pathlib import Path; from fade.steps.base import build_base; "
        "build_base(Path(sys.argv[1]), params=json.loads(sys.argv[2]))"
    )
    params = {**BASE, "pictures_per_pair": 1}
    build_base(tmp_path / "one", params=params)
    command = [sys.executable, "-c", code, str(tmp_path / "two"), json.dumps(params)]
    subprocess.run(command, check=True, capture_output=True)
    files = [path for path in (tmp_path / "one").rglob("*") if path.is_file()]
    assert {"tokenizer.json", "model_index.json"} <= {path.name for path in files}
    for path in files:
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes(), path
    assert not list(tmp_path.glob(".*"))


def test_the_canvas_catalog_has_the_captions_its_base_learnt(canvas: Path) -> None:
    table = load_catalog(canvas)
    found = train.captions_of(table, load_concepts(canvas), load_templates(canvas))
    wanted = [caption_variants(row.object, row.style, OBJECTS[row.object].aliases) for row in table.itertuples()]
    assert [variants[0] for variants in found] == [variants[0] for variants in wanted]
    assert [set(variants) for variants in found] == [set(variants) for variants in wanted]
    own = train.captions_of(table.head(1), {}, None)
    assert own[0][0] == table["caption"][0]


def test_judges_and_base_from_a_catalog_by_the_commands_steps(canvas: Path, tmp_path: Path) -> None:
    judges, out = tmp_path / "judges", tmp_path / "base"
    assert len(list(train.train_judges(canvas, judges, params=JUDGES))) == 6
    assert load_judge(judges, "report").objects[0] == "astronaut"
    assert read_json(judges / "metrics.json")["report"]["holdout_pictures"] == 120
    steps = train.train_base(canvas, out, params=BASE)
    seen = [next(steps)[0] for _ in range(6)]
    assert seen[-1] == "denoiser"
    steps.close()
    assert not out.exists()
    rest = [step[0] for step in train.train_base(canvas, out, params=BASE)]
    assert "autoencoder" not in rest  # its checkpoint says that it is done
    StableDiffusionPipeline.from_pretrained(out)
    for _ in train.report_on(canvas, out, judges, tmp_path / "report", params=REPORT):
        pass
    metrics = read_json(tmp_path / "report/metrics.json")
    assert metrics["samples"] == metrics["report"]["object"]["count"] == 120
    assert (tmp_path / "report/sheet.png").is_file()
    for _ in train.train_base(canvas, tmp_path / "again", params=BASE):
        pass
    for path in out.rglob("*.safetensors"):
        assert sha256_file(path) == sha256_file(tmp_path / "again" / path.relative_to(out)), path
    assert not list(tmp_path.glob(".*"))


def test_what_cannot_be_trained_on_is_said_before_training(tmp_path: Path) -> None:
    def items(side: int, split: str | None) -> Any:
        pixels = np.random.default_rng(2).integers(0, 256, (4, side, side, 3), dtype=np.uint8)
        return (Item(f"{i}", f"{i}", one, "cat", split=split) for i, one in enumerate(pixels))

    for name, side, split in (("odd", 30, None), ("no holdout", 32, "train"), ("no train", 32, "holdout")):
        for _ in build(tmp_path / name, PictureSet(items(side, split), "s"), workers=1):
            pass
    with pytest.raises(DataError, match=r"30 x 30.*multiple of 8"):
        next(train.train_base(tmp_path / "odd", tmp_path / "out", params=BASE))
    with pytest.raises(DataError, match="holds no train pictures"):
        next(train.train_base(tmp_path / "no train", tmp_path / "out", params=BASE))
    with pytest.raises(DataError, match="holds no holdout pictures"):
        next(train.train_judges(tmp_path / "no holdout", tmp_path / "out", params=JUDGES))
