"""A gate that asks for attacks: they are run before it judges, or refused before anything expensive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fade.asking.prepare import prepare_spec
from fade.config import ATTACKS, Gate, load_settings
from fade.errors import ConfigError
from fade.evaluation.attacked import Attacks
from fade.evaluation.measured import Evaluation
from fade.evaluation.records import load
from fade.steps.attacks import KINDS
from flows.erasing.erase import erase, prepare_folder
from tasks.mlflow import tracking
from tests.tiny import PROJECT

FEW: dict[str, Any] = {"attacks.seeds": [188], "attacks.names": []}


def test_a_gate_knows_its_attacks_and_what_must_be_run_for_them() -> None:
    assert tuple(ATTACKS) == KINDS
    assert Gate().attack_kinds == ()
    assert Gate(attacks={"inversion": 0.2, "misspelling": 0.1, "paraphrase": 0.1}).attack_kinds == (
        "prompts",
        "inversion",
    )
    for attacks, said in (({"paraphrases": 0.1}, "expected one of paraphrase"), ({"noised": 1.5}, "got 1.5")):
        with pytest.raises(ValueError, match=said):
            Gate(attacks=attacks)


@pytest.mark.parametrize(
    ("concept", "also", "asked", "said"),
    [
        ("neon", [("oil", "photo")], "paraphrase", "an attack is of one concept: 2 are"),
        ("neon", [], "synonym", "no other name"),
    ],
)
def test_an_attack_that_cannot_be_run_is_refused_before_training(
    workspace: Path, concept: str, also: list[tuple[str, str]], asked: str, said: str
) -> None:
    settings = load_settings(Path("params.yaml"), changes={**FEW, "gate.attacks": {asked: 0.5}})
    with pytest.raises(ConfigError, match=said):
        prepare_spec(concept, "photo", project=PROJECT, settings=settings, also=also)
    named = settings.model_copy(update={"attacks": settings.attacks.model_copy(update={"names": ("glow",)})})
    if asked == "synonym":
        assert prepare_spec(concept, "photo", project=PROJECT, settings=named).gate.attack_kinds == ("prompts",)


@pytest.mark.timeout(1800)
def test_an_erasure_runs_the_attacks_its_gate_asks_for_and_is_judged_by_them(workspace: Path) -> None:
    # No figure of a tiny base says anything: of so few pictures an upper bound is never as low as that.
    changes = {**FEW, "gate.attacks": {"paraphrase": 1.0, "misspelling": 0.0}, "threads": 1}
    spec = prepare_spec("cat", "horse", project=PROJECT, settings=load_settings(Path("params.yaml"), changes=changes))
    folder = prepare_folder(spec)
    stages = yaml.safe_load((folder / "dvc.yaml").read_text())["stages"]
    assert list(stages)[-2:] == ["attack", "evaluate"]
    assert f"{folder.as_posix()}/attacked.json" in stages["evaluate"]["deps"]
    version = erase(spec.id)
    found = load(Attacks, folder / "attacked.json")
    paraphrase = found.root["paraphrase"]
    assert 0 <= paraphrase.value <= paraphrase.high
    assert "inversion" not in found.root  # nobody asked
    metrics = load(Evaluation, folder / "evaluation/metrics.json")
    assert metrics.attacks == found
    assert metrics.gate.verdict == "failed"
    (reason,) = metrics.gate.reasons
    assert "the attack misspelling brings the concept back in up to" in reason
    assert "candidate" not in version.aliases
    assert tracking.run_record(version).metrics["paraphrase_high"] == pytest.approx(paraphrase.high)
    assert "Brought back by attacks" in (folder / "evaluation/report.html").read_text()
    assert "attack" in yaml.safe_load((folder / "dvc.lock").read_text())["stages"]
    # Asked again, nothing is run again.
    written = (folder / "attacks/prompts.json").stat().st_mtime_ns
    assert erase(spec.id).version == version.version
    assert (folder / "attacks/prompts.json").stat().st_mtime_ns == written
