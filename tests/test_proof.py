"""Audit, evidence, purge, rebase: what is proved after an erasure is live."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from fade.adapters.manifest import read_manifest
from fade.config import load_request, load_settings
from fade.errors import ConfigError, SignatureError
from fade.files import read_json, sha256_file
from fade.requests.evidence import verify_evidence
from fade.requests.ledger import Ledger
from fade.signing import public_key
from fade.steps.request import prepare_request
from flows import audit as audits
from flows import release
from flows.cli import app
from flows.erase import ERASURES, erase, prepare_folder
from flows.purge import Receipt, purge
from flows.rebase import on_base, rebase
from tasks import _tracking, _versioning
from tests.tiny import save_tiny_base

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]
FAST = {"distill.precision": "fp32", "evaluate.precision": "fp32", "evaluate.steps": 1, "threads": 1}
OWN_SEED = {"evaluate.seeds": [61]}
"""No other erasure of the session is judged by it: what a judge says of a tiny base's noise is else the same bytes."""


@pytest.fixture(scope="module")
def erased(workspace: Path) -> tuple[Path, _tracking.AdapterVersion]:
    request = prepare_request(
        "coins", "coffee", settings=load_settings(Path("params.yaml"), changes={**FAST, **OWN_SEED})
    )
    return prepare_folder(request), erase(request.id)


def _run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_an_audit_finds_what_differs_and_by_how_much(
    erased: tuple[Path, _tracking.AdapterVersion], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, version = erased
    changed = tmp_path / "other"

    def repeat(clone: Path, at: Path) -> None:
        """As the clone's DVC would leave it, with another saliency."""
        lock = yaml.safe_load((clone / at / "dvc.lock").read_text())
        for stage in lock["stages"].values():
            for out in stage["outs"]:
                if out["path"].endswith("metrics") or out["path"].endswith("evaluation"):
                    out["md5"] = "0" * 32
                    shutil.copytree(out["path"], clone / out["path"])
                    metrics = clone / out["path"] / "metrics.json"
                    found = json.loads(metrics.read_text())
                    metrics.write_text(json.dumps({**found, "drift": found["drift"] + 0.25}))
        (clone / at / "dvc.lock").write_text(yaml.safe_dump(lock))
        shutil.copytree(clone / at, changed)

    monkeypatch.setattr(audits, "_repeat", repeat)
    report = audits.audit(version, folder)
    assert [row["path"].rsplit("/", 1)[1] for row in report["rows"] if not row["equal"]] == ["evaluation"]
    assert report["different"] == 1
    assert next(row for row in report["rows"] if not row["equal"])["largest_difference"] == pytest.approx(0.25)
    assert report["compared"] > 20
    assert (changed / "request.yaml").read_bytes() == (folder / "request.yaml").read_bytes()
    assert "1 hashes differ" in (audits.AUDITS / folder.name / "report.md").read_text()


def test_a_clean_clone_makes_every_hash_again(erased: tuple[Path, _tracking.AdapterVersion]) -> None:
    folder, _ = erased
    result = _run("audit", folder.name)
    report = read_json(audits.AUDITS / folder.name / "report.json")
    outputs = [row for row in report["rows"] if row["path"].startswith("data/erasures/")]
    assert len(outputs) >= 8
    assert all(row["equal"] for row in outputs), result.output
    if report["commit_holds_all_the_code"]:
        assert report["equal"], result.output


def test_what_another_erasure_needs_is_kept_and_said(erased: tuple[Path, _tracking.AdapterVersion]) -> None:
    folder, version = erased
    other = ERASURES / "e0ther000000"
    version = replace(version, release=release.LIVE)

    def listed() -> dict[str, list[Receipt]]:
        with Ledger() as ledger:
            found = purge(version, folder, ledger, dry_run=True)
        return {
            "bytes": [one for one in found if one.place == "dvc cache"],
            "pictures": [one for one in found if one.name.startswith("picture ") and one.place == "work tree"],
            "own": [one for one in found if one.name.startswith(folder.as_posix())],
        }

    alone = listed()
    assert {one.name for one in alone["bytes"] if one.removed} >= {"splits", "saliency.safetensors", "evaluation"}
    assert alone["own"]
    # Another erasure of the same concept with the same settings: its lock file names the same objects.
    shutil.copytree(folder, other)
    try:
        shared = listed()
        assert {one.reason for one in shared["bytes"]} == {"another erasure needs the same bytes"}
        assert {one.reason for one in shared["pictures"]} == {"another erasure needs the same picture"}
        assert not any(one.removed for one in shared["bytes"] + shared["pictures"])
        assert all(one.removed for one in shared["own"]), "its own folder's copies go all the same"
        (other / "purge.json").write_text("{}")
        assert {one.hash for one in listed()["bytes"] if one.removed} == {
            one.hash for one in alone["bytes"] if one.removed
        }, "what was purged needs nothing any more"
    finally:
        shutil.rmtree(other)


def test_the_log_the_evidence_and_the_purge_belong_together(  # noqa: PLR0915
    erased: tuple[Path, _tracking.AdapterVersion], tmp_path: Path
) -> None:
    folder, version = erased
    with Ledger() as ledger, pytest.raises(ConfigError, match="is not live"):
        purge(version, folder, ledger)
    assert _run("approve", folder.name).exit_code == 0
    version = _tracking.find_version(folder.name)
    with Ledger() as ledger:
        (row,) = ledger.history(erasure_id=folder.name)
        assert row.event == "release.live"
        assert row.details["adapter_sha256"] == version.adapter_sha256
        listed = purge(version, folder, ledger, dry_run=True)
    split = pd.read_parquet(folder / "splits/forget.parquet")
    pictures = [Path("data/catalog/canvas") / name for name in split["path"].unique()] if "path" in split else []
    gone = {
        path: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name in ("sheet.png", "samples.parquet", "saliency.safetensors")
    }
    assert len(gone) == 3
    assert {one.place for one in listed} >= {"work tree", "dvc cache", "mlflow", "prefect"}
    assert all(path.is_file() for path in gone), "a dry run removes nothing"
    backup = tmp_path / "backup"
    shutil.copytree(folder, backup)
    assert _run("purge", folder.name).exit_code == 0
    stores = [*Path(".dvc/cache").rglob("*"), *Path(".fade/mlartifacts").rglob("*"), *folder.rglob("*")]
    left = {sha256_file(path) for path in stores if path.is_file()}
    import hashlib

    assert not left & {hashlib.sha256(content).hexdigest() for content in gone.values()}
    receipts = read_json(folder / "purge.json")["payload"]["receipts"]
    assert len([one for one in receipts if one["removed"]]) > 10
    kept = {one["hash"] for one in receipts if not one["removed"]}
    assert all(path.is_file() is (sha256_file(path) in kept) for path in pictures if path.exists())
    assert not (folder / "splits").exists()
    assert (folder / "adapter/card.json").is_file()
    # A backup is restored, and purged again.
    shutil.copytree(backup / "splits", folder / "splits")
    shutil.copyfile(backup / "saliency.safetensors", folder / "saliency.safetensors")
    assert _run("purge").exit_code == 0
    assert not (folder / "splits").exists()
    assert not (folder / "saliency.safetensors").exists()
    assert _run("evidence", "seal", folder.name).exit_code == 0
    bundle = Path("data/evidence") / folder.name
    key = public_key(release.KEYS / "public.pem")
    content = verify_evidence(bundle, key)
    assert [row["event"] for row in content["chain"]["rows"]][:2] == ["release.live", "purge"]
    assert content["purge"]["state"] == "purged"
    assert not any(
        name in (bundle / file).read_text().lower()
        for name in ("coins", "coffee")
        for file in ("evidence.json", "evidence.html")
    )
    page = (bundle / "evidence.html").read_bytes()
    (bundle / "evidence.html").write_bytes(page.replace(b"live", b"dead"))
    with pytest.raises(SignatureError, match=r"evidence\.html is missing or was changed"):
        verify_evidence(bundle, key)
    (bundle / "evidence.html").write_bytes(page)
    assert _run("evidence", "verify", str(bundle)).exit_code == 0
    # The release does not need what was purged.
    assert _run("release").exit_code == 0
    manifest = read_manifest(release.release_folder(version.base_sha256), key)
    assert f"{version.model}/{version.version}" in manifest.names
    with Ledger() as ledger:
        assert ledger.verify().rows >= 4


def test_live_erasures_are_made_again_on_another_base_and_none_is_approved(
    erased: tuple[Path, _tracking.AdapterVersion],
) -> None:
    folder, _ = erased
    if not _tracking.find_version(folder.name).live:
        assert _run("approve", folder.name).exit_code == 0
    for model in _tracking.approved_now():
        if model != f"erasure-{folder.name}":
            _tracking.rollback(model)
    save_tiny_base(Path("data/base/other"), seed=7)
    (one,) = rebase("data/base/other", lambda _: None)
    assert one.passed, one.reason
    assert one.new is not None
    assert one.new.base_sha256 != _tracking.find_version(folder.name).base_sha256
    assert not one.new.live
    old, new = load_request(folder), load_request(ERASURES / one.new.model.removeprefix("erasure-"))
    assert new.model_dump(exclude={"base", "base_sha256"}) == old.model_dump(exclude={"base", "base_sha256"})
    (again,) = rebase(old.base, lambda _: None)
    assert "is live on the base" in again.reason
    with pytest.raises(ConfigError, match="Another tool made this adapter"):
        on_base(old.model_copy(update={"imported": "0" * 64}), "data/base/other")
    assert _versioning.lock_record(folder)
