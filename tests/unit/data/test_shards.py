"""Shards as people have them: cut, damaged, packed on a Mac or by plain tar; what is lost is always said."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fade.data.catalog import load_catalog
from fade.data.intake import build
from fade.data.loaders.webdataset import webdataset
from fade.files import read_json

COUNT = 8
Members = list[tuple[str, bytes]]


def picture(number: int) -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 255, (20, 20, 3), np.uint8)
    Image.fromarray(noise).save(stream, format="PNG")
    return stream.getvalue()


def members(name: str = "{}", count: int = COUNT) -> Members:
    names = [name.format(f"cat{number}") for number in range(count)]
    return [one for i, stem in enumerate(names) for one in ((f"{stem}.png", picture(i)), (f"{stem}.cls", b"cat"))]


def shard(path: Path, content: Members, mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, body in content:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    return path


def taken(root: Path, out: Path) -> tuple[pd.DataFrame, dict[str, str]]:
    list(build(out, webdataset(root), workers=1))
    aside = {one["name"]: one["reason"] for one in read_json(out / "rejected.json")["rejected"]}
    return load_catalog(out), aside


def _offsets(path: Path) -> list[int]:
    with tarfile.open(path) as archive:
        return [member.offset for member in archive]


def _damaged(whole: bytes, at: int, how: str) -> bytes:
    return {
        "cut in a header": whole[: at + 200],
        "cut between members": whole[:at],
        "cut in a picture": whole[: at + 600],
        "a damaged header": whole[:at] + b"\xff" * 512 + whole[at + 512 :],
        "a hole": whole[:at] + bytes(2048) + whole[at + 2048 :],
        "the end lost": whole[:at].rstrip(b"\0"),
    }[how]


HOW = ["cut in a header", "cut between members", "cut in a picture", "a damaged header", "a hole", "the end lost"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("member", [2 * COUNT // 2, 2 * COUNT // 2 + 1, 2 * COUNT - 1])
def test_what_a_damaged_shard_lost_is_said_and_the_rest_is_taken_in(how: str, member: int, tmp_path: Path) -> None:
    path = shard(tmp_path / "in/0.tar", members())
    table, aside = taken(tmp_path / "in", tmp_path / "whole")
    assert len(table) == COUNT
    assert aside == {}
    path.write_bytes(_damaged(path.read_bytes(), _offsets(path)[member], how))
    shard(tmp_path / "in/1.tar", members("b/{}", count=2))
    table, aside = taken(tmp_path / "in", tmp_path / "out")
    shards = table["image_id"].str.partition("/")[0].value_counts()
    assert shards["1"] == 2
    assert 0 < shards["0"] <= member // 2
    # A hole over a label alone, and nothing but zeros after it, is a picture without a label.
    assert set(aside) in [{"0.tar"}, {"0.tar", f"0.tar/cat{member // 2}"}, {f"0.tar/cat{member // 2}"}]
    assert how == "a hole" or f"first {shards['0']} samples" in aside["0.tar"]


def test_a_cut_compressed_shard_and_two_in_one_file_are_said(tmp_path: Path) -> None:
    path = shard(tmp_path / "in/0.tar.gz", members(), "w:gz")
    table, aside = taken(tmp_path / "in", tmp_path / "whole")
    assert table["image_id"].tolist() == [f"0/cat{i}" for i in range(COUNT)]
    assert aside == {}
    path.write_bytes(path.read_bytes()[:-2000])
    one = shard(tmp_path / "in/1.tar", members("b/{}", count=2))
    one.write_bytes(one.read_bytes() + one.read_bytes())
    table, aside = taken(tmp_path / "in", tmp_path / "out")
    assert set(aside) == {"0.tar.gz", "1.tar"}
    assert "several files in one" in aside["1.tar"]
    assert 0 < table["image_id"].str.startswith("0/").sum() < COUNT


def test_what_a_mac_adds_is_no_picture(tmp_path: Path) -> None:
    added = [(f"./._{name}", b"\0\5\x16\7" + bytes(80)) for name, _ in members()]
    added += [("__MACOSX/._cat0.png", b"\0\5\x16\7"), (".DS_Store", b"x")]
    mixed = [one for both in zip(added, members("./{}"), strict=False) for one in both]
    shard(tmp_path / "in/0.tar", mixed + added[-2:])
    shutil.copy(shard(tmp_path / "in/0.tar", mixed + added[-2:]), tmp_path / "in/._0.tar")
    table, aside = taken(tmp_path / "in", tmp_path / "out")
    assert table["image_id"].tolist() == [f"0/cat{i}" for i in range(COUNT)]
    assert aside == {}


def test_a_folder_packed_by_tar_is_read(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    for name, content in members():
        (tmp_path / "src" / name).write_bytes(content)
    (tmp_path / "in/train").mkdir(parents=True)
    packed = tmp_path / "in/train/0.tar"
    subprocess.run(["tar", "--sort=name", "-cf", str(packed), "-C", str(tmp_path / "src"), "."], check=True)
    with tarfile.open(packed) as archive:
        assert archive.getnames()[:2] == [".", "./cat0.cls"]
    table, aside = taken(tmp_path / "in", tmp_path / "out")
    assert table["image_id"].tolist() == [f"train/0/cat{i}" for i in range(COUNT)]
    assert set(table["split"]) == {"train", "holdout"}  # nothing is said of any other part
    assert aside == {}
    shutil.copytree(tmp_path / "in/train", tmp_path / "in/val")
    table, _ = taken(tmp_path / "in", tmp_path / "both")
    assert table.groupby(table["image_id"].str.partition("/")[0])["split"].unique().map(list).to_dict() == {
        "train": ["train"],
        "val": ["holdout"],
    }


def test_the_class_zero_is_a_label(tmp_path: Path) -> None:
    content = [(f"{i}.png", picture(i)) for i in range(4)]
    labels = [{"label": 0}, {"label": 0, "object": None}, {"label": 1}, {"label": ""}]
    content += [(f"{i}.json", json.dumps(label).encode()) for i, label in enumerate(labels)]
    content = sorted(content)
    shard(tmp_path / "in/0.tar", content)
    table, aside = taken(tmp_path / "in", tmp_path / "out")
    assert table["object"].tolist() == ["0", "0", "1"]
    assert "has no label" in aside["0.tar/3"]


def _linked(root: Path) -> None:
    with tarfile.open(root / "0.tar", "a") as archive:
        info = tarfile.TarInfo("z.png")
        info.type, info.linkname = tarfile.LNKTYPE, "cat0.png"
        archive.addfile(info)


CASES: dict[str, tuple[Members, str, str]] = {
    "a member twice": ([("z.png", picture(90)), ("z.png", picture(91)), ("z.cls", b"cat")], "0.tar/z", "two members"),
    "dots in a key": ([("cat.0.png", picture(90)), ("cat.0.cls", b"cat")], "0.tar/cat", "ends at the first dot"),
    "a label apart": ([("y.cls", b"cat"), ("z.png", picture(90))], "0.tar/z", "has no label"),
    "a list for a label": ([("z.png", picture(9)), ("z.json", b'{"label": [1, 2]}')], "0.tar/z", "one subject"),
    "json of a list": ([("z.png", picture(90)), ("z.json", b"[1]")], "0.tar/z", "expected an object"),
    "a text of other bytes": ([("z.cls", b"caf\xe9"), ("z.png", picture(90))], "0.tar/z", "cannot be read"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_sample_that_cannot_be_told_is_set_aside_alone(case: str, tmp_path: Path) -> None:
    content, name, reason = CASES[case]
    shard(tmp_path / "in/0.tar", members(count=2) + content)
    table, aside = taken(tmp_path / "in", tmp_path / "out")
    assert len(table) == 2
    assert reason in aside[name]


def test_a_link_in_a_shard_is_said(tmp_path: Path) -> None:
    shard(tmp_path / "in/0.tar", members(count=2))
    _linked(tmp_path / "in")
    table, aside = taken(tmp_path / "in", tmp_path / "out")
    assert len(table) == 2
    assert "is a link" in aside["0.tar/z"]
