from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from dvc.repo import Repo
from typer.testing import CliRunner

from fade.errors import ConfigError, LineageError, ResourceError
from fade.requests.ledger import Ledger
from fade.requests.messages import make_message
from flows.cli.app import app
from flows.operations import backup as backups
from flows.operations.backup import MANIFEST, backup, restore
from tasks.dvc import versioning
from tests.databases import database
from tests.tiny import PROJECT


@pytest.fixture(params=["sqlite", "postgresql"])
def project(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project with a ledger of two requests, keys and a file of DVC's cache."""
    folder = tmp_path / "project"
    (folder / ".fade/keys").mkdir(parents=True)
    (folder / ".fade/keys/signing.pem").write_text("key")
    (folder / ".dvc/cache/files/md5/ab").mkdir(parents=True)
    (folder / ".dvc/cache/files/md5/ab/cd").write_text("bytes")
    (folder / "params.yaml").write_text("erasure: {}\n")
    monkeypatch.chdir(folder)
    with database(request.param, tmp_path) as url:
        monkeypatch.setenv("FADE_LEDGER_URL", url)
        ask("cat")
        ask("coffee")
        yield folder


def ask(concept: str) -> None:
    with Ledger() as ledger:
        ledger.submit(make_message(id=str(uuid.uuid4()), kind="object", concept=concept), PROJECT, actor="test")


def head() -> str:
    with Ledger() as ledger:
        return ledger.verify().head


def test_what_was_destroyed_comes_back_and_the_chain_ends_where_it_did(project: Path, tmp_path: Path) -> None:
    before = head()
    made = backup(tmp_path / "copy")
    assert made.head == before
    assert (tmp_path / "copy").stat().st_mode & 0o077 == 0, "the backup is its owner's alone"
    ask("rocket")
    assert head() != before
    shutil.rmtree(project / ".fade")
    shutil.rmtree(project / ".dvc")
    (project / "params.yaml").write_text("erasure: {threads: 1}\n")
    found = restore(tmp_path / "copy", force=True)
    assert (found.rows, found.head, head()) == (4, before, before)
    assert (project / ".fade/keys/signing.pem").read_text() == "key"
    assert (project / ".dvc/cache/files/md5/ab/cd").read_text() == "bytes"
    assert "threads" in (project / "params.yaml").read_text(), "what belongs to the machine stays as it is"
    ask("rocket")


def test_state_is_not_replaced_unasked(project: Path, tmp_path: Path) -> None:
    backup(tmp_path / "copy")
    with pytest.raises(ConfigError, match=r"State lies here already: .*--force"):
        restore(tmp_path / "copy")
    with pytest.raises(ConfigError, match="is not empty"):
        backup(tmp_path / "copy")


def test_a_damaged_or_foreign_backup_is_refused_before_anything_is_touched(project: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    backup(copy)
    before = head()
    (copy / "files/.fade/keys/signing.pem").write_text("kez")
    with pytest.raises(LineageError, match=r"changed since it was made: files/\.fade/keys/signing\.pem"):
        restore(copy, force=True)
    (copy / "files/.fade/keys/signing.pem").write_text("key")
    (copy / "more").write_text("x")
    with pytest.raises(LineageError, match="missing or added: more"):
        restore(copy, force=True)
    (copy / "more").unlink()
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["ledger"]["head"] = "0" * 64
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(LineageError, match="The restored ledger ends at row 4"):
        restore(copy, force=True)
    (copy / MANIFEST).unlink()
    with pytest.raises(ConfigError, match="is no backup"):
        restore(copy, force=True)
    assert head() == before


def test_a_cache_that_projects_share_is_backed_up_and_restored_where_it_lies(project: Path, tmp_path: Path) -> None:
    """Of a cache outside the project: this project's objects, and a restore takes nothing from the others'."""
    shutil.rmtree(project / ".dvc")
    shared = tmp_path / "shared"
    Repo.init(no_scm=True).close()
    with Repo() as repo, repo.config.edit() as settings:
        settings["cache"] = {"dir": str(shared)}
    (project / "data/catalog/mine").mkdir(parents=True)
    (project / "data/catalog/mine/1.png").write_bytes(b"a picture")
    assert versioning.track(Path("data/catalog/mine"))
    assert not (project / ".dvc/cache").exists()
    mine = sorted(path.relative_to(shared) for path in shared.rglob("*") if path.is_file())
    assert len(mine) == 2, "the picture, and the list of the folder"
    other = shared / "files/md5/00/another-projects"
    other.parent.mkdir(exist_ok=True)
    other.write_text("bytes")
    made = backup(tmp_path / "copy")
    assert (made.cache, made.cached) == (str(shared), 2)
    for path in mine:
        (shared / path).unlink()
    restore(tmp_path / "copy", force=True)
    assert sorted(path.relative_to(shared) for path in shared.rglob("*") if path.is_file()) == sorted(
        [*mine, other.relative_to(shared)]
    )


def test_newer_receipts_win_and_every_one_is_purged_again(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Receipts may be newer than the backup: on the machine, or in a folder that was saved elsewhere."""
    for name in ("a", "b", "c", "d"):
        (project / "data/erasures" / name).mkdir(parents=True)
    (project / "data/erasures/a/purge.json").write_text("old")
    backup(tmp_path / "copy")
    (project / "data/erasures/a/purge.json").write_text("old and new")
    (tmp_path / "saved/b").mkdir(parents=True)
    (tmp_path / "saved/b/purge.json").write_text("new")
    (project / "data/erasures/d/purge-begun.json").write_text("cut off")
    purged = []
    monkeypatch.setattr(backups.tracking, "find_version", lambda name: name)
    monkeypatch.setattr(
        backups,
        "purge_erasure",
        lambda name, folder, _: purged.append((name, *(one.read_text() for one in folder.iterdir()))),
    )
    found = restore(tmp_path / "copy", force=True, receipts=tmp_path / "saved")
    assert purged == [("a", "old and new"), ("b", "new"), ("d", "cut off")]
    assert found.purged == 3


def test_without_postgresqls_programs_it_says_so(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ResourceError, match="pg_dump is not to be found"):
        backup(tmp_path / "copy", databases=["postgresql://host/mlflow"])


def test_the_commands_take_folders_relative_to_where_they_are_given(workspace: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["backup", str(tmp_path / "copy")])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, ["restore", str(tmp_path / "nothing")])
    assert result.exit_code == 1
    assert "is no backup" in result.stderr
