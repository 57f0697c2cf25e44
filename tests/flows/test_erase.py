"""The flow end to end on a tiny base: resumes, repeats to the bit, registers once, is taken back."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName
from typer.testing import CliRunner

from fade.asking.prepare import prepare_spec
from fade.config import load_settings
from fade.data.catalog import load_concepts
from fade.errors import BaseModelError, ConfigError, DataError, RegistryError
from fade.evaluation.measured import Evaluation
from fade.evaluation.records import load
from fade.evaluation.verdicts import Verdict
from fade.files import read_json, sha256_file
from fade.pipeline import steps_of
from fade.spec import Spec, load_spec, save_spec
from fade.steps.attack import attack
from flows.cli.adapters import _base_of
from flows.cli.app import app
from flows.erasing.demo import prove_rollback
from flows.erasing.erase import erase, prepare_folder
from flows.releasing.pictures import draw, live_adapters, load_with, save_picture
from flows.settings import ERASURES
from tasks.dvc import versioning
from tasks.mlflow import tracking
from tasks.mlflow.client import mlflow_client
from tests.tiny import KEPT_STYLES, PROJECT

pytestmark = pytest.mark.timeout(600)


def _request(concept: str = "astronaut", surrogate: str = "cameraman", **changes: object) -> Spec:
    settings = load_settings(Path("params.yaml")).model_copy(update=changes)
    return prepare_spec(concept, surrogate, project=PROJECT, settings=settings)


@pytest.fixture(scope="module")
def finished(workspace: Path) -> tuple[Path, tracking.AdapterVersion]:
    request = _request()
    folder = prepare_folder(request)
    return folder, erase(request.id)


def test_an_erasure_ends_as_a_registered_candidate(finished: tuple[Path, tracking.AdapterVersion]) -> None:
    folder, version = finished
    assert version.aliases == ("candidate",)
    assert not version.live
    assert version.adapter_sha256 == sha256_file(folder / "adapter/pytorch_lora_weights.safetensors")
    metrics = read_json(folder / "evaluation/metrics.json")
    assert metrics["samples"] == 12 * len(KEPT_STYLES)
    assert metrics["drift"] > 0
    assert set(metrics["neighbours"]) == {"admiral"}
    assert (folder / "evaluation/sheet.png").stat().st_size > 10_000
    assert set(read_json(folder / "timings.json")) == {step.name for step in steps_of(load_spec(folder))}


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"mask.granularity": "weight", "mask.density": 0.1, "saliency.score": "contrast"}, "delta"),
        ({"mask.granularity": "neuron", "mask.density": 0.2, "saliency.score": "random"}, "lora"),
        (
            {
                "distill.depth": "deep",
                "distill.deep": {"steps": 4, "states": 2, "batch": 4, "lifetime": 2},
                "distill.timesteps": "disagreement",
                "distill.pictures": "generated",
                "distill.stop_at": 0.99,
                "mask.within": "cross_attention",
            },
            "lora",
        ),
        ({"distill.start": "closed_form", "distill.steps": 0, "mask.granularity": "none"}, "lora"),
    ],
)
def test_every_way_of_the_method_ends_as_a_live_adapter_that_is_taken_back(
    workspace: Path, changes: dict[str, object], kind: str
) -> None:
    settings = load_settings(Path("params.yaml"), changes=changes)
    spec = prepare_spec("cat", "horse", project=PROJECT, settings=settings)
    folder = prepare_folder(spec)
    version = erase(spec.id)
    assert read_json(folder / "adapter/card.json")["type"] == kind
    prompts = ["a cat image in photo style."]
    before = draw(load_with(Path(spec.base), []), prompts, seed=1)
    tracking.approve(version.model, version.version)
    live = [one for one in live_adapters(version.base_sha256) if one.model == version.model]
    assert not np.array_equal(draw(load_with(Path(spec.base), live), prompts, seed=1), before)
    tracking.rollback(version.model)
    assert not [one for one in live_adapters(version.base_sha256) if one.model == version.model]


def test_a_published_methods_erasure_is_registered_approved_live_and_rolled_back(
    workspace: Path, tmp_path: Path
) -> None:
    file = tmp_path / "row.json"
    asked = ["erase", "--concept", "cat", "--surrogate", "horse", "--method", "uce", "--set", "uce.damping=0.4"]
    result = CliRunner().invoke(app, [*asked, "--json", str(file)])
    assert result.exit_code == 0, result.output
    row = json.loads(file.read_text())
    folder, model = Path(row["folder"]), row["model_version"].partition("/")[0]
    assert load_spec(folder).methods == {"uce": {"erase_scale": 1.0, "preserve_scale": 1.0, "damping": 0.4}}
    assert list(versioning.read_lock(folder / "dvc.lock")) == ["split", "validate", "adapter", "evaluate"]
    assert versioning.is_current(folder, "adapter")
    version = tracking.find_version(model)
    assert (version.aliases, version.gate) == (("candidate",), "passed")
    with mlflow_client() as client:
        run = client.get_run(version.run_id).data
    assert run.tags["origin"] == "made here by uce"
    assert run.params["uce.damping"] == "0.4"
    assert not [name for name in run.params if name.startswith(("saliency", "mask", "distill"))]
    prompt = ["a cat image in photo style."]
    before = draw(load_with(Path("data/base/canvas"), []), prompt, seed=1, steps=3)
    for command, changed in (("approve", True), ("rollback", False)):
        done = CliRunner().invoke(app, [command, folder.name])
        assert done.exit_code == 0, done.output
        live = [one for one in live_adapters(version.base_sha256) if one.model == model]
        assert bool(live) == changed
        after = draw(load_with(Path("data/base/canvas"), live), prompt, seed=1, steps=3)
        assert np.array_equal(after, before) != changed
    # Asked again, nothing is made again.
    made = (folder / "adapter/card.json").stat().st_mtime_ns
    assert CliRunner().invoke(app, asked).exit_code == 0
    assert (folder / "adapter/card.json").stat().st_mtime_ns == made


def test_several_concepts_share_an_adapter_and_are_judged_one_by_one(workspace: Path, tmp_path: Path) -> None:
    file = tmp_path / "erased.json"
    asked = ["erase", "--concept", "astronaut", "--surrogate", "cameraman", "--also", "neon:photo", "--also", "cat"]
    result = CliRunner().invoke(app, [*asked, "--json", str(file)])
    assert result.exit_code == 0, result.output
    row = json.loads(file.read_text())
    assert row["concept"] == "astronaut, neon, cat"
    folder = Path(row["folder"])
    metrics = read_json(folder / "evaluation/metrics.json")["judges"]["report"]["after"]
    assert list(metrics["erased"]) == sorted(["astronaut", "neon", "cat"])
    styles = len(KEPT_STYLES)
    assert metrics["ua"]["count"] == styles + 12 + styles
    # Every pair's prompt less those of two objects and one style; judged by object and by style.
    assert metrics["ira"]["count"] == 2 * 10 * (styles - 1)
    version = tracking.find_version(row["model_version"].split("/")[0])
    assert version.kind == "person, style, object"
    assert version.aliases == ("candidate",)
    with pytest.raises(ConfigError, match="one concept"):
        next(attack(folder))


def test_erasures_are_judged_together_and_consolidated(
    finished: tuple[Path, tracking.AdapterVersion], tmp_path: Path
) -> None:
    folder, _ = finished
    other = prepare_folder(_request("neon", "photo"))
    erase(other.name)
    together, one = tmp_path / "together.json", tmp_path / "one.json"
    result = CliRunner().invoke(app, ["combine", folder.name, other.name, "--json", str(together)])
    assert result.exit_code == 0, result.output
    found = json.loads(together.read_text())
    assert set(found["judges"]["report"]["after"]["erased"]) == {"astronaut", "neon"}
    assert set(found["adapters"]) == {folder.name, other.name}
    alone = read_json(folder / "evaluation/metrics.json")
    assert found["drift"] != alone["drift"]
    result = CliRunner().invoke(app, ["consolidate", folder.name, other.name, "--json", str(one)])
    assert result.exit_code == 0, result.output
    row = json.loads(one.read_text())
    assert row["concept"] == "astronaut, neon"
    # Steps grow as the root of the number of concepts: 4 sqrt(2), rounded up; the batch with it.
    card = read_json(Path(row["folder"]) / "adapter/card.json")
    assert (card["steps"], card["parameters"]["batch"]) == (6, 2 * load_spec(folder).distill.batch)
    twice = CliRunner().invoke(app, ["combine", folder.name, folder.name])
    assert twice.exit_code == 1
    assert "Give each concept once" in twice.output
    unknown = CliRunner().invoke(app, ["combine", folder.name, "e00000000000"])
    assert unknown.exit_code == 1
    assert "No erasure" in unknown.output


def test_a_surrogate_is_chosen_that_is_nobodys_face(workspace: Path) -> None:
    chosen = _request("cat", "auto").surrogate
    concepts = load_concepts(Path("data/catalog/canvas"))
    assert concepts[chosen].kind == "object"
    assert not concepts[chosen].person
    settings = load_settings(Path("params.yaml"))
    other = prepare_spec("cat", "auto", project=PROJECT, settings=settings, protected=[chosen])
    assert other.surrogate not in ("cat", chosen)
    several = prepare_spec("cat", "auto", project=PROJECT, settings=settings, also=[(chosen, "auto")])
    assert not {pair.surrogate for pair in several.pairs} & {"cat", chosen}
    everything = [name for name, concept in concepts.items() if concept.kind == "object" and not concept.person]
    with pytest.raises(ConfigError, match="No surrogate for 'cat'"):
        prepare_spec("cat", "auto", project=PROJECT, settings=settings, protected=everything)


def test_a_concept_can_give_way_to_nothing(workspace: Path, tmp_path: Path) -> None:
    file = tmp_path / "erased.json"
    result = CliRunner().invoke(app, ["erase", "--concept", "cat", "--surrogate", "nothing", "--json", str(file)])
    assert result.exit_code == 0, result.output
    row = json.loads(file.read_text())
    assert row["surrogate"] == "nothing"
    folder = Path(row["folder"])
    splits = {name: pd.read_parquet(folder / "splits" / f"{name}.parquet") for name in ("forget", "surrogate")}
    for table in splits.values():
        assert len(table) > 0
        assert set(table["surrogate_caption"]) == {""}
        assert table["caption"].str.contains("cat|kitten").all()
    assert not (splits["surrogate"]["object"] == "cat").any()
    # There is nothing a judge could see instead, so there is no such rate: not even zero.
    assert "surrogate" not in read_json(folder / "evaluation/metrics.json")["judges"]["report"]["after"]


@pytest.mark.parametrize(
    ("also", "said"),
    [
        ([("astronaut", "cat")], "more than once"),
        ([("cameraman", "horse")], "as both"),
        ([("neon", "cat")], "one kind"),
    ],
)
def test_pairs_that_cannot_be_erased_together_are_refused(
    workspace: Path, also: list[tuple[str, str]], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        prepare_spec("astronaut", "cameraman", project=PROJECT, settings=load_settings(Path("params.yaml")), also=also)


def test_an_attack_counts_every_picture_and_on_the_base_only_those_not_begun_at_its_prompt(
    finished: tuple[Path, tracking.AdapterVersion],
) -> None:
    folder, _ = finished
    steps = list(attack(folder))
    assert [step.step for step in steps] == [1, 2, 1, 2]
    found = read_json(folder / "attacks/inversion.json")
    assert found["erased"]["report"]["count"] == 6
    assert found["base"]["report"]["count"] == 3
    assert found["base"]["loss"] != found["erased"]["loss"]
    assert (folder / "attacks/sheet.png").stat().st_size > 1000


def test_a_registered_adapter_is_exported_by_the_command_line(
    finished: tuple[Path, tracking.AdapterVersion], tmp_path: Path
) -> None:
    _, version = finished
    for layout, out in (("kohya", "lora.safetensors"), ("merged", "model")):
        arguments = ["export", version.model, "--layout", layout, "-o", str(tmp_path / out)]
        assert CliRunner().invoke(app, arguments).exit_code == 0
        assert (tmp_path / out).exists()
    refused = CliRunner().invoke(app, ["export", version.model, "--layout", "pickle", "-o", str(tmp_path / "x")])
    assert refused.exit_code == 1
    assert "Unknown layout 'pickle'" in refused.stderr


def test_an_export_reads_the_base_that_its_erasure_names(finished: tuple[Path, tracking.AdapterVersion]) -> None:
    folder, version = finished
    elsewhere = load_spec(folder).model_copy(update={"base": "data/base/elsewhere"})
    save_spec(elsewhere, ERASURES / "e-elsewhere")
    assert _base_of("e-elsewhere") == Path("data/base/elsewhere") != _base_of(version.erasure)
    shutil.rmtree(ERASURES / "e-elsewhere")


def test_lineage_is_on_the_run(finished: tuple[Path, tracking.AdapterVersion]) -> None:
    import mlflow

    folder, version = finished
    run = mlflow.get_run(version.run_id)
    lock = yaml.safe_load((folder / "dvc.lock").read_text())["stages"]
    splits = next(out for out in lock["split"]["outs"] if out["path"].endswith("splits"))
    assert run.data.tags["dvc.splits"] == splits["md5"]
    assert run.data.tags["dvc.dvc.lock"] == sha256_file(folder / "dvc.lock")
    assert run.data.tags["adapter.sha256"] == version.adapter_sha256
    assert run.data.tags["base.sha256"] == version.base_sha256
    assert {"git.commit", "git.dirty", "library.torch", "prefect.flow_run_id"} <= set(run.data.tags)
    assert run.data.params["distill.rank"] == "2"
    assert {"ua", "ira_low", "base_cra", "drift", "seconds_distill", "retain_loss"} <= set(run.data.metrics)
    assert {data.dataset.name for data in run.inputs.dataset_inputs} == {
        "forget",
        "surrogate",
        "retain",
        "holdout",
        "held_out",
    }


def test_a_persons_name_is_in_no_name_tag_parameter_or_artifact_list(
    finished: tuple[Path, tracking.AdapterVersion],
) -> None:
    import mlflow

    _, version = finished
    run = mlflow.get_run(version.run_id)
    texts = [run.info.run_name, version.model, *run.data.tags.values(), *run.data.params.values()]
    texts += [json.dumps(data.to_dictionary()) for data in run.inputs.dataset_inputs]
    registered = mlflow.MlflowClient().get_model_version(version.model, str(version.version))
    texts += [registered.description, *registered.tags.values()]
    assert not [text for text in texts if "astronaut" in text.lower()]


def test_asking_again_runs_nothing_and_registers_nothing(
    finished: tuple[Path, tracking.AdapterVersion], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, version = finished

    def refuse(*_: object) -> None:
        raise AssertionError("a finished step ran again")

    for step in steps_of(load_spec(folder)):
        monkeypatch.setattr(step.function.replace(":", "."), refuse)
    before = sha256_file(folder / "dvc.lock")
    assert erase(folder.name) == version
    assert sha256_file(folder / "dvc.lock") == before
    assert len([one for one in tracking.versions() if one.model == version.model]) == 1


def test_a_run_that_died_goes_on_from_its_last_finished_task(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = _request("temple", "flower")
    folder = prepare_folder(request)
    with monkeypatch.context() as patch:

        def die(_: Path) -> None:
            raise DataError("died on purpose")

        patch.setattr("fade.steps.mask.mask", die)
        with pytest.raises(DataError, match="died on purpose"):
            erase(request.id)
    named = FlowRunFilter(name=FlowRunFilterName(any_=[f"erase-{request.id}"]))
    with get_client(sync_client=True) as client:
        runs = [*client.read_flow_runs(flow_run_filter=named), *client.read_task_runs(flow_run_filter=named)]
    told = [str(run.state.message) for run in runs if run.state is not None]
    assert any("DataError" in message for message in told)
    assert not any("on purpose" in message for message in told), "Prefect keeps what it is told: no words"
    assert versioning.is_current(folder, "saliency")
    assert not (folder / "adapter").exists()
    ran = []
    for name in ("split", "saliency", "mask"):
        module = importlib.import_module(f"fade.steps.{name}")
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda path, n=name, f=original: (ran.append(n), f(path))[1])
    assert erase(request.id).gate == "passed"
    assert ran == ["mask"]


def test_changed_data_makes_its_steps_run_again(workspace: Path) -> None:
    request = _request("coins", "flower")
    folder = prepare_folder(request)
    erase(request.id)
    assert versioning.is_current(folder, "distill")
    path = folder / "mask" / "mask.json"
    content = read_json(path)
    path.write_text(json.dumps({**content, "modules": content["modules"][:5]}))
    assert not versioning.is_current(folder, "mask")
    assert not versioning.is_current(folder, "distill")
    assert versioning.is_current(folder, "saliency")


def test_the_same_request_from_nothing_gives_the_same_adapter(
    finished: tuple[Path, tracking.AdapterVersion],
) -> None:
    folder, version = finished
    kept = folder.with_name("kept")
    shutil.move(folder, kept)
    request = _request()
    assert prepare_folder(request) == folder
    assert erase(request.id).adapter_sha256 == version.adapter_sha256
    for name in ("splits/forget.parquet", "saliency.safetensors", "evaluation/metrics.json", "evaluation/sheet.png"):
        assert sha256_file(folder / name) == sha256_file(kept / name), name
    shutil.rmtree(kept)


def test_approval_makes_live_and_rollback_gives_the_bases_bits_back(
    finished: tuple[Path, tracking.AdapterVersion],
) -> None:
    from flows.erasing.demo import Outcome

    _, version = finished
    said: list[str] = []
    assert prove_rollback(Outcome(_request(), version, {}), said.append)
    assert len(said) == 2
    assert not tracking.find_version(version.model).live
    with pytest.raises(RegistryError, match="Nothing to roll back"):
        tracking.rollback(version.model)


def test_live_pictures_differ_from_the_bases(finished: tuple[Path, tracking.AdapterVersion], tmp_path: Path) -> None:
    _, version = finished
    prompt = ["a astronaut image in photo style."]
    base = draw(load_with(Path("data/base/canvas"), []), prompt, seed=1, steps=3)
    tracking.approve(version.model)
    try:
        live = draw(load_with(Path("data/base/canvas"), live_adapters(version.base_sha256)), prompt, seed=1, steps=3)
    finally:
        tracking.rollback(version.model)
    assert not np.array_equal(base, live)
    save_picture(live[0], tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 100
    with pytest.raises(ConfigError, match="does not end like a picture"):
        save_picture(live[0], tmp_path / "out.txt")


def test_another_tools_adapter_is_judged_and_registered(
    finished: tuple[Path, tracking.AdapterVersion], tmp_path: Path
) -> None:
    folder, version = finished
    file, figures = tmp_path / "foreign.safetensors", tmp_path / "figures.json"
    exported = CliRunner().invoke(app, ["export", version.model, "--layout", "kohya", "-o", str(file)])
    assert exported.exit_code == 0, exported.output
    asked = ["import", str(file), "--concept", "astronaut", "--surrogate", "cameraman", "--json", str(figures)]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    row = json.loads(figures.read_text())
    assert row["folder"] != str(folder)
    # kohya keeps float16 tensors as they are: the same change, so the same pictures and figures.
    assert row["drift"] == read_json(folder / "evaluation/metrics.json")["drift"]
    imported = Path(row["folder"])
    assert not (imported / "mask").exists()
    laid = imported / "foreign" / "adapter.safetensors"
    laid.write_bytes(laid.read_bytes()[:-1] + b"x")
    again = CliRunner().invoke(app, asked)
    assert again.exit_code == 0, again.output  # laid anew from the file that is given
    file.write_bytes(file.read_bytes()[:100])
    refused = CliRunner().invoke(app, asked)
    assert refused.exit_code == 1
    assert "not a safetensors file" in refused.output


def test_a_failed_gate_registers_without_candidate_and_is_not_approved(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A tiny base draws noise, which no judge takes for anything: the verdict on its figures is set here.
    reasons = ("ua is 0.1000, at least 0.9900 is asked",)
    failed = Verdict(passed=False, verdict="failed", reasons=reasons, checks=(), recognised=())
    monkeypatch.setattr("fade.steps.evaluate.verdict", lambda *_: failed)
    request = _request("retina", "coins")
    folder = prepare_folder(request)
    version = erase(request.id)
    assert version.gate == "failed"
    assert version.aliases == ()
    assert load(Evaluation, folder / "evaluation/metrics.json").gate == failed
    with pytest.raises(RegistryError, match="did not pass its gate"):
        tracking.approve(version.model)


def test_another_base_under_the_same_path_stops_before_any_step(workspace: Path) -> None:
    from tests.tiny import save_tiny_base

    request = _request("rocket", "temple")
    prepare_folder(request)
    base = Path("data/base/canvas")
    shutil.move(base, "data/base/kept")
    try:
        with pytest.raises(BaseModelError, match="No base model"):
            erase(request.id)
        save_tiny_base(base, seed=5)
        with pytest.raises(ConfigError, match="is not the one this erasure was asked for"):
            erase(request.id)
        assert not (Path("data/erasures") / request.id / "splits").exists()
    finally:
        shutil.rmtree(base, ignore_errors=True)
        shutil.move("data/base/kept", base)


def test_changed_files_in_the_registry_are_not_approved(
    finished: tuple[Path, tracking.AdapterVersion],
) -> None:
    _, version = finished
    name = "pytorch_lora_weights.safetensors"
    originals = {path: path.read_bytes() for path in Path(".fade/mlartifacts").rglob(name)}
    assert originals
    try:
        for path, content in originals.items():
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(Exception, match="was changed"):
            tracking.approve(version.model)
        assert not tracking.find_version(version.model).live
    finally:
        for path, content in originals.items():
            path.write_bytes(content)


def test_depth_is_said_to_be_unmeasured_until_it_is_measured(
    finished: tuple[Path, tracking.AdapterVersion], tmp_path: Path
) -> None:
    folder, version = finished
    run = CliRunner(env={"COLUMNS": "200"}).invoke
    assert version.inversion is None
    assert "not measured" in run(app, ["list"]).output
    result = run(app, ["attack", folder.name, "--json", str(tmp_path / "attack.json")])
    assert result.exit_code == 0, result.output
    assert "on the base in" in result.output
    measured = tracking.find_version(version.model).inversion
    assert measured == pytest.approx(read_json(tmp_path / "attack.json")["inversion"], abs=1e-4)
