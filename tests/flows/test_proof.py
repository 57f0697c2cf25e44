"""Audit, evidence, purge, rebase: what is proved after an erasure is live."""

from __future__ import annotations

import base64
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from dvc.repo import Repo
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName, LogFilter, LogFilterFlowRunId
from prefect.settings import get_current_settings
from typer.testing import CliRunner

from fade.adapters.manifest import read_manifest
from fade.asking.prepare import prepare_spec
from fade.config import load_settings
from fade.data.deletion import delete
from fade.errors import BaseModelError, ConfigError, SignatureError
from fade.files import read_json, sha256_file, write_json
from fade.requests.evidence import verify_evidence
from fade.requests.ledger import Ledger
from fade.signing import public_key
from fade.spec import load_spec
from fade.steps.attack import reference_path
from fade.studies.trial import TRIALS
from flows.cli.app import app
from flows.cli.proving import _print_receipts
from flows.erasing.erase import erase_flow, prepare_folder
from flows.erasing.rebase import on_base, rebase
from flows.proving import audit as audits
from flows.proving.purge import Receipt, purge
from flows.proving.traces import RUN
from flows.releasing import released
from flows.settings import ERASURES
from tasks.dvc import versioning
from tasks.mlflow import tracking, version_page
from tests.figures import attacked
from tests.tiny import KEPT_STYLES, PROJECT, entered, make_workspace, save_tiny_base

pytestmark = pytest.mark.timeout(600)
FAST = {"distill.precision": "fp32", "evaluate.precision": "fp32", "evaluate.steps": 1, "threads": 1}
OWN_SEED = {"evaluate.seeds": [61]}
"""No other erasure of the session is judged by it: what a judge says of a tiny base's noise is else the same bytes."""


PERSONS = ("astronaut", "cameraman")
LOGGED: list[str] = []


class _Collector(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        LOGGED.append(record.getMessage())


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project where no other test's erasures are: what is purged must be needed by nobody else."""
    with entered(make_workspace(tmp_path_factory.mktemp("alone") / "workspace")) as folder:
        yield folder


@pytest.fixture(scope="module")
def erased(workspace: Path) -> Iterator[tuple[Path, tracking.AdapterVersion]]:
    collector = _Collector()
    logging.getLogger().addHandler(collector)
    settings = load_settings(Path("params.yaml"), changes={**FAST, **OWN_SEED})
    spec = prepare_spec(*PERSONS, project=PROJECT, settings=settings)
    # As for whoever tells Prefect to keep results; without that it keeps none.
    keeping = erase_flow.with_options(persist_result=True, result_serializer="json")
    yield prepare_folder(spec), keeping(spec.id)
    logging.getLogger().removeHandler(collector)


def _run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_an_audit_finds_what_differs_and_by_how_much(
    erased: tuple[Path, tracking.AdapterVersion], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, version = erased
    changed = tmp_path / "other"

    def repeat(clone: Path, at: Path, as_recorded: Sequence[str]) -> None:
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

        assert not as_recorded

    monkeypatch.setattr(audits, "_repeat", repeat)
    report = audits.audit(version, folder)
    assert [row["path"].rsplit("/", 1)[1] for row in report["rows"] if not row["equal"]] == ["evaluation"]
    assert report["different"] == 1
    assert next(row for row in report["rows"] if not row["equal"])["largest_difference"] == pytest.approx(0.25)
    assert report["compared"] > 20
    assert (changed / "spec.yaml").read_bytes() == (folder / "spec.yaml").read_bytes()
    assert "1 hashes differ" in (audits.AUDITS / folder.name / "report.md").read_text()


@pytest.mark.slow
def test_a_clean_clone_makes_every_hash_again(erased: tuple[Path, tracking.AdapterVersion]) -> None:
    folder, _ = erased
    result = _run("audit", folder.name)
    report = read_json(audits.AUDITS / folder.name / "report.json")
    outputs = [row for row in report["rows"] if row["path"].startswith("data/erasures/")]
    assert len(outputs) >= 7
    assert all(row["equal"] for row in outputs), result.output
    if report["commit_holds_all_the_code"]:
        assert report["equal"], result.output


@pytest.mark.slow
def test_an_audit_outlives_what_was_deleted_from_the_catalog_for_others(
    erased: tuple[Path, tracking.AdapterVersion], tmp_path: Path
) -> None:
    folder, _ = erased
    spec = load_spec(folder)
    catalog = Path(spec.catalog)
    used = {path for split in (folder / "splits").glob("*.parquet") for path in pd.read_parquet(split)["path"]}
    table = pd.read_parquet(catalog / "catalog.parquet")
    unused = table[~table["path"].isin(used)].iloc[0]
    shutil.copytree(catalog, tmp_path / "catalog")
    try:
        assert delete(catalog, image_ids=[unused["image_id"]], subjects=[], at=datetime.now(UTC)) == 1
        assert audits._changed_since(folder) == [
            (catalog / name).as_posix() for name in ("catalog.parquet", "pictures")
        ]
        _run("audit", folder.name)
        report = read_json(audits.AUDITS / folder.name / "report.json")
        assert report["taken_as_recorded"] == ["split", "validate"]
        made = {row["path"].rsplit("/", 1)[1] for row in report["rows"] if row["equal"]}
        assert made >= {"splits", "validation.json", "saliency.safetensors", "mask", "adapter", "evaluation"}
        assert "changed since" in (audits.AUDITS / folder.name / "report.md").read_text()
        (catalog / min(used)).write_bytes((catalog / max(used)).read_bytes())
        result = _run("audit", folder.name)
        assert result.exit_code == 1
        assert "is another: the erasure cannot be made again" in " ".join(result.output.split())
    finally:
        shutil.rmtree(catalog)
        shutil.copytree(tmp_path / "catalog", catalog)
    assert not audits._changed_since(folder)


def test_what_another_erasure_needs_is_kept_and_said(
    erased: tuple[Path, tracking.AdapterVersion], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, version = erased
    other = ERASURES / "e0ther000000"
    monkeypatch.setattr("flows.proving.purge.live_versions", lambda _: [version.version])

    def listed() -> dict[str, list[Receipt]]:
        with Ledger() as ledger:
            found = purge(version, folder, ledger, dry_run=True)
        return {
            "bytes": [one for one in found if one.place == "dvc cache" and one.name != RUN],
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


@pytest.fixture(scope="module")
def remote(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A DVC remote of the project: a folder."""
    folder = tmp_path_factory.mktemp("remote") / "store"

    def configure(change: Callable[[Any], None]) -> None:
        with Repo(".") as repo, repo.config.edit() as settings:
            change(settings)

    configure(lambda settings: settings["remote"].update(store={"url": str(folder)}))
    yield folder
    configure(lambda settings: settings["remote"].pop("store"))


def _holding(needles: dict[str, bytes], *places: Path) -> dict[str, set[str]]:
    """Files that hold the bytes, whole or inside of them: a file copied, packed away or kept in a database."""
    found: dict[str, set[str]] = {}
    for path in (path for place in places for path in place.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for name, needle in needles.items():
            if needle in content or base64.b64encode(needle) in content:
                found.setdefault(name, set()).add(path.as_posix())
    return found


def test_the_log_the_evidence_and_the_purge_belong_together(  # noqa: PLR0915
    erased: tuple[Path, tracking.AdapterVersion], remote: Path, tmp_path: Path
) -> None:
    folder, version = erased
    with Ledger() as ledger, pytest.raises(ConfigError, match="is not live"):
        purge(version, folder, ledger)
    assert _run("approve", folder.name).exit_code == 0
    version = tracking.find_version(folder.name)
    with Repo(".") as repo:
        repo.push(targets=[f"{folder.as_posix()}/dvc.yaml"], remote="store")
    run = attacked(inversion=(5, 20))
    version_page.log_attack(version, run, None)
    trial = TRIALS / "ta1"
    trial.mkdir(parents=True)
    for name in ("spec.yaml", "saliency.safetensors"):
        shutil.copyfile(folder / name, trial / name)
    reference = reference_path(load_spec(folder), folder)
    write_json(reference, {"pictures": "of an attack on the base"})
    with Ledger() as ledger:
        registered, approved, row, logged = ledger.history(erasure_id=folder.name)
        assert (registered.event, approved.event, logged.event) == ("registered", "approved", "attacked")
        assert registered.details["metrics_sha256"] == sha256_file(folder / "evaluation/metrics.json")
        assert row.event == "release.live"
        assert row.details["adapter_sha256"] == version.adapter_sha256
        listed = purge(version, folder, ledger, dry_run=True)
    assert {one.place for one in listed} == {"work tree", "dvc cache", "dvc remote store", "mlflow", "prefect"}
    assert {one.name for one in listed} >= {reference.as_posix(), (trial / "saliency.safetensors").as_posix()}
    (result,) = [one for one in listed if one.name.startswith("result ")]
    results = get_current_settings().results.local_storage_path / result.name.removeprefix("result ")
    assert version.model in results.read_text()
    # What a writer that was killed had moved aside.
    shutil.copytree(folder / "splits", folder / ".splits.1.old")
    made = ("sheet.png", "samples.parquet", "saliency.safetensors", "forget.parquet", "validation.json", "index.html")
    needles = {path.name: path.read_bytes() for path in folder.rglob("*") if path.name in made}
    assert len(needles) == len(made)
    catalog = Path("data/catalog/canvas")
    table = pd.read_parquet(catalog / "catalog.parquet").set_index("sha256")["path"]
    hashes = [one.hash for one in listed if one.name.startswith("picture ") and one.removed]
    needles |= {digest: (catalog / table[digest]).read_bytes() for digest in hashes}
    assert len(hashes) > len(KEPT_STYLES) / 2, "most forget pictures, one of each style, are this erasure's alone"
    before = _holding(needles, Path(), remote)
    assert set(before) == set(needles), "a dry run removes nothing"
    for name in ("sheet.png", "samples.parquet", "saliency.safetensors", "forget.parquet"):
        assert any(path.startswith(".dvc/cache") for path in before[name])
        assert any(path.startswith(remote.as_posix()) for path in before[name])
    assert any(path.startswith(".fade/mlartifacts") for path in before["index.html"])
    backup = tmp_path / "backup"
    shutil.copytree(folder, backup)
    shutil.copytree(remote, tmp_path / "remote")
    assert _run("purge", folder.name).exit_code == 0
    assert _holding(needles, Path(), remote) == {}
    assert not any(path.exists() for path in (reference, trial / "saliency.safetensors", results))
    receipts = read_json(folder / "purge.json")["payload"]["receipts"]
    assert len([one for one in receipts if one["removed"]]) > 10
    assert not (folder / "splits").exists()
    assert (folder / "adapter/card.json").is_file()
    described = MlflowClient(f"sqlite:///{Path('.fade/mlflow.db').resolve()}").get_model_version(version.model, "1")
    assert "Gate: **passed**" in described.description
    removed = len([one for one in receipts if one["removed"]])
    assert described.description.startswith(f"**Purged** on {receipts[0]['at'][:10]}: {removed} objects removed")
    assert "get-artifact" not in described.description
    assert "Data Docs" not in described.description, "the page shows nothing that is gone"
    # Backups of the folder and of the remote are restored, and purged again.
    shutil.copytree(backup / "splits", folder / "splits")
    shutil.copyfile(backup / "saliency.safetensors", folder / "saliency.safetensors")
    shutil.copytree(tmp_path / "remote", remote, dirs_exist_ok=True)
    assert {"forget.parquet", "saliency.safetensors", "sheet.png"} <= set(_holding(needles, Path(), remote))
    assert _run("purge").exit_code == 0
    assert _holding(needles, Path(), remote) == {}
    assert _run("evidence", "seal", folder.name).exit_code == 0
    bundle = Path("data/evidence") / folder.name
    key = public_key(released.KEYS / "public.pem")
    content = verify_evidence(bundle, key)
    events = [row["event"] for row in content["chain"]["rows"]]
    assert events[:5] == ["registered", "approved", "release.live", "attacked", "purge"]
    assert content["purge"]["state"] == "purged"
    (attack,) = content["attacks"]
    assert attack == {
        "attack": "inversion",
        **{
            "brought_back": 0.25,
            "low_95": run.root["inversion"].low,
            "high_95": run.root["inversion"].high,
            "on_the_base": 1.0,
        },
    }, "what was measured is said after the pictures are gone"
    page = (bundle / "evidence.html").read_bytes()
    (bundle / "evidence.html").write_bytes(page.replace(b"live", b"dead"))
    with pytest.raises(SignatureError, match=r"evidence\.html is missing or was changed"):
        verify_evidence(bundle, key)
    (bundle / "evidence.html").write_bytes(page)
    for place in (bundle, bundle / "evidence.json"):
        assert _run("evidence", "verify", str(place)).exit_code == 0
    assert _run("evidence", "verify", str(bundle / "evidence.html")).exit_code == 1
    # The release does not need what was purged.
    assert _run("release").exit_code == 0
    manifest = read_manifest(released.release_folder(version.base_sha256), key)
    assert f"{version.model}/{version.version}" in manifest.names
    with Ledger() as ledger:
        assert ledger.verify().rows >= 4


def test_a_purge_says_by_folders_what_goes_and_why_the_rest_stays(capsys: pytest.CaptureFixture[str]) -> None:
    common = {"hash": "0" * 64, "bytes": 1, "at": "2026-01-01"}
    pictures = [f"data/erasures/a/evaluation/beside/{number}.jpg" for number in range(90)]
    gone = [Receipt("work tree", name, removed=True, reason="", **common) for name in pictures]
    other = "another erasure needs the same picture"
    kept = [Receipt("work tree", f"picture {i}", removed=False, reason=other, **common) for i in range(40)]
    one = Receipt("mlflow", "run/sheet.png", removed=True, reason="", **common)
    _print_receipts([*kept, *gone, one])
    assert capsys.readouterr().out.splitlines() == [
        f"  kept  work tree: 40: picture 0, picture 1 and 38 more; {other}",
        "  out   work tree: 90 in data/erasures/a/evaluation/beside/: 0.jpg, 1.jpg and 88 more",
        "  out   mlflow: run/sheet.png",
    ]


def test_nobody_is_named_where_names_may_not_stand(erased: tuple[Path, tracking.AdapterVersion]) -> None:
    """After erasure, release, purge and evidence: run names, tags, parameters, logs and file names."""
    folder, version = erased
    assert (folder / "purge.json").is_file()
    said = {**_said_in_mlflow(version), **_said_in_prefect(folder.name)}
    with Ledger() as ledger:
        said["ledger"] = json.dumps([str(row) for row in ledger.history(erasure_id=folder.name)])
    bundle = Path("data/evidence") / folder.name
    said |= {f"evidence {name}": (bundle / name).read_text() for name in ("evidence.json", "evidence.html")}
    said["log"] = "\n".join(LOGGED)
    places = [Path(".fade"), Path(".dvc"), *(Path("data") / name for name in ("erasures", "release", "evidence"))]
    said["file names"] = "\n".join(path.as_posix() for place in places for path in place.rglob("*"))
    assert all(folder.name in said[where] for where in ("run", "version", "flow run", "ledger", "file names"))
    assert said["flow run logs"]
    named = {where for where, text in said.items() for name in PERSONS if name in text.lower()}
    assert not named
    assert PERSONS[0] in (folder / "spec.yaml").read_text(), "the request itself does name her"


def _said_in_mlflow(version: tracking.AdapterVersion) -> dict[str, str]:
    client = MlflowClient(f"sqlite:///{Path('.fade/mlflow.db').resolve()}")
    run = client.get_run(version.run_id)
    found = client.get_model_version(version.model, str(version.version))
    model = client.get_registered_model(version.model)
    return {
        "run": f"{run.info.run_name} {run.data.tags} {run.data.params} {list(run.data.metrics)}",
        "inputs": str([(one.dataset.name, one.dataset.source, one.tags) for one in run.inputs.dataset_inputs]),
        "version": f"{found.name} {found.tags} {found.description} {model.tags} {model.description}",
    }


def _said_in_prefect(erasure: str) -> dict[str, str]:
    named = FlowRunFilter(name=FlowRunFilterName(any_=[f"erase-{erasure}"]))
    with get_client(sync_client=True) as client:
        flows = client.read_flow_runs(flow_run_filter=named)
        tasks = client.read_task_runs(flow_run_filter=named)
        logs = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[one.id for one in flows])))
        artifacts = client.read_artifacts(flow_run_filter=named)
    return {
        "flow run": str([(one.name, one.parameters, one.tags) for one in flows]),
        "task runs": str([(one.name, one.tags, one.task_key) for one in tasks]),
        "flow run logs": str([one.message for one in logs]),
        "artifacts": str([(one.key, one.description, one.data) for one in artifacts]),
    }


def test_live_erasures_are_made_again_on_another_base_and_none_is_approved(
    erased: tuple[Path, tracking.AdapterVersion],
) -> None:
    folder, _ = erased
    if not tracking.find_version(folder.name).live:
        assert _run("approve", folder.name).exit_code == 0
    for model in tracking.approved_now():
        if model != f"erasure-{folder.name}":
            tracking.rollback(model)
    save_tiny_base(Path("data/base/other"), seed=7)
    with pytest.raises(BaseModelError, match="No base model in nowhere/at/all"):
        rebase(PROJECT, "nowhere/at/all", lambda _: None)
    (one,) = rebase(PROJECT, "data/base/other", lambda _: None)
    assert one.passed, one.reason
    assert one.new is not None
    assert one.new.base_sha256 != tracking.find_version(folder.name).base_sha256
    assert not one.new.live
    old, new = load_spec(folder), load_spec(ERASURES / one.new.model.removeprefix("erasure-"))
    assert new.model_dump(exclude={"base", "base_sha256"}) == old.model_dump(exclude={"base", "base_sha256"})
    (again,) = rebase(PROJECT, old.base, lambda _: None)
    assert "is live on the base" in again.reason
    listed = _run("rebase", old.base)
    assert listed.exit_code == 1
    assert "Do not switch yet: 1 of 1 did not pass" in listed.output
    with pytest.raises(ConfigError, match="Another tool made this adapter"):
        on_base(old.model_copy(update={"imported": "0" * 64}), PROJECT.at(base="data/base/other"))
    assert versioning.lock_record(folder)
