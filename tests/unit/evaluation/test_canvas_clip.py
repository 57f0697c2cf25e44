"""The canvas' own CLIP: it tells what it was trained on, and its recipe trains."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fade.data.canvas import OBJECTS, render_all
from fade.data.styles import STYLES
from fade.errors import DataError
from fade.evaluation.clip_score import embedded_pictures, load_clip
from fade.evaluation.contrastive import captions_of, train_clip
from fade.evaluation.damage import SCRAMBLED
from fade.evaluation.distances import shuffled_patches
from fade.evaluation.zero_shot import calibrated, class_texts
from fade.lineage import ROOT

CLIP = ROOT / "data/canvas-clip"
MOST_BYTES = 4 * 10**6


def test_the_canvas_clip_names_crops_that_it_was_not_trained_on() -> None:
    assert sum(path.stat().st_size for path in CLIP.iterdir()) <= MOST_BYTES
    clip = load_clip(CLIP)
    holdout = list(render_all(split="holdout", per_pair=2, seed=23))
    first = np.array([one.index == 0 for one in holdout])
    pictures = np.stack([one.pixels for one in holdout])
    seen = embedded_pictures(clip, list(pictures))
    shuffled = embedded_pictures(clip, list(shuffled_patches(pictures, seed=1)))
    assert first.sum() == (~first).sum() > 100
    for kind, names in (("object", list(OBJECTS)), ("style", list(STYLES))):
        shown = np.array([getattr(one, kind) for one in holdout], dtype=object)
        texts = class_texts(clip, kind, names, sentences=4)
        # Levels from one crop of each, figures of another.
        classes = calibrated(names, texts, seen[first], shown[first].tolist(), shuffled[first])
        called = np.array(classes.called(seen[~first]), dtype=object)
        assert (called == shown[~first]).mean() >= 0.9, kind
        # It does not go by texture: it sees that patches are not in their places.
        mush = np.array(classes.called(shuffled[~first]), dtype=object)
        assert (mush == SCRAMBLED).mean() >= 0.9, kind
        raw = (seen @ texts.T).argmax(dim=1).numpy()
        assert (np.array([*names, SCRAMBLED], dtype=object)[raw] == shown).mean() >= 0.98, kind


def test_a_clip_is_trained_by_the_recipe_and_loads_as_any_other(tmp_path: Path) -> None:
    words = {"red": ("crimson",), "blue": ()}
    said = [one.text for one in captions_of(words, ["plain", "dotted"])]
    assert len(set(said)) == len(said)
    generator = np.random.default_rng(1)
    pictures = generator.integers(0, 40, (24, 32, 32, 3), dtype=np.uint8)
    objects, styles = ["red", "blue"] * 12, (["plain"] * 2 + ["dotted"] * 2) * 6
    for picture, thing in zip(pictures, objects, strict=True):
        picture[..., 0 if thing == "red" else 2] += 200
    made_by = {"words": words, "width": 32, "layers": 1, "patch": 16, "batch": 12, "damaged_share": 0.25, "seed": 3}
    losses = [
        loss
        for _, loss in train_clip(tmp_path / "clip", pictures, objects, styles, steps=30, learning_rate=3e-3, **made_by)
    ]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    clip = load_clip(tmp_path / "clip")
    texts = class_texts(clip, "object", ["red", "blue"], sentences=2)
    assert texts.shape == (3, 16)
    assert embedded_pictures(clip, list(pictures)).shape == (24, 16)


def test_no_pictures_train_no_clip(tmp_path: Path) -> None:
    empty = np.empty((0, 32, 32, 3), dtype=np.uint8)
    with pytest.raises(DataError, match="got 0"):
        next(
            train_clip(
                tmp_path, empty, [], [], words={}, width=32, layers=1, patch=16, steps=1, batch=2, learning_rate=1e-3,
                damaged_share=0.5, seed=1,
            )
        )  # fmt: skip
