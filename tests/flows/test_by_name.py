"""From nothing to a LoRA file by a name alone: the commands of docs/how-to/own-checkpoint.md, as they stand there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from benchmarks.tiny.families import save_tiny
from fade.data.sets import generated_by
from fade.evaluation.beside import BESIDE
from fade.files import read_json
from fade.lineage import ROOT
from fade.pipeline import steps_of
from fade.project import load_project
from fade.spec import load_spec
from flows.cli.app import app
from flows.erasing import by_name
from flows.settings import ERASURES
from tasks.dvc import versioning
from tasks.erasure import lineage_of
from tasks.mlflow import tracking
from tests.tiny import PROJECT, SETTINGS, save_tiny_base, write_project
from tests.unit.evaluation.test_detectors import save_classifier
from tests.unit.test_by_name import save_clip

TINY = [f"--set={part}.{name}={json.dumps(value)}" for part in ("distill", "saliency", "gate")
        for name, value in SETTINGS[part].items()] + ["--set=gate.sure=null"]  # fmt: skip
"""A tiny base draws noise: few steps, and a gate of which nothing can be asked."""
MOST_COMMANDS = 6


def commands() -> list[str]:
    text = (ROOT / "docs/how-to/own-checkpoint.md").read_text(encoding="utf-8")
    block = re.search(r"## By name\n[\s\S]*?\n\n((?:    .*\n)+)", text)
    assert block is not None
    return [line.strip() for line in block[1].splitlines()]


def fade(*arguments: str) -> str:
    done = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return done.output


def previewed(asked: list[str]) -> list[str]:
    """The command, after its preview has said what would be done and made nothing."""
    known = set(ERASURES.glob("*"))
    assert "The prompts of cat would give: " in fade(*asked, "--preview")
    assert set(ERASURES.glob("*")) == known
    return asked


def check_unjudged(erasure: str, row: dict[str, Any], output: str) -> None:
    """Nobody judged: nothing carries a figure as if somebody had."""
    assert (row["gate"], row["ua"]) == ("unjudged", None), "a figure that means nothing is none"
    assert "Nobody judged" in output
    (version,) = [one for one in tracking.versions() if one.erasure == erasure]
    assert (version.ua, version.ira, version.cra, version.fault) == (None, None, None, "")
    logged = tracking.run_record(version).metrics
    assert "unjudged_ua" in logged
    assert not {"ua", "ira", "cra", "base_ira"} & logged.keys()
    assert "unjudged" in fade("list")


def check_shown(folder: Path, report: str) -> None:
    """Every thumbnail that the report refers to lies beside it, and in the run."""
    beside = {path.name for path in (folder / "evaluation" / BESIDE).iterdir()}
    assert beside == {*re.findall(rf'src="{BESIDE}/([^"]+)"', report)} != set()
    (version,) = [one for one in tracking.versions() if one.erasure == folder.name]
    for name in beside:
        assert tracking.run_file(version, f"{BESIDE}/{name}") == (folder / "evaluation" / BESIDE / name).read_bytes()


def check_articles(judged: pd.DataFrame) -> None:
    """It is judged by the sentence that is learnt, with its article."""
    vowels = judged[judged["object"].str.match("[aeio]")]
    assert len(vowels) > 0
    assert vowels["prompt"].str.startswith("an ").all()


def test_a_small_budget_leaves_alone_a_gate_that_draws_nothing_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_project(tmp_path / "params.yaml", PROJECT, gate={**SETTINGS["gate"], "sure": None})
    spec = SimpleNamespace(base_sha256="0")
    monkeypatch.setattr(
        by_name, "prepare_by_name", lambda _, *, settings, **__: SimpleNamespace(settings=settings, spec=spec)
    )
    found: Any = by_name.prepare("cat", project=load_project(file), changes={}, budget="small")
    assert found.settings.gate.sure is None
    assert tuple(found.settings.evaluate.seeds) == (188, 288)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("layout", "judge"),
    [
        ("Stable Diffusion 1.x", "clip"),
        pytest.param("Stable Diffusion 1.x", "none", marks=pytest.mark.slow),
        pytest.param("FLUX.1", "clip", marks=pytest.mark.slow),
    ],
)
def test_the_commands_of_the_page_lead_from_a_checkpoint_and_a_name_to_a_lora_file(
    workspace: Path, tmp_path: Path, layout: str, judge: str
) -> None:
    said = commands()
    assert 1 < len(said) <= MOST_COMMANDS
    assert [line.split()[:2] for line in said] == [["fade", word] for word in ("init", "erase", "approve", "export")]
    if layout == "FLUX.1":
        save_tiny(tmp_path / "model", "flux-dev")
    else:
        save_tiny_base(tmp_path / "model", seed=3 if judge == "clip" else 4)
    clip = str(save_clip(tmp_path / "clip"))
    given = {"projects/mine": str(tmp_path / "mine"), "MODEL": str(tmp_path / "model"), "CLIP": clip}
    given |= {"Van Gogh": "cat", "erasure.safetensors": str(tmp_path / "erasure.safetensors")}

    def words(line: str, **further: str) -> list[str]:
        known = given | further
        return [known.get(word, word) for word in shlex.split(line)[1:]]

    begun = fade(*words(said[0]))
    assert "fade erase" in begun
    layout_of = "kohya" if layout != "FLUX.1" else "diffusers"
    assert f"fade export ID {'--layout kohya ' if layout_of == 'kohya' else ''}-o" in begun
    given |= {"kohya": layout_of} | ({} if layout_of == "kohya" else {"erasure.safetensors": str(tmp_path / "erasure")})
    out = tmp_path / "figures.json"
    nobody = ["--clip", "none", "--set=gate.recognised=0.5"] if judge == "none" else []
    model = save_classifier(tmp_path / "faces")
    further = [f"--judge={model}", f"--judge={model}=nude"] if judge == "clip" else []
    output = fade(
        *previewed([*words(said[1]), *TINY, *nobody, *further, "--set=threads=1", "--budget=small", f"--json={out}"])
    )
    row = read_json(out)
    folder = Path(row["folder"])
    spec = load_spec(folder)
    assert "cat: an object (guessed" in output
    assert "Most at risk" in output
    assert {"generate", "calibrate", "validate"} < {step.name for step in steps_of(spec)}
    assert all(versioning.is_current(folder, step.name) for step in steps_of(spec))
    forget = pd.read_parquet(folder / "splits" / "forget.parquet")
    assert set(forget["source"]) == {generated_by(spec.base_sha256)}
    assert len(set(forget["caption"])) > len(forget) / 2, "sentences differ"
    check_articles(pd.read_parquet(folder / "evaluation" / "samples.parquet"))
    assert {"asked": "by name", "pictures": "generated by the base"}.items() <= lineage_of(folder).items()
    report = (folder / "evaluation" / "report.html").read_text(encoding="utf-8")
    assert report.index("<td>neighbour</td>") < report.index("<td>erased</td>")
    check_shown(folder, report)
    assert [f"<td>{name}</td>" in report for name in ("faces", "faces_nude")] == [bool(further)] * 2, "a row each"
    because = []
    if judge == "none":
        check_unjudged(spec.id, row, output)
        because = ["--because", "looked at the pictures"]
    fade(*words(said[2], ID=spec.id), *because)
    fade(*words(said[3], ID=spec.id))
    if layout_of == "kohya":
        assert any(key.endswith("lora_down.weight") for key in load_file(tmp_path / "erasure.safetensors"))
    else:
        (file,) = (tmp_path / "erasure").glob("*.safetensors")
        assert any(key.endswith("lora_A.weight") for key in load_file(file))
    fade("rollback", spec.id)
