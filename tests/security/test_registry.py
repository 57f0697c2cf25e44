"""Whoever may write to MLflow or edit files: what runs, what goes live, what is sealed, who approved."""

from __future__ import annotations

import ast
import importlib
import json
import os
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from typer.testing import CliRunner

from fade.config import Gate
from fade.config import GateBounds as SureGate
from fade.errors import ConfigError, FadeError, LineageError, RefusedError
from fade.evaluation.verdicts import TO_DECIDE
from fade.files import read_json, write_json
from fade.lineage import ROOT
from fade.requests.evidence import verify_evidence
from fade.requests.ledger import Ledger
from fade.signing import public_key
from flows.account import this_user
from flows.cli.app import app
from flows.operations import doctor
from flows.proving.evidence import gather, seal_evidence
from flows.proving.purge import purge
from flows.releasing import approval, manifests, release, released
from flows.releasing.reconcile import compare
from tasks.erasure import register_version
from tasks.mlflow import traces, tracking
from tasks.mlflow.client import mlflow_client
from tasks.mlflow.tracking import AdapterVersion
from tests.figures import attacked
from tests.registered import finished, registered

UNDECIDED = {"ua": 10, "of": 10, "gate": Gate(ua=0.9, ira_loss=0.1, cra_loss=0.1, sure=SureGate(neighbours_loss=None))}


@pytest.fixture(autouse=True)
def nothing_live(mlflow: MlflowClient) -> Iterator[None]:
    yield
    for model in tracking.approved_now():
        mlflow.delete_registered_model_alias(model, "approved")
    release.settle(consolidate=False)
    for manifest in released.released().values():
        for entry in manifest.adapters:
            manifests.take_out(released.model_of(entry), actor="test")


def approve_in_the_page(mlflow: MlflowClient, model: str, version: int) -> release.Change:
    """The alias as a click in MLflow's page sets it, and one look of the release flow."""
    mlflow.set_registered_model_alias(model, "approved", str(version))
    return look(model)


def look(model: str) -> release.Change:
    changes = release.settle(consolidate=False).changes
    erasure = model.removeprefix("erasure-")
    return next(
        (
            one
            for one in changes
            if any(erasure in name for name in (*one.live, *one.refused, *one.waiting, *one.removed))
        ),
        changes[-1],
    )


def page(mlflow: MlflowClient, model: str, version: int) -> str:
    return mlflow.get_model_version(model, str(version)).tags.get("release", "")


def said(erasure: str) -> list[tuple[str, str, str]]:
    with Ledger() as ledger:
        return [(row.event, row.actor, row.reason) for row in ledger.history(erasure_id=erasure)]


def artifacts(version: AdapterVersion) -> Path:
    return next(Path(".fade/mlartifacts").glob(f"**/{version.run_id}/artifacts"))


# What runs


def test_code_that_a_registered_version_brings_along_does_not_run(project: Path, tmp_path: Path) -> None:
    _, version = registered("cat", "horse")
    planted = artifacts(version) / "adapter"
    (planted / "code").mkdir()
    (planted / "code" / "planted_beside_an_adapter.py").write_text("RAN = True\n")
    flavour = {"adapter_weights": ".", "base_model": "x", "adapter_type": "lora", "code": "code"}
    (planted / "MLmodel").write_text(yaml.safe_dump({"flavors": {"diffusers": flavour}}))
    before = list(sys.path)
    stock = importlib.import_module("mlflow.diffusers")
    with mlflow_client():  # MLflow's addresses are set
        pass
    stock.load_model(f"models:/{version.model}/{version.version}", dst_path=str(tmp_path))
    try:
        assert sys.path != before, "MLflow's own loader puts the registry's code first"
        assert importlib.import_module("planted_beside_an_adapter").RAN
    finally:
        sys.path[:] = before
        sys.modules.pop("planted_beside_an_adapter", None)
        importlib.invalidate_caches()
    folder = tracking.fetch_adapter(version)
    assert sorted(path.name for path in folder.iterdir()) == ["card.json", "pytorch_lora_weights.safetensors"]
    assert sys.path == before
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("planted_beside_an_adapter")


def test_nothing_here_asks_mlflow_to_load_a_model() -> None:
    """Of MLflow's module the project uses these names; of its submodules no other is imported."""
    allowed = {"set_tracking_uri", "set_registry_uri", "get_tracking_uri", "start_run", "log_input", "data"}
    modules = {
        "mlflow",
        "mlflow.entities",
        "mlflow.entities.model_registry",
        "mlflow.exceptions",
        "mlflow.store.artifact.artifact_repository_registry",
        "mlflow.server.auth",
        "mlflow.server.fastapi_app",
    }
    used, imported, called = set(), set(), set()
    for path in [path for part in ("fade", "tasks", "flows") for path in (ROOT / part).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mlflow":
                used.add(node.attr)
            elif isinstance(node, ast.Attribute):
                called.add(node.attr)
            elif isinstance(node, ast.Import):
                imported |= {one.name for one in node.names if one.name.split(".")[0] == "mlflow"}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mlflow":
                imported.add(str(node.module))
    assert "mlflow" in imported
    assert used <= allowed
    assert imported <= modules
    assert not called & {"load_model", "get_model_info", "register_model", "search_logged_models"}


def sql(statement: str, *values: str) -> None:
    with sqlite3.connect(".fade/mlflow.db") as database:
        assert database.execute(statement, values).rowcount == 1
    database.close()


def test_files_are_read_and_deleted_where_the_project_keeps_them_alone(project: Path, tmp_path: Path) -> None:
    _, version = registered("coins", "horse")
    fetched = tracking.fetch_adapter(version)
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "adapter").mkdir(parents=True)
    (elsewhere / "metrics.json").write_text("{}")
    sql("UPDATE model_versions SET source = ? WHERE name = ?", f"file://{elsewhere}/adapter", version.model)
    assert tracking.fetch_adapter(version) == fetched, "what a version says of its source is not followed"
    kept = artifacts(version).resolve().as_uri()
    for place in (f"file://{elsewhere}", f"{kept}/../../../../../elsewhere", "http://127.0.0.1:9/x", "s3://other/x"):
        sql("UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?", place, version.run_id)
        for act in (
            tracking.fetch_adapter,
            lambda one: tracking.run_file(one, "metrics.json"),
            lambda one: traces.delete_run_file(one.run_id, "metrics.json"),
        ):
            with pytest.raises(LineageError, match="this project keeps none"):
                act(version)
        assert traces.run_files(version.run_id, ["metrics.json"]) == []
        assert traces.runs_of(version.erasure) == [], "somebody else's run holds up no purge"
    assert (elsewhere / "metrics.json").is_file()
    sql("UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?", kept, version.run_id)
    assert traces.runs_of(version.erasure) == [version.run_id]
    for name in ("../x", "/etc/hostname", "a/../../x", ""):
        with pytest.raises(LineageError, match="is no name of a run's file"):
            tracking.run_file(version, name)
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    metrics = artifacts(version) / "metrics.json"
    metrics.unlink()
    metrics.symlink_to(secret)
    with pytest.raises(LineageError, match="a link to somewhere else"):
        tracking.run_file(version, "metrics.json")


# What goes live


def forge(mlflow: MlflowClient, true: AdapterVersion, **tags: str) -> int:
    """Another version of a model, as whoever may write to MLflow makes one: the true one's files, invented figures."""
    run = mlflow.create_run(mlflow.get_run(true.run_id).info.experiment_id)
    mlflow.log_artifacts(run.info.run_id, str(artifacts(true) / "adapter"), "adapter")
    metrics = read_json(artifacts(true) / "metrics.json")
    metrics["judges"]["report"]["after"]["ua"]["value"] = 1.0
    mlflow.log_dict(run.info.run_id, metrics, "metrics.json")
    number = mlflow.create_model_version(true.model, f"{run.info.artifact_uri}/adapter", run.info.run_id).version
    held = mlflow.get_model_version(true.model, str(true.version)).tags
    for name, value in {**held, "ua": "1.0000", "release": "live", **tags}.items():
        mlflow.set_model_version_tag(true.model, str(number), name, value)
    return int(number)


def test_a_version_that_the_ledger_did_not_register_is_refused_and_takes_nothing_out(
    project: Path, mlflow: MlflowClient
) -> None:
    folder, version = registered("rocket", "horse")
    true = f"{version.model}/{version.version}"
    assert approve_in_the_page(mlflow, version.model, version.version).live == (true,)
    assert page(mlflow, version.model, version.version) == "live"
    for tags in ({}, {"ua": "ten", "drift": "nan"}, {"base_sha256": "../../x"}, {"adapter_sha256": ""}):
        number = forge(mlflow, version, **tags)
        assert tracking.find_version(version.model).version == version.version, "the newest that is genuine"
        approve_in_the_page(mlflow, version.model, number)
        refused = page(mlflow, version.model, number)
        assert refused.startswith("refused: "), refused
        assert "did not register" in refused or "tags are missing" in refused
        with pytest.raises(LineageError, match=r"did not register|tags are missing"):
            approval.approve(version.model, number)
        (manifest,) = released.released().values()
        assert manifest.names == (true,), "what is live stays so"
        assert ("release.refused", approval.UNKNOWN) in {row[:2] for row in said(folder.name)}
    with Ledger() as ledger:
        assert "is not live" not in _purge_says(version, folder, ledger)
    mlflow.delete_registered_model_alias(version.model, "approved")
    assert look(version.model).removed == (true,), "a person took it back"
    with Ledger() as ledger:
        assert "is not live" in _purge_says(version, folder, ledger)


def _purge_says(version: AdapterVersion, folder: Path, ledger: Ledger) -> str:
    """Why a purge stops; let in, it finds that there is neither a catalog nor DVC in this project."""
    with pytest.raises((FadeError, OSError)) as stopped:
        purge(version, folder, ledger, dry_run=True)
    return str(stopped.value)


def test_the_true_version_goes_live_although_a_forged_one_is_newer(project: Path, mlflow: MlflowClient) -> None:
    folder, version = registered("temple", "horse")
    forge(mlflow, version)
    run = CliRunner().invoke(app, ["approve", folder.name])
    assert run.exit_code == 0, run.output
    assert released.live_versions(version.model) == [version.version]


def test_the_gate_judges_by_the_thresholds_that_were_logged(project: Path, mlflow: MlflowClient) -> None:
    failing, failed = registered("flower", "horse", ua=50)
    passing, passed = registered("retina", "horse")
    assert (failed.gate, passed.gate) == ("failed", "passed")
    for folder, ua in ((failing, 0.0), (passing, 1.0)):
        request = yaml.safe_load((folder / "spec.yaml").read_text())
        request["gate"]["ua"] = ua
        (folder / "spec.yaml").write_text(yaml.safe_dump(request))
    mlflow.set_model_version_tag(failed.model, str(failed.version), "gate", "passed")
    approve_in_the_page(mlflow, failed.model, failed.version)
    assert "The gate failed (its tag says that it passed): ua is 0.5000, at least 0.9000" in page(
        mlflow, failed.model, failed.version
    )
    assert approve_in_the_page(mlflow, passed.model, passed.version).live == (f"{passed.model}/{passed.version}",)
    with pytest.raises(LineageError, match=r"The gate in .* was changed"):
        register_version(failing, {})
    with Ledger() as ledger:
        assert gather(passing.name, ledger)[1]["gate"]["thresholds"]["ua"] == 0.9


def test_figures_that_were_changed_everywhere_but_in_the_log_are_refused(project: Path, mlflow: MlflowClient) -> None:
    folder, version = registered("horse", "cat", ua=50)
    for path in (folder / "evaluation/metrics.json", artifacts(version) / "metrics.json"):
        metrics = read_json(path)
        metrics["judges"]["report"]["after"]["erased"]["it"]["ua"]["value"] = 1.0
        write_json(path, metrics)
    mlflow.set_model_version_tag(version.model, str(version.version), "gate", "passed")
    approve_in_the_page(mlflow, version.model, version.version)
    assert "changed since it was logged" in page(mlflow, version.model, version.version)


def test_only_a_decision_in_the_log_lets_an_undecided_version_pass(project: Path, mlflow: MlflowClient) -> None:
    folder, version = registered("coffee", "horse", **UNDECIDED)
    assert version.gate in TO_DECIDE
    mlflow.set_model_version_tag(version.model, str(version.version), "gate_decision", "it is fine")
    approve_in_the_page(mlflow, version.model, version.version)
    assert "a reason on its page alone counts for nothing" in page(mlflow, version.model, version.version)
    with pytest.raises(RefusedError, match="--because"):
        approval.approve(version.model)
    with pytest.raises(ConfigError, match="needs a reason"):
        approval.approve(version.model, because=" ")
    approval.approve(version.model, because="I looked at all pictures")
    assert look(version.model).live == (f"{version.model}/{version.version}",)
    assert ("gate_decision", this_user(), "I looked at all pictures") in said(folder.name)


# What is sealed


def test_evidence_says_what_was_logged_and_refuses_where_anything_says_otherwise(
    project: Path, mlflow: MlflowClient
) -> None:
    folder, version = registered("astronaut", "horse")
    run = attacked(noised=(5, 20))
    assert approval.note_attacks(folder, run) is None
    approval.approve(version.model)
    look(version.model)
    with Ledger() as ledger:
        bundle, content = seal_evidence(folder.name, ledger)
        assert content["attacks"] == [
            {"attack": "noised", "brought_back": 0.25, "low_95": run.root["noised"].low}
            | {"high_95": run.root["noised"].high, "on_the_base": 1.0}
        ]
        assert content["gate"]["verdict_at_registration"] == "passed"
        assert [one["by"] for one in content["approvals_and_deployments"]] == [this_user()] * 2
        assert "commit" in content["code"]
        assert verify_evidence(bundle, public_key(released.KEYS / "public.pem")) is not None
        number = str(version.version)

        def tag(name: str, value: str) -> Callable[[], None]:
            return lambda: mlflow.set_model_version_tag(version.model, number, name, value)

        def param(value: str) -> Callable[[], None]:
            place = "WHERE run_uuid = ? AND key = 'gate.ua'"
            return lambda: sql(f"UPDATE params SET value = ? {place}", value, version.run_id)

        held = mlflow.get_model_version(version.model, number).tags
        run = mlflow.get_run(version.run_id).data
        request = (folder / "spec.yaml").read_text()
        metrics = artifacts(version) / "metrics.json"
        bytes_ = metrics.read_bytes()
        edits: list[tuple[str, Callable[[], Any], Callable[[], Any]]] = [
            *((name, tag(name, value), tag(name, held[name])) for name, value in
              (("ua", "1.0000"), ("drift", "0.0000"), ("kind", "style"), ("gate", "failed"))),
            ("decision", tag("gate_decision", "all good"), lambda: mlflow.delete_model_version_tag(
                version.model, number, "gate_decision")),
            ("figure ua", lambda: mlflow.log_metric(version.run_id, "ua", 0.999, step=1),
             lambda: mlflow.log_metric(version.run_id, "ua", run.metrics["ua"], step=2)),
            ("figure noised", lambda: mlflow.log_metric(version.run_id, "noised", 0.0, step=1),
             lambda: mlflow.log_metric(version.run_id, "noised", 0.25, step=2)),
            ("git.commit", lambda: mlflow.set_tag(version.run_id, "git.commit", "f" * 40),
             lambda: mlflow.set_tag(version.run_id, "git.commit", run.tags["git.commit"])),
            ("gate.ua", param("0.1"), param(run.params["gate.ua"])),
            ("metrics.json", lambda: metrics.write_bytes(bytes_ + b" "), lambda: metrics.write_bytes(bytes_)),
            ("spec.yaml", lambda: (folder / "spec.yaml").write_text(request.replace("horse", "cat")),
             lambda: (folder / "spec.yaml").write_text(request)),
        ]  # fmt: skip
        for name, edit, undo in edits:
            edit()
            with pytest.raises(LineageError, match=name.replace(".", r"\.")):
                gather(folder.name, ledger)
            undo()
            assert gather(folder.name, ledger)[1]["parameters"] == content["parameters"], name
        mlflow.log_metric(version.run_id, "base_switch", 1.0)
        with pytest.raises(LineageError, match="has the attack switch, and the log has not"):
            gather(folder.name, ledger)


def test_evidence_of_what_the_ledger_did_not_register_is_not_sealed(project: Path, mlflow: MlflowClient) -> None:
    folder = finished("camera", "horse")
    with Ledger() as ledger, pytest.raises(LineageError, match="did not register"):
        gather(folder.name, ledger)


# Who approved


def test_who_approved_is_the_account_and_of_the_named_version_alone(
    project: Path, mlflow: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, one = registered("moon", "horse")
    mine, _ = registered("sun", "horse")
    mlflow.set_registered_model_alias(one.model, "approved", str(one.version))
    monkeypatch.setenv("LOGNAME", "the-director")
    run = CliRunner().invoke(app, ["approve", mine.name])
    assert run.exit_code == 1, "both are not known to hold together"
    look(one.model)
    assert {row[1] for row in said(theirs.name) if row[0].startswith("release.")} == {approval.UNKNOWN}
    assert {row[1] for row in said(mine.name) if row[0] in ("approved", "release.waiting")} == {this_user()}
    assert f"uid {os.getuid()}" in this_user()
    assert "the-director" not in json.dumps(said(mine.name) + said(theirs.name))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "reviewer")
    assert this_user().endswith("MLflow user reviewer")


def test_an_approval_taken_back_in_the_page_and_given_again_there_is_nobodys(
    project: Path, mlflow: MlflowClient
) -> None:
    folder, version = registered("star", "horse")
    approval.approve(version.model)
    look(version.model)
    mlflow.delete_registered_model_alias(version.model, "approved")
    look(version.model)
    approve_in_the_page(mlflow, version.model, version.version)
    approval.rollback(version.model)
    look(version.model)
    actors = [row[:2] for row in said(folder.name) if row[0].startswith("release.")]
    assert actors == [
        ("release.live", this_user()),
        ("release.rolled_back", approval.UNKNOWN_BACK),
        ("release.live", approval.UNKNOWN),
        ("release.rolled_back", this_user()),
    ]


# What is gone from MLflow


def test_a_model_that_was_deleted_in_mlflow_stays_live_and_is_said(project: Path, mlflow: MlflowClient) -> None:
    folder, version = registered("violin", "horse")
    name = f"{version.model}/{version.version}"
    assert approve_in_the_page(mlflow, version.model, version.version).live == (name,)
    with Ledger() as ledger:
        assert compare_of(ledger, name) == []
    assert doctor.releases().verdict == "ok"
    mlflow.delete_registered_model(version.model)
    for _ in range(2):
        change = look(version.model)
        assert change.live == (name,)
        assert "gone from MLflow" in change.kept[name]
    kept = [row for row in said(folder.name) if row[0] == "release.kept"]
    assert len(kept) == 1, "said once"
    assert doctor.releases().verdict == "fail"
    with Ledger() as ledger:
        (odd,) = compare_of(ledger, name)
        assert f"fade reconcile --register {folder.name}" in odd.do
        assert gather(folder.name, ledger)[1]["erasure"]["live"]
    # Registered anew it has no alias, and that is no withdrawal.
    again = register_version(folder, {})
    assert (again.version, again.run_id != version.run_id) == (version.version, True)
    assert look(version.model).live == (name,)
    approval.approve(again.model)
    assert look(version.model).kept == {}
    with Ledger() as ledger:
        assert compare_of(ledger, name) == []
    mlflow.delete_registered_model_alias(version.model, "approved")
    assert look(version.model).live == ()


def compare_of(ledger: Ledger, name: str) -> list[Any]:
    return [one for one in compare(ledger) if one.name == name]


def test_what_mlflow_no_longer_knows_is_taken_out_by_a_command(project: Path, mlflow: MlflowClient) -> None:
    folder, version = registered("piano", "horse")
    approve_in_the_page(mlflow, version.model, version.version)
    mlflow.delete_registered_model(version.model)
    run = CliRunner().invoke(app, ["rollback", folder.name])
    assert run.exit_code == 0, run.output
    assert look(version.model).live == ()
    assert said(folder.name)[-1][:2] == ("release.rolled_back", this_user())


def test_an_edited_tag_takes_nothing_out(project: Path, mlflow: MlflowClient) -> None:
    _, version = registered("guitar", "horse")
    name = f"{version.model}/{version.version}"
    approve_in_the_page(mlflow, version.model, version.version)
    for tag in ("adapter_sha256", "base_sha256", "drift"):
        held = mlflow.get_model_version(version.model, str(version.version)).tags[tag]
        mlflow.set_model_version_tag(version.model, str(version.version), tag, "0" * 64)
        (manifest,) = released.released().values()
        release.settle(consolidate=False)
        assert manifest.names == (name,)
        mlflow.set_model_version_tag(version.model, str(version.version), tag, held)
