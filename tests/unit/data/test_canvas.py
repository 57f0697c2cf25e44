from __future__ import annotations

import numpy as np
import pytest

from fade.data.canvas import OBJECTS, _crop_offset, render, render_all
from fade.data.styles import STYLES
from fade.errors import ConfigError
from fade.seeding import numpy_generator


def test_there_are_twelve_objects_in_ten_styles_and_two_known_persons() -> None:
    assert len(OBJECTS) == 12
    assert len(STYLES) == 10
    assert OBJECTS["astronaut"].person
    assert OBJECTS["admiral"].person


def test_a_picture_is_a_function_of_seed_split_object_and_index() -> None:
    first = render("cat", 4, split="train", seed=1)
    again = render("cat", 4, split="train", seed=1)
    assert all(np.array_equal(first[style], again[style]) for style in STYLES)
    for other in (
        render("cat", 5, split="train", seed=1),
        render("cat", 4, split="train", seed=2),
        render("cat", 4, split="holdout", seed=1),
    ):
        assert not np.array_equal(first["photo"], other["photo"])


def test_train_and_holdout_crops_share_no_cell() -> None:
    cells = {}
    for split in ("train", "holdout"):
        generator = numpy_generator(0, split)
        offsets = [_crop_offset(generator, split) for _ in range(500)]
        cells[split] = {(int((x + 1) * 2), int((y + 1) * 2)) for x, y in offsets}
    assert len(cells["train"]) == 12
    assert len(cells["holdout"]) == 4
    assert not cells["train"] & cells["holdout"]


def test_every_style_changes_every_object() -> None:
    for name in OBJECTS:
        pictures = render(name, 0, split="train", seed=0)
        for style, pixels in pictures.items():
            assert pixels.shape == (64, 64, 3)
            assert pixels.dtype == np.uint8
            if style != "photo":
                difference = np.abs(pixels.astype(float) - pictures["photo"]).mean()
                assert difference > 8, (name, style, difference)


def test_only_subjects_without_left_and_right_are_mirrored() -> None:
    assert not OBJECTS["horse"].flips
    assert not any(subject.flips for subject in OBJECTS.values() if subject.person)


def test_render_all_gives_every_pair_equally_often() -> None:
    pictures = list(render_all(split="holdout", per_pair=2, seed=0))
    counts: dict[tuple[str, str], int] = {}
    for picture in pictures:
        counts[picture.object, picture.style] = counts.get((picture.object, picture.style), 0) + 1
    assert len(counts) == 120
    assert set(counts.values()) == {2}


def test_an_unknown_object_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'astronaut'"):
        render("astronot", 0, split="train", seed=0)
    with pytest.raises(ConfigError, match="Unknown split 'test'"):
        render("cat", 0, split="test", seed=0)
