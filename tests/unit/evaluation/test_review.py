"""What a reviewer sees of pictures: thumbnails beside the page, neighbours first, and pages that stay small."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fade.concepts import Concept
from fade.evaluation.accuracy import canvas_protocol
from fade.evaluation.beside import BESIDE, GROUPS, WHEN, self_contained
from fade.evaluation.review import prompt_by_prompt
from tasks.mlflow import page as pages

MOST_BYTES = 5_000_000
CAT = Concept("cat", "object")


@pytest.mark.parametrize("size", [64, 512, 1024])
def test_prompts_are_shown_neighbours_first_by_thumbnails_that_keep_a_page_small(tmp_path: Path, size: int) -> None:
    objects, styles = ("cat", "dog", "tower", "boat"), tuple(f"style {number}" for number in range(10))
    samples = canvas_protocol(objects, styles, (188, 288))
    noise = np.random.default_rng(1).integers(0, 255, (size, size, 3), dtype=np.uint8)
    assert len(samples) * noise.nbytes > MOST_BYTES or size == 64, "whole, they would be too much for a page"
    pictures = np.broadcast_to(noise, (len(samples), *noise.shape))
    found = prompt_by_prompt(samples, pictures, 255 - pictures, [CAT], ["dog"])
    page = tmp_path / "report.html"
    page.write_text(found.part, encoding="utf-8")
    found.save(tmp_path)
    named = re.findall(rf'src="({BESIDE}/[^"]+)"', found.part)
    assert sorted(named) == sorted(f"{BESIDE}/{path.name}" for path in (tmp_path / BESIDE).iterdir())
    groups = [name.removeprefix(f"{BESIDE}/").split("-")[0] for name in named]
    assert list(dict.fromkeys(groups)) == list(GROUPS)
    assert groups.index("erased") == groups.count("neighbour") > 0, "neighbours stand together, and first"
    before, after = (np.asarray(Image.open(tmp_path / name), dtype=float).mean() for name in named[:2])
    assert abs(before + after - 255) < 3, "the base's picture stands beside the erased model's, of the same prompt"
    assert max(Image.open(tmp_path / named[0]).size) == min(size, 192)
    assert page.stat().st_size < 50_000, "no picture lies in it"
    alone = self_contained(page)
    assert not re.search(rf'src="{BESIDE}', alone)
    assert len(alone) < MOST_BYTES, "not even of noise, which compresses worst"
    first = re.search(r'src="data:image/jpeg;base64,([^"]+)"', alone)
    assert first is not None
    assert Image.open(io.BytesIO(base64.b64decode(first[1]))).size == Image.open(tmp_path / named[0]).size
    for path in (tmp_path / BESIDE).iterdir():
        path.unlink()
    assert 'src=""' in self_contained(page), "a purge took them"


def test_the_versions_page_refers_to_a_few_of_each_kind_and_to_none_that_is_gone() -> None:
    run = ("1" * 32, "1")
    files = {f"{BESIDE}/{group}-{number:02d}-{when}.jpg" for group in GROUPS for number in range(16) for when in WHEN}
    (said,) = pages._beside(_page(run, files))
    rows = [line for line in said.splitlines() if "get-artifact" in line]
    assert [row.split()[1] for row in rows] == [group for group in GROUPS for _ in range(3)]
    assert all("-base.jpg" in row.split("|")[2] and "-erased.jpg" in row.split("|")[3] for row in rows)
    assert len(said) < 2500, "the registry's databases hold 5000 characters"
    assert pages._beside(_page(run, {"sheet.png"})) == []


def _page(run: tuple[str, str], files: set[str]) -> pages.Page:
    return pages.Page(metrics=None, least={}, run=run, files=files)  # type: ignore[arg-type]
