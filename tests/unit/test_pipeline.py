"""dvc.yaml says what the code says; parameters are all used; layers hold."""

from __future__ import annotations

import pkgutil
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import BaseModel

from fade import config
from fade.asking.checks import check_disk, gate_without_power
from fade.asking.prepare import prepare_spec
from fade.config import Settings, load_settings
from fade.data.catalog import load_concepts
from fade.errors import ConfigError, DataError, ResourceError
from fade.evaluation.judges import new_judge, save_judge
from fade.hardware import fast_precision
from fade.lineage import ROOT, module_closure
from fade.pipeline import STEPS, inputs_of, maker_of, sections_of, steps_of
from fade.spec import Spec, make_spec
from tasks.dvc.versioning import root_pipeline, wide_pipeline, write_pipeline
from tests.tiny import PROJECT, plain_spec, save_judges

KINDS = ("object", "style")


def _names(module: str) -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in module_closure(module)}


def test_the_roots_pipeline_is_what_the_imports_say() -> None:
    assert yaml.safe_load((ROOT / "dvc.yaml").read_text()) == root_pipeline()
    assert yaml.safe_load((ROOT / "data/wide/dvc.yaml").read_text()) == wide_pipeline()


def test_the_base_depends_on_its_own_code_and_on_no_other() -> None:
    needed = _names("fade.steps.base")
    assert {
        "fade/data/canvas.py",
        "fade/data/styles.py",
        "fade/models/training/networks.py",
        "fade/steps/base.py",
    } <= needed
    assert not {"fade/config.py", "fade/lineage.py", "fade/data/catalog.py"} & needed
    assert not any(name.startswith(("tasks/", "flows/", "fade/methods/", "fade/evaluation/")) for name in needed)


def test_a_stage_depends_on_modules_it_imports_indirectly() -> None:
    assert {"fade/methods/fade/sparse_lora.py", "fade/models/paths.py", "fade/seeding.py"} <= _names(
        "fade.steps.adapter"
    )
    assert "fade/evaluation/judges.py" not in _names("fade.steps.adapter")
    assert "fade/models/generate.py" in _names("fade.steps.evaluate")


def test_packages_hold_docstrings_only_so_that_leaving_them_out_of_stages_is_right() -> None:
    for path in ROOT.glob("fade/**/__init__.py"):
        lines = [line for line in path.read_text().split('"""')[-1].splitlines() if line.strip()]
        assert all(line.startswith("__version__") for line in lines), path


KINDS_OF_SPEC = [
    {},
    {"data_free": True},
    {"gate": {"attacks": {"noised": 0.5}}},
    {"imported": "0" * 64},
    {"method": "uce"},
    {"data_free": True, "by_name": True},
    {"settings": "auto"},
]


@pytest.mark.parametrize(
    "changes", KINDS_OF_SPEC, ids=["plain", "data-free", "attacked", "imported", "by uce", "by name", "found"]
)
def test_the_steps_of_an_erasure_follow_from_each_other(changes: dict[str, Any]) -> None:
    spec = plain_spec(**changes)
    steps, laid = steps_of(spec), {"foreign"} if spec.imported else set()
    assert sum("adapter" in step.outputs for step in steps) == 1
    assert maker_of(spec).makes_adapter
    there = set(laid)
    for step in steps:
        own = {name for name in inputs_of(step, spec) if not name.startswith("{")}
        assert own <= there, f"{step.name} reads what no step before it wrote"
        there |= set(step.outputs)


def test_a_row_names_what_is_there() -> None:
    assert len({step.name for step in STEPS}) == len(STEPS)
    assert all(any(step in steps_of(plain_spec(**changes)) for changes in KINDS_OF_SPEC) for step in STEPS)
    for step in STEPS:
        assert callable(pkgutil.resolve_name(step.function)), step.name
        owned = {*step.outputs, *step.unrecorded}
        assert {name.partition("/")[0] for name in step.personal} <= owned, step.name
        assert {name.partition("/")[0] for name in step.logged} <= set(step.outputs), step.name


def test_what_is_shown_of_an_erasure_are_the_settings_that_decided_it() -> None:
    plain = ["split", "saliency", "mask", "distill", "evaluate", "gate"]
    assert sections_of(plain_spec()) == plain
    for other in ({"imported": "0" * 64}, {"method": "uce"}):
        assert sections_of(plain_spec(**other)) == ["split", "evaluate", "gate"]
    attacked = plain_spec(gate={"attacks": {"noised": 0.5}})
    assert set(sections_of(attacked)) == {*plain, "inversion", "attacks"}


def test_every_parameter_of_a_stage_is_a_field_and_every_setting_is_used_by_a_stage() -> None:
    used = {name.partition(".")[0] for step in STEPS for name in step.parameters}
    assert used <= set(Spec.model_fields)
    assert set(Settings.model_fields) <= used


def test_params_yaml_holds_every_setting_and_no_other() -> None:
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert set(content["erasure"]) == set(Settings.model_fields)
    loaded = load_settings(ROOT / "params.yaml")
    for name, section in content["erasure"].items():
        if isinstance(read := getattr(loaded, name), BaseModel):
            assert set(section) == set(type(read).model_fields), name


def test_a_wrong_parameter_is_named_with_what_was_got(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump({"erasure": {"mask": {"density": 1.5}, "distill": {"stepz": 3}}}))
    with pytest.raises(ConfigError, match=r"mask\.density.*got 1\.5.*distill\.stepz"):
        load_settings(path)
    with pytest.raises(ConfigError, match="Missing file"):
        load_settings(tmp_path / "none.yaml")


def test_auto_precision_is_decided_when_the_settings_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump({"erasure": {"distill": {"precision": "auto"}}}))
    for native in ("bf16", "fp32"):
        monkeypatch.setattr(config, "fast_precision", lambda native=native: native)
        loaded = load_settings(path)
        for step in ("saliency", "distill", "evaluate"):
            assert getattr(loaded, step).precision == native, step
            assert getattr(load_settings(path, changes={f"{step}.precision": "fp32"}), step).precision == "fp32", step
    with pytest.raises(ConfigError, match=r"distill\.precision.*got 'fp16'"):
        load_settings(path, changes={"distill.precision": "fp16"})


@pytest.mark.parametrize(
    ("machine", "has", "expected"),
    [
        ("x86_64", {"avx512_bf16"}, "bf16"),
        ("x86_64", {"amx_tile"}, "bf16"),
        ("x86_64", {"emulated by oneDNN"}, "fp32"),
        ("aarch64", {"emulated by oneDNN"}, "bf16"),
        ("aarch64", set(), "fp32"),
    ],
)
def test_a_machine_without_bfloat16_instructions_computes_in_float32(
    monkeypatch: pytest.MonkeyPatch, machine: str, has: set[str], expected: str
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: "avx512_bf16" in has)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: "amx_tile" in has)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: "emulated by oneDNN" in has)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fast_precision() == expected


VALID = {
    "concept": "cat",
    "kind": "object",
    "surrogate": "horse",
    "base": "b",
    "base_sha256": "0" * 64,
    "catalog": "c",
    "judges": "j",
}


def test_an_erasure_is_named_by_all_that_is_asked() -> None:
    one = make_spec(**VALID)
    assert one.id == make_spec(**VALID).id
    others = [{"surrogate": "flower"}, {"base_sha256": "1" * 64}, {"distill": {"steps": 3}}, {"threads": 1}]
    ids = {make_spec(**{**VALID, **change}).id for change in others}
    assert len(ids | {one.id}) == 5
    assert "cat" not in one.id


def test_faulty_requests_are_refused_with_the_field() -> None:
    with pytest.raises(ConfigError, match="surrogate must differ"):
        make_spec(**{**VALID, "surrogate": "CAT"})
    with pytest.raises(ConfigError, match="kind"):
        make_spec(**{**VALID, "kind": "person"})
    with pytest.raises(ConfigError, match="base_sha256"):
        make_spec(**{**VALID, "base_sha256": "abc"})


def test_too_little_disk_is_said_before_anything_is_done() -> None:
    check_disk(Path(), needed=1)
    with pytest.raises(ResourceError, match="Too little free disk"):
        check_disk(Path(), needed=2**62)


def test_prepare_request_refuses_what_cannot_work(workspace: Path) -> None:
    settings = load_settings(Path("params.yaml"))
    spec = prepare_spec("astronaut", "cameraman", project=PROJECT, settings=settings)
    assert spec.person
    for concept, surrogate, message in (
        ("astronot", "cameraman", "Did you mean 'astronaut'"),
        ("astronaut", "astronaut", "surrogate must differ"),
        ("astronaut", "spacewoman", "surrogate must differ"),
        ("astronaut", "neon", "must be of one kind"),
    ):
        with pytest.raises(ConfigError, match=message):
            prepare_spec(concept, surrogate, project=PROJECT, settings=settings)


def test_judges_that_lack_a_concept_of_the_catalog_are_refused_before_anything_is_done(
    workspace: Path, tmp_path: Path
) -> None:
    settings, catalog = load_settings(Path("params.yaml")), Path("data/catalog/canvas")
    known = load_concepts(catalog)
    judges = tmp_path / "judges"
    with pytest.raises(DataError, match=r"No judge 'development' .*fade classifier train"):
        prepare_spec("astronaut", "cameraman", project=PROJECT.at(judges=str(judges)), settings=settings)
    save_judges(judges, catalog)
    assert prepare_spec(
        "astronaut", "cameraman", project=PROJECT.at(judges=str(judges)), settings=settings
    ).judges == str(judges)
    for lacking, asked, said in (
        (
            "astronaut",
            "astronaut",
            r"lacks the concept to erase, and in all 1 of the 16 concepts of data/catalog/canvas\.",
        ),
        ("astronaut", "cat", r"lacks 1 of the 16 concepts"),
        ("neon", "cat", r"lacks 1 of the 16 concepts of data/catalog/canvas \(neon\)"),
    ):
        names = {kind: [c.name for c in known.values() if c.kind == kind and c.name != lacking] for kind in KINDS}
        save_judge(judges, "report", new_judge("residual", names["object"], names["style"], seed=1))
        with pytest.raises(ConfigError, match=said) as refused:
            prepare_spec(asked, "auto", project=PROJECT.at(judges=str(judges)), settings=settings)
        assert "'report'" in str(refused.value)
        assert "astronaut" not in str(refused.value)  # a person
    # Another spelling is the same name.
    names = {kind: [c.name.upper().replace(" ", "_") for c in known.values() if c.kind == kind] for kind in KINDS}
    save_judge(judges, "report", new_judge("residual", names["object"], names["style"], seed=1))
    assert (
        prepare_spec("astronaut", "cameraman", project=PROJECT.at(judges=str(judges)), settings=settings).concept
        == "astronaut"
    )


def test_a_gate_without_power_is_known_before_the_erasure(workspace: Path) -> None:
    sure = {"ua": 0.9, "ira_loss": 0.1, "cra_loss": 0.1, "neighbours_loss": 0.15, "most": 3}
    few = load_settings(Path("params.yaml"), changes={"gate.sure": sure, "gate.recognised": 0.5})
    spec = prepare_spec("neon", "photo", project=PROJECT, settings=few)
    # 12 objects in 3 rounds of pictures: too few for UA alone; of the rest there are more.
    (said,) = gate_without_power(spec)
    assert said.startswith("36 pictures can never make ua sure, 38 are needed")
    assert (
        gate_without_power(prepare_spec("neon", "photo", project=PROJECT, settings=load_settings(ROOT / "params.yaml")))
        == []
    )


def test_an_erasures_pipeline_file_is_relative_to_the_project(workspace: Path) -> None:
    folder = Path("data/erasures/written")
    spec = make_spec(**VALID)
    write_pipeline(folder, spec)
    stages = yaml.safe_load((folder / "dvc.yaml").read_text())["stages"]
    assert list(stages) == [step.name for step in steps_of(spec)]
    for stage in stages.values():
        assert stage["wdir"] == "../../.."
        assert not any(Path(dep).is_absolute() for dep in stage["deps"])
