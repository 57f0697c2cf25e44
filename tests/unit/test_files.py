"""Writing: what is there is whole, whenever the writer dies."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from fade.files import writing
from fade.lineage import content_hash

KILLED = """
import os, sys
from pathlib import Path
from fade.files import writing
left = int(sys.argv[2])
def die(event, _):
    global left
    if event == "os.rename":
        if not left:
            os._exit(9)
        left -= 1
    elif event == "shutil.rmtree" and not left:
        os._exit(9)
sys.addaudithook(die)
with writing(Path(sys.argv[1])) as temporary:
    temporary.mkdir()
    for name in ("a", "b"):
        (temporary / name).write_text("new")
"""


def _content(folder: Path) -> list[str]:
    return sorted(path.read_text() for path in folder.iterdir())


def _fill(folder: Path, text: str) -> None:
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).write_text(text)


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_writer_that_is_killed_leaves_a_whole_folder(tmp_path: Path, renames: int) -> None:
    folder = tmp_path / "[it]"
    _fill(folder, "old")
    died = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(renames)], check=False)
    assert died.returncode == 9
    there = [path for path in tmp_path.iterdir() if not path.name.endswith(".partial")]
    assert ["old", "old"] in [_content(path) for path in there]
    if renames != 1:
        assert _content(folder) == (["old"] * 2 if renames == 0 else ["new"] * 2)
    with writing(folder) as temporary:
        _fill(temporary, "newer")
    assert _content(folder) == ["newer", "newer"]
    assert not list(tmp_path.glob(".*.old")), "what was moved aside is not kept for ever"


def test_after_an_error_the_folder_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rename = tmp_path / "it", os.rename
    _fill(folder, "old")

    def refusing(source: Path, target: Path) -> None:
        if target == folder and source.name.endswith(".partial"):
            raise OSError("the disk is broken")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refusing)
    with pytest.raises(OSError, match="the disk is broken"), writing(folder) as temporary:
        _fill(temporary, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["it"]
    assert _content(folder) == ["old", "old"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_threads_that_write_one_path_do_not_meet(tmp_path: Path, kind: str) -> None:
    """All are at work at once: whichever ends last is there, whole, and nobody fails."""
    path, count = tmp_path / "it", 8
    all_begun = Barrier(count, timeout=30)

    def write(text: str) -> Path:
        with writing(path) as temporary:
            if kind == "folder":
                _fill(temporary, text)
            else:
                temporary.write_text(text)
            all_begun.wait()
            return temporary

    with ThreadPoolExecutor(count) as pool:
        temporaries = list(pool.map(write, map(str, range(count))))
    assert len(set(temporaries)) == count
    found = _content(path) if kind == "folder" else [path.read_text()]
    assert len(set(found)) == 1
    assert found[0] in map(str, range(count))
    assert list(tmp_path.iterdir()) == [path]


def test_a_kept_result_is_named_by_inputs_code_and_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    name = content_hash({"a": 1, "b": 2}, module="fade.names")
    assert name == content_hash({"b": 2, "a": 1}, module="fade.names")
    others = {
        content_hash({"a": 2, "b": 2}, module="fade.names"),
        content_hash({"a": 1, "b": 2}, module="fade.seeding"),
    }
    monkeypatch.setattr("fade.lineage.library_versions", lambda: {"torch": "0"})
    others.add(content_hash({"a": 1, "b": 2}, module="fade.names"))
    assert len(others | {name}) == 4
