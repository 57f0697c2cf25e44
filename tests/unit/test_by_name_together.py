"""Several erasures by name at once: one judge learns all their names, or it is said why it cannot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from fade.asking.by_name import prepare_by_name
from fade.asking.planned import Asked
from fade.config import Settings
from fade.data.catalog import read_concepts_file
from fade.errors import ConfigError
from fade.evaluation.measured import Combination, Evaluation
from fade.evaluation.records import load
from fade.methods.closed_form import held
from fade.methods.fade.training import closed_form_changes
from fade.models.family import load_base
from fade.pipeline import run, steps_of
from fade.project import Project
from fade.spec import CALIBRATED, GENERATED, Spec, load_spec, save_spec
from fade.steps.adapter import material
from fade.steps.alike import check_alike
from fade.steps.combine import combine
from fade.steps.encoded import further_prompts
from tasks.mlflow.runs import flat_figures
from tests.tiny import plain_spec, save_tiny_base
from tests.unit.evaluation.test_detectors import save_classifier
from tests.unit.test_by_name import save_clip


@pytest.fixture(scope="module")
def erasures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two erasures by name of one base and CLIP, with all but their evaluation; where they lie the plans are."""
    root = tmp_path_factory.mktemp("together")
    base, clip = root / "base", save_clip(root / "clip")
    save_tiny_base(base)
    matcher = save_classifier(root / "matcher")
    own = {"settings": "fixed", "threads": 1, "distill": {"steps": 2, "batch": 2}, "tune": {"pictures": 2}}
    own |= {"split": {"forget_per_pair": 1, "retain_per_pair": 1, "holdout_per_pair": 1}, "saliency": {"group_size": 2}}
    own |= {"evaluate": {"seeds": [188], "steps": 2}, "gate": {"recognised": 0.5}}
    project = Project(name="tiny", catalog="nowhere", base=str(base), judges="nowhere")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        found = {}
        for concept, surrogate in (("cat", "horse"), ("neon", "oil")):
            further = (str(matcher), f"{matcher}=nude") if concept == "cat" else ()
            asked = Asked(concept, surrogate=surrogate, clip=str(clip), judges=further, budget="small")
            spec = prepare_by_name(asked, project=project, settings=Settings(**own)).spec
            found[concept] = root / spec.id
            save_spec(spec, found[concept])
            for step in steps_of(spec):
                if step.in_trials and step.name != "evaluate":
                    for _ in run(step, found[concept]):
                        pass
    return found


def test_erasures_by_name_are_judged_together_by_one_judge_of_all_their_names(
    erasures: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = list(erasures.values())
    monkeypatch.chdir(folders[0].parent)
    own = [{one["name"] for one in read_concepts_file(folder / CALIBRATED)["concepts"]} for folder in folders]
    assert own[0] != own[1], "each knows what was drawn for it"
    for _ in combine(folders, tmp_path / "both"):
        pass
    found = load(Combination, tmp_path / "both" / "metrics.json")
    assert set(found.report.after.erased) == {"cat", "neon"}
    assert set(found.adapters) == {folder.name for folder in folders}
    known = {one["name"] for one in read_concepts_file(tmp_path / "both" / CALIBRATED)["concepts"]}
    assert {"cat", "horse", "neon", "oil"} <= known <= own[0] | own[1]


def test_further_judges_have_their_rows(erasures: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(erasures["cat"].parent)
    folder = erasures["cat"]
    (evaluate,) = [step for step in steps_of(load_spec(folder)) if step.name == "evaluate"]
    for _ in run(evaluate, folder):
        pass
    found = load(Evaluation, folder / "evaluation" / "metrics.json")
    assert [one.name for one in found.detectors] == ["matcher", "matcher_nude"]
    own = found.report.after.erased["cat"].ua.count
    assert [(one.before.count, one.after.count) for one in found.detectors] == [(own, own)] * 2
    assert "<h2>Further judges</h2>" in (folder / "evaluation" / "report.html").read_text(encoding="utf-8")
    logged = {name.removeprefix("base_") for name in flat_figures(found, {}) if "shown_by" in name}
    assert logged == {f"shown_by_{one.name}" for one in found.detectors if one.able}


def test_what_is_solved_keeps_words_that_nothing_was_drawn_of(
    erasures: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(erasures["cat"].parent)
    folder, spec = erasures["cat"], load_spec(erasures["cat"])
    base = load_base(spec.base)
    given = material(base, spec, folder, masked=True)
    drawn = set(pd.read_parquet(folder / "splits" / "retain.parquet")["caption"])
    unseen = [one for one in further_prompts(spec) if one not in drawn]
    assert len(unseen) > 10
    assert given.mask is not None
    told = base.encode_prompts(unseen)
    states = held(base.denoiser.read(told.states), told.mask).double()
    moved = []
    for one in (given, replace(given, told=None)):
        changes = closed_form_changes(base, one, spec.distill, given.mask)
        moved.append(
            sum(float((states @ (change.B @ change.A).double().T).square().mean()) for change in changes.values())
        )
    assert moved[0] < moved[1] / 2


def test_what_cannot_be_judged_together_by_name_says_why(
    erasures: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(erasures["cat"].parent)
    cat, neon = (load_spec(folder) for folder in erasures.values())

    def beside_cat(other: Spec, *, drawn: bool = True) -> list[Path]:
        folder = tmp_path / other.id
        save_spec(other, folder)
        if drawn:
            (folder / GENERATED).mkdir(exist_ok=True)
        return [erasures["cat"], folder]

    assert check_alike(beside_cat(neon)) == [cat, neon]
    with pytest.raises(ConfigError, match="by a catalog the others: no judge knows the concepts of both"):
        check_alike(beside_cat(plain_spec()))
    with pytest.raises(ConfigError, match="differ in 'clip_sha256'"):
        check_alike(beside_cat(neon.model_copy(update={"clip_sha256": "0" * 64})))
    with pytest.raises(ConfigError, match="give instead is erased by another"):
        check_alike(beside_cat(neon.model_copy(update={"concept": "horse", "surrogate": "dog", "kind": "object"})))
    with pytest.raises(ConfigError, match=r"are gone \(`fade purge`\)"):
        check_alike(beside_cat(neon.model_copy(update={"aliases": ("glow",)}), drawn=False))
