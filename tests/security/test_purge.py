"""What a purge leaves, also when it is killed: names and pictures outside the places that docs/security.md lists."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from fade.errors import ConfigError, LineageError
from fade.files import read_yaml, sha256_file
from fade.lineage import ROOT
from fade.requests import leases
from fade.requests.ledger import Ledger
from fade.requests.messages import make_message
from fade.temporary import abandoned, remove_abandoned, temporary_folder
from flows.proving import scan as scanning
from flows.proving import traces
from flows.queue.drain import DrainSettings, failure
from tasks.dvc.objects import md5_of, stores
from tasks.dvc.versioning import read_lock
from tests.chaos.purge import Children, Place, make_erasure, one_round
from tests.tiny import PROJECT


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A finished erasure of a person, kept to be brought back."""
    found = Place(tmp_path_factory.mktemp("purge"))
    assert Children().run(make_erasure, found) == 0
    found.keep()
    return found


@pytest.mark.slow
def test_a_purge_that_is_killed_and_gone_on_with_leaves_nothing_and_has_every_receipt(place: Place) -> None:
    """Of two versions' runs, the cache, a remote, both run-caches, and what killed writers left."""
    plain, *killed = one_round(place, Children(), random.Random(3), 3)
    assert plain["of"] > 100, "there are many places to be killed at"
    for one in (plain, *killed):
        assert (one["left"], one["missing"], one["unmarked"]) == ([], [], 0), one
        assert (one["state"], one["rows"]) == ("purged", 1)


def test_the_scan_finds_names_and_pictures_wherever_they_are_put(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.bring_back()
    monkeypatch.chdir(place.project)
    monkeypatch.setattr(scanning, "_in_the_log", lambda _: [])
    name, needle = "Roh Moo-hyun", b"bytes of a picture that nothing else has"
    assert scanning.scan([name], contents=[needle]) == []
    planted = {
        "data/evidence/x/Roh_Moo-hyun.json": b"{}",
        ".fade/prefect/prefect.log": b"Unknown concept. Did you mean 'ROH MOO-HYUN'?",
        ".fade/mlartifacts/1/artifacts/page.html": b"roh%20moo-hyun",
        "data/erasures/other/samples.bin": b"head " + needle + b" tail",
    }
    for path, content in planted.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content)
    found = scanning.scan([name], contents=[needle])
    assert len(found) == len(planted)
    assert sorted(one.what.split()[0] for one in found) == ["name", "name", "name", "picture"]
    assert not any("roh" in one.where.lower() for one in found), "the finding itself names nobody"


def test_what_another_erasure_needs_is_no_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base's own pictures of a prompt are the same for all; DVC knows them by another hash than the work tree."""
    monkeypatch.chdir(tmp_path)
    picture = tmp_path / "data/erasures/other/evaluation/beside/other-00-base.jpg"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"the base's picture")
    gone = [sha256_file(picture)]
    (found,) = scanning.scan(hashes=gone)
    assert found.what == f"picture {gone[0][:16]}"
    assert scanning.scan(hashes=gone, kept=[md5_of(picture)]) == []


def test_the_places_that_may_hold_names_are_those_of_the_page() -> None:
    page = (ROOT / "docs/security.md").read_text(encoding="utf-8")
    missing = [listed for listed in scanning.LISTED if f"`{listed}`" not in page]
    assert not missing


def test_a_picture_that_another_erasure_needs_is_kept_however_its_catalog_is_spelt(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.bring_back()
    monkeypatch.chdir(place.project)
    (folder,) = Path("data/erasures").iterdir()
    other = folder.with_name("other")
    shutil.copytree(folder, other)
    empty = SimpleNamespace(parts=lambda _: {}, read=lambda _: None)
    for spelt in ("data/catalog/canvas/", "./data/catalog/canvas", str(Path("data/catalog/canvas").resolve())):
        text = (folder / "spec.yaml").read_text().replace("data/catalog/canvas", spelt)
        (other / "spec.yaml").write_text(text)
        needed = traces.needed_by_others(folder, empty).pictures  # type: ignore[arg-type]
        assert set(pd.read_parquet(folder / "splits/forget.parquet")["sha256"]) <= needed
    (other / traces.BEGUN_NAME).write_text("{}")
    assert not traces.needed_by_others(folder, empty).pictures, "whose purge has begun needs nothing"  # type: ignore[arg-type]


def test_a_forged_lock_file_takes_nothing_that_stays(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever may write to MLflow says that the whole catalog, and the adapter, were the erasure's splits."""
    place.bring_back()
    monkeypatch.chdir(place.project)
    for name in ("_prefect_artifacts", "_prefect_results"):
        monkeypatch.setattr(traces, name, lambda _: [])
    # MLflow's library would keep this project's database open, and its address for the tests that follow.
    monkeypatch.setattr(traces.traces, "runs_of", lambda _: [])
    (folder,) = Path("data/erasures").iterdir()
    catalog = read_yaml(Path("data/catalog/canvas.dvc"))["outs"][0]["md5"]
    adapter = read_lock(folder / "dvc.lock")["distill"]["outs"][0]["md5"]

    def objects() -> set[str]:
        with stores() as opened:
            return {one.hash for one in traces.traces_of(folder, [], opened).things if one.place == "dvc cache"}

    honest = objects()
    assert len(honest) > 10
    forged = [{"outs": [{"path": f"{folder.as_posix()}/splits", "md5": md5}]} for md5 in (catalog, adapter)]
    locks = traces._locks
    monkeypatch.setattr(traces, "_locks", lambda given: [*locks(given), *forged])
    assert objects() == honest


def test_a_lock_file_after_a_merge_is_an_error_in_one_sentence(tmp_path: Path) -> None:
    lock = tmp_path / "dvc.lock"
    lock.write_text("schema: '2.0'\nstages:\n<<<<<<< HEAD\n  split: {}\n=======\n  split: {outs: []}\n>>>>>>> b\n")
    with pytest.raises(LineageError, match=r"dvc\.lock holds the marks of a merge, from line 3 on.*--ours"):
        read_lock(lock)
    lock.write_text("- 1\n")
    with pytest.raises(LineageError, match="is no lock file"):
        read_lock(lock)


def test_what_a_killed_program_left_in_a_temporary_folder_is_found_and_what_is_in_use_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    dies = (
        "import os\nfrom fade.temporary import temporary_folder\n"
        "with temporary_folder('audit') as folder:\n    (folder / 'picture.png').write_text('x'); os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", dies], check=False).returncode == 9
    with temporary_folder("audit") as used:
        (left,) = abandoned()
        assert (left / "picture.png").is_file()
        assert remove_abandoned() == 1
        assert used.is_dir()
        assert used.stat().st_mode & 0o077 == 0
    assert not any(path.is_dir() for path in (tmp_path / ".fade/tmp").iterdir())


def test_a_refusal_that_suggests_another_name_leaves_it_in_no_place_that_stays(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The words are with the request, which can be minimised; the log, which cannot be changed, has the kind."""
    place.bring_back()
    monkeypatch.chdir(place.project)
    with Ledger() as ledger:
        asked, _ = ledger.submit(
            make_message(id=str(uuid.uuid4()), kind="object", concept="roh"), PROJECT, actor="test"
        )
        lease = leases.take(ledger, "w", seconds=60)
        assert lease
        refusal = ConfigError("Unknown concept 'roh'. Did you mean 'Roh Moo-hyun'?")
        leases.finish(ledger, lease, **failure(lease.request, refusal, DrainSettings()))
        assert "Roh Moo-hyun" in str(ledger.get(asked.id).reason)
        assert scanning.scan(["Roh Moo-hyun"]) == []
        ledger.append("note", actor="test", reason="for Roh Moo-hyun")
        assert [one.what for one in scanning.scan(["Roh Moo-hyun"])] == ["name"], "a row that does name is found"


def test_validation_leaves_no_page_but_its_own(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.expectations.validation import validate_catalog

    place.bring_back()
    monkeypatch.chdir(place.project)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    validate_catalog(Path("data/catalog/canvas"), files=False)
    assert Path("data/catalog/canvas.docs/index.html").is_file()
    assert not list(tmp_path.rglob("*"))
