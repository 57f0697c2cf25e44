"""The benchmark of depth on a tiny base."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from benchmarks import depth, never_seen
from fade.errors import ConfigError, DataError
from fade.files import read_json
from fade.models.family import load_base
from fade.project import load_project


def test_the_record_counts_every_picture_at_every_stop(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["--concepts", "cat", "--levels", "fade-closed-form", "--steps", "1,2", "--restarts", "4", "--batch", "4"]
    asked += ["--spaces", "state,word,prompt,inpaint,led"]
    monkeypatch.setattr(sys, "argv", ["depth.py", *asked, "--json", str(tmp_path / "depth.json")])
    monkeypatch.setattr(depth, "OUT", tmp_path / "trials")
    depth.main()
    rows = read_json(tmp_path / "depth.json")["rows"]
    assert [(row["level"], row["space"]) for row in rows] == [
        ("fade-closed-form", "state"),
        ("fade-closed-form", "word"),
        ("fade-closed-form", "prompt"),
        ("fade-closed-form", "inpaint"),
        ("fade-closed-form", "led"),
    ]
    led, covered = rows.pop(), rows.pop()
    assert led["success"]["0"][1] == led["base"]["0"][1] == 8
    assert covered["success"]["0"][1] == covered["base"]["0"][1] == 16  # four pictures, each half of each
    for row in rows:
        for success in (row["success"], row["base"]):
            assert set(success) == {"1", "2"}
            assert all(count == 8 for _, count in success.values())  # four restarts, two seeds each
            assert 0 <= success["1"][0] <= success["2"][0] <= 8
        assert {"drift", "ira", "cra", "base_ira", "base_cra", "seconds", "adapter_bytes"} <= set(row)
    for row in rows[1:]:
        assert {n: one["2"][1] for n, one in row["tokens"].items()} == {"1": 4, "4": 4}
    assert len(rows[2]["prompts"]) == 4
    for name in ("depth.png", "depth-price.png"):
        assert (tmp_path / name).stat().st_size > 0


def test_a_row_takes_the_place_of_what_was_measured_before_and_of_nothing_else() -> None:
    def row(concept: str, space: str, hits: int, judge: str = "report") -> dict[str, object]:
        measured = {"success": {"100": [hits, 16]}, "budget": {"judge": judge}}
        return {"concept": concept, "level": "deep", "space": space, **measured}

    before = [row("cat", "state", 3), row("cat", "word", 1), row("cat", "state", 5, judge="development")]
    assert depth.gaining(before, row("oil", "state", 2)) == [*before, row("oil", "state", 2)]
    assert depth.gaining(before, row("cat", "state", 9)) == [*before[1:], row("cat", "state", 9)]


def test_a_level_says_its_methods_settings() -> None:
    level = "stereo@learning_rate=0.0003@rounds=3"
    assert depth.method_of(level) == "stereo"
    assert depth.settings_of(level) == {"stereo.learning_rate": 3e-4, "stereo.rounds": 3}
    assert (depth.method_of("name"), depth.settings_of("name")) == ("ours", {})


def test_what_a_base_never_saw_is_searched_for_by_the_judge_of_another_catalog(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = load_project()
    asked = ["--base", project.base, "--catalog", project.catalog, "--judges", project.judges, "--steps", "1,2"]

    def run(concept: str) -> None:
        monkeypatch.setattr(
            sys, "argv", ["never_seen", *asked, "--concepts", concept, "--json", str(tmp_path / "unseen.json")]
        )
        never_seen.main()

    run("cat")
    run("cat")
    rows = read_json(tmp_path / "unseen.json")["rows"]
    assert [row["concept"] for row in rows] == ["cat"], "a row that is measured again takes its place"
    for row in rows:
        assert list(row["success"]) == ["1", "2"]
        assert all(count == 16 and 0 <= hits <= count for hits, count in row["success"].values())
        assert row["success"]["1"][0] <= row["success"]["2"][0]
        assert row["loss"]["1"] > 0
        assert 0 <= row["judge"][0] <= row["judge"][1] > 0
        assert list(tmp_path.glob(f"unseen-*-{row['concept']}.png"))
    with pytest.raises(DataError, match="no training pictures of an object 'unicorn'"):
        run("unicorn")


def test_a_base_is_trained_again_without_what_it_shall_not_know(tmp_path: Path) -> None:
    settings = {"channels": [16, 32], "text_width": 32, "text_layers": 1, "max_tokens": 24, "steps": 2, "batch": 4}
    params = {"seed": 7, "pictures_per_pair": 1, "denoiser": settings | {"learning_rate": 1e-3, "ema_decay": 0.9}}
    with pytest.raises(ConfigError, match="no object 'unicorn'"):
        never_seen.retrain(tmp_path / "base", ["cat", "unicorn"], params=params)
    for name in ("base", "again"):
        never_seen.retrain(tmp_path / name, ["cat"], params=params)
    made, again, canvas = (load_base(path) for path in (tmp_path / "base", tmp_path / "again", never_seen.CANVAS))
    assert made.sha256 == again.sha256 != canvas.sha256
    words = {
        name: CLIPTokenizer.from_pretrained(tmp_path / "base" / "tokenizer").tokenize(name) for name in ("cat", "horse")
    }
    assert len(words["horse"]) == 1 < len(words["cat"]), "no caption said the name"
    places = (never_seen.CANVAS, tmp_path / "base")
    autoencoders = [
        AutoencoderKL.from_pretrained(place, subfolder="vae", torch_dtype=torch.float32) for place in places
    ]
    for name, kept in autoencoders[0].state_dict().items():
        assert torch.equal(autoencoders[1].state_dict()[name], kept)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "base"], (
        "nothing is left of what was under way"
    )
