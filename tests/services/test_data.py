"""Catalogs and splits under DVC: pushed to a folder and to a real S3 server, pulled back, deleted in every store."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from dvc.repo import Repo
from typer.testing import CliRunner

from fade.config import load_settings
from fade.errors import LineageError
from fade.files import sha256_file
from fade.lineage import ROOT
from fade.spec import make_spec
from fade.steps.split import hashes, split
from flows.cli.app import app
from flows.erasing.erase import prepare_folder
from tasks.dvc import objects, versioning
from tests.unit.data.test_loaders import _save


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a tracked catalog of its own and one erasure whose splits are recorded."""
    folder = tmp_path / "project"
    folder.mkdir()
    Repo.init(str(folder), no_scm=True).close()
    (folder / "dvc.yaml").write_text("stages: {}\n")
    shutil.copy(ROOT / "params.yaml", folder)
    monkeypatch.setenv("FADE_ROOT", str(folder))
    monkeypatch.chdir(folder)
    for name in ("cat", "horse", "coffee"):
        for number in range(4):
            _save(tmp_path / "in" / name / f"{number}.jpg", name, number)
    run("catalog", "build", "folder", str(tmp_path / "in"), "--out", "data/catalog/mine", "--size", "64")
    settings = load_settings(Path("params.yaml"))
    spec = make_spec(
        **{"concept": "cat", "kind": "object", "surrogate": "horse", "base": "b", "base_sha256": "0" * 64},
        **{"catalog": "data/catalog/mine", "judges": "j", **settings.model_dump()},
    )
    erasure = prepare_folder(spec)
    split(erasure)
    versioning.record(erasure, "split")
    return folder


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an S3 server on loopback with a bucket."""
    import boto3
    from moto.server import ThreadedMotoServer

    for name, value in (("ACCESS_KEY_ID", "test"), ("SECRET_ACCESS_KEY", "test"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    boto3.client("s3", endpoint_url=address).create_bucket(Bucket="fade")
    yield address
    server.stop()


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments, "--json", "out.json"])
    assert result.exit_code == 0, result.output
    return result.output


def figures() -> dict[str, int]:
    content: dict[str, int] = json.loads(Path("out.json").read_text())
    return content


def add_remote(url: str, **options: str) -> None:
    with Repo(".") as repo, repo.config.edit() as config:
        config["remote"]["store"] = {"url": url, **options}
        config["core"]["remote"] = "store"


def files(*folders: str) -> dict[str, str]:
    return {path.as_posix(): sha256_file(path) for f in folders for path in Path(f).rglob("*") if path.is_file()}


def there_and_back() -> None:
    before = files("data/catalog/mine", *(str(path) for path in Path("data/erasures").glob("*/splits")))
    assert sum(name.endswith(".png") for name in before) == 13
    assert sum("/splits/" in name for name in before) == 5
    run("data", "push")
    assert figures()["sent"] >= len(before)
    run("data", "push")
    assert figures()["sent"] == 0
    shutil.rmtree("data/catalog/mine")
    shutil.rmtree(".dvc/cache")
    for path in Path("data/erasures").glob("*/splits"):
        shutil.rmtree(path)
    run("data", "pull")
    assert figures()["fetched"] >= len(before)
    assert files("data/catalog/mine", *(str(path) for path in Path("data/erasures").glob("*/splits"))) == before


def test_a_folder_as_remote(project: Path, tmp_path: Path) -> None:
    with pytest.raises(LineageError, match="No DVC remote is the default"):
        versioning.push()
    add_remote(str(tmp_path / "store"))
    with pytest.raises(LineageError, match="No DVC remote 'other': known are store"):
        versioning.pull("other")
    there_and_back()


def test_an_s3_server_as_remote_which_may_be_gone(project: Path, s3: str) -> None:
    add_remote("s3://fade/pictures", endpointurl=s3)
    import boto3

    there_and_back()
    objects = boto3.client("s3", endpoint_url=s3).list_objects_v2(Bucket="fade")
    assert objects["KeyCount"] > 10
    add_remote("s3://nobody/pictures", endpointurl=s3)
    with pytest.raises(LineageError, match="DVC could not push"):
        versioning.push()


def _places_of(md5: str) -> list[str]:
    with objects.stores() as stores:
        return [place for place, _ in stores.places(md5)]


def test_a_deleted_picture_leaves_cache_and_remote_and_does_not_come_back(project: Path, tmp_path: Path) -> None:
    add_remote(str(tmp_path / "store"))
    run("data", "push")
    gone = Path("data/catalog/mine/pictures/cat/2.png")
    md5 = objects.md5_of(gone)
    for path in (gone, Path("data/catalog/mine/sheet.png")):
        assert _places_of(objects.md5_of(path)) == ["dvc cache", "dvc remote store"]
    run("catalog", "delete", "data/catalog/mine", "--image-id", "cat/2")
    assert figures() == {"deleted": 1, "copies": 4}, "the picture, and the sheet that may have shown it"
    assert _places_of(md5) == []
    assert _places_of(objects.md5_of(Path("data/catalog/mine/sheet.png"))) == ["dvc cache"], "the one of now is there"
    run("data", "push")
    shutil.rmtree("data/catalog/mine")
    run("data", "pull")
    assert not gone.exists()
    assert Path("data/catalog/mine/pictures/cat/1.png").is_file()
    rows = pd.read_parquet("data/catalog/mine/catalog.parquet").set_index("image_id")
    assert rows["deleted_at"].notna()["cat/2"]


def test_the_hash_of_each_split_follows_its_bytes(project: Path) -> None:
    (erasure,) = Path("data/erasures").iterdir()
    before = hashes(erasure)
    assert set(before) == {"forget", "surrogate", "retain", "holdout", "held_out"}
    table = pd.read_parquet(erasure / "splits/forget.parquet")
    table.assign(licence="other").to_parquet(erasure / "splits/forget.parquet", index=False)
    after = hashes(erasure)
    assert {name for name in before if before[name] != after[name]} == {"forget"}
