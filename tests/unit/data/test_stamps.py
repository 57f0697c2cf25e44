"""The wide canvas, on a small folder in the package's layout that the test draws itself."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from fade.data import stamps as module
from fade.data.catalog import load_catalog, load_concepts
from fade.data.loaders import stamps as loader
from fade.data.stamps import STYLES, Stamp, cut_out, find_stamps, render, stamps
from fade.errors import ConfigError, DataError
from fade.evaluation.neighbours import find_neighbours
from fade.models.family import load_base
from flows.cli.app import app
from tests.tiny import save_tiny_base

FEW = {
    "disc": Stamp("food/disc.png", "disc", "round"),
    "ring": Stamp("food/ring.png", "ring", "round"),
    "bar": Stamp("tools/bar.png", "bar", "long"),
    "stick": Stamp("tools/stick.png", "stick", "long"),
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package, unpacked: four cut-outs on transparent ground, and a table that names them."""
    below = tmp_path / "package/usr/share/tuxpaint/stamps"
    for name, stamp in FEW.items():
        image = Image.new("RGBA", (90, 60), (255, 0, 255, 0))
        draw = ImageDraw.Draw(image)
        if name in ("disc", "ring"):
            draw.ellipse((20, 5, 70, 55), fill=(200, 40, 30, 255))
        if name == "ring":
            draw.ellipse((35, 20, 55, 40), fill=(255, 0, 255, 0))
        if name in ("bar", "stick"):
            draw.rectangle((5, 25, 85, 35 if name == "bar" else 28), fill=(230, 230, 90, 255))
        (below / stamp.file).parent.mkdir(parents=True, exist_ok=True)
        image.save(below / stamp.file)
    monkeypatch.setattr(module, "stamps", lambda: FEW)
    monkeypatch.setattr(loader, "stamps", lambda: FEW)
    monkeypatch.setattr(loader, "PER_PAIR", {"train": 2, "holdout": 1})
    cut_out.cache_clear()
    return tmp_path / "package"


def test_the_table_names_enough_objects_once_each_with_a_neighbour() -> None:
    table = stamps()
    groups = Counter(stamp.group for stamp in table.values())
    assert len(table) >= 120
    assert len({stamp.file for stamp in table.values()}) == len(table)
    assert min(groups.values()) >= 2, groups
    assert {"hoofed animals", "big cats", "birds", "citrus fruit", "apples", "tools", "planets"} <= set(groups)
    assert not any(word in stamp.file for stamp in table.values() for word in ("cartoon", "mirror"))


def test_the_package_is_found_unpacked_or_installed_and_what_it_lacks_is_named(package: Path) -> None:
    inside = package / "usr/share/tuxpaint/stamps"
    assert find_stamps(package) == find_stamps(inside) == inside
    (inside / "tools/bar.png").unlink()
    with pytest.raises(DataError, match=r"lacks 1 of the 4 .*tools/bar\.png"):
        find_stamps(package)
    with pytest.raises(DataError, match="dpkg-deb -x"):
        find_stamps(inside / "food/disc.png")


def test_a_rendering_is_a_function_of_its_index_and_the_same_in_every_style(package: Path) -> None:
    folder = find_stamps(package)
    one = render(FEW["disc"], folder, 0, split="train", seed=1)
    assert list(one) == list(STYLES)
    assert all(picture.shape == (64, 64, 3) and picture.dtype == np.uint8 for picture in one.values())
    again = render(FEW["disc"], folder, 0, split="train", seed=1)
    assert all(np.array_equal(one[style], again[style]) for style in STYLES)
    for other in (
        render(FEW["disc"], folder, 1, split="train", seed=1),
        render(FEW["disc"], folder, 0, split="holdout", seed=1),
        render(FEW["disc"], folder, 0, split="train", seed=2),
        render(FEW["ring"], folder, 0, split="train", seed=1),
    ):
        assert not np.array_equal(one["photo"], other["photo"])
    # One rendering underlies all styles: the photograph filtered is the filtered picture, to a step of a byte.
    painted = STYLES["sepia"](one["photo"].astype(np.float32) / 255)
    assert np.abs(painted * 255 - one["sepia"].astype(np.float32)).mean() < 2
    with pytest.raises(ConfigError, match="Unknown split"):
        render(FEW["disc"], folder, 0, split="test", seed=1)


def test_transparent_pixels_lend_no_colour_and_an_empty_stamp_is_refused(package: Path) -> None:
    folder = find_stamps(package)
    sheet = cut_out(folder / FEW["ring"].file)
    middle = sheet[module._WORK, module._WORK]
    assert middle[3] == 0, "the ring has a hole"
    # The hole and the outside are magenta where nothing shows: no blue reaches the picture.
    assert sheet[..., 2].max() < 0.2
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(folder / "food/disc.png")
    cut_out.cache_clear()
    with pytest.raises(DataError, match="transparent all over"):
        render(FEW["disc"], folder, 0, split="train", seed=1)


@pytest.mark.parametrize("dark", [True, False])
def test_the_ground_is_light_behind_what_is_dark(package: Path, dark: bool) -> None:
    path = find_stamps(package) / "food/disc.png"
    Image.new("RGBA", (50, 50), (20, 20, 20, 255) if dark else (240, 240, 240, 255)).save(path)
    cut_out.cache_clear()
    for index in range(4):
        picture = render(replace(FEW["disc"]), find_stamps(package), index, split="train", seed=5)["photo"]
        corner, middle = picture[:3, :3].mean(), picture[30:34, 30:34].mean()
        assert abs(corner - middle) > 60
        assert (corner > middle) == dark


def test_the_command_builds_a_catalog_whose_concepts_know_their_group(package: Path, tmp_path: Path) -> None:
    out = tmp_path / "catalog"
    result = CliRunner().invoke(app, ["catalog", "build", "stamps", str(package), "-o", str(out), "--workers", "1"])
    assert result.exit_code == 0, result.output
    table = load_catalog(out)
    assert len(table) == len(FEW) * len(STYLES) * 3
    assert set(table["split"]) == {"train", "holdout"}
    assert table["licence"].str.contains("GPL-2").all()
    assert "tuxpaint-stamps-default/food/disc.png" in set(table["source"])
    concepts = load_concepts(out)
    assert concepts["disc"].group == concepts["ring"].group == "round"
    assert concepts["sepia"].group == concepts["selenium"].group != concepts["photo"].group
    save_tiny_base(tmp_path / "base", names=(FEW, STYLES))
    base = load_base(str(tmp_path / "base"))
    # Neighbours are those of the group, whatever the text encoder takes for near; the surrogate is none.
    assert find_neighbours(base, concepts["disc"], None, concepts.values()) == ["ring"]
    assert find_neighbours(base, concepts["disc"], concepts["bar"], concepts.values()) == ["ring"]
    alone = find_neighbours(base, concepts["disc"], concepts["ring"], concepts.values())
    assert set(alone) == {"bar", "stick"}, "with nobody of the group left, the nearest by text"
