"""The examples as their headers say, and the documented commands that no other test gives; on a tiny base."""

from __future__ import annotations

import io
import json
import os
import runpy
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from dvc.repo import Repo
from PIL import Image
from typer.testing import CliRunner

from fade.adapters.card import load_card
from fade.adapters.manifest import MANIFEST_NAME, publish
from fade.files import read_json
from fade.lineage import ROOT
from flows.cli.app import app
from flows.studies.contest import plan_contest
from tasks.dvc.versioning import write_pipeline
from tasks.trials import trial
from tests.servers import free_port, wait_until
from tests.tiny import PROJECT
from tests.unit.adapters.test_adapters import _adapter
from tests.unit.models.test_train import BASE, JUDGES, REPORT

pytestmark = pytest.mark.timeout(900)


def example_here(name: str, *arguments: object, folder: Path, status: int = 0) -> str:
    """The same in this process: the libraries are loaded already."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patched, redirect_stdout(said):
        patched.chdir(folder)
        patched.setattr(sys, "argv", [name, *(str(one) for one in arguments)])
        try:
            runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        except SystemExit as ended:
            assert status == 1
            return f"{ended.code}"
    assert status == 0
    return said.getvalue()


def example(name: str, *arguments: object, folder: Path, status: int = 0) -> str:
    """What an example prints, and what it says at its end."""
    given = [str(one) for one in arguments]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *given], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr[-500:]


def test_a_program_of_ones_own_draws_with_what_is_live_and_stops_without_it(tiny_base: Path, tmp_path: Path) -> None:
    key, release = Ed25519PrivateKey.generate(), tmp_path / "release"
    public = tmp_path / "public.pem"
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    given = ("live_adapters.py", tiny_base, release, public, "a cat image.")
    pictures = []
    for call, adapters in (
        (example, []),
        (example_here, [("erasure-cat/1", _adapter(tiny_base, tmp_path / "adapter"), 1.0)]),
    ):
        publish(release, adapters, base=tiny_base, key=key)
        said = call(*given, folder=tmp_path)
        pictures.append(Image.open(tmp_path / "live.png").copy())
        assert ("erasure-cat/1" if adapters else "the base alone") in said
    assert pictures[0].tobytes() != pictures[1].tobytes()
    (tmp_path / "live.png").unlink()
    (release / MANIFEST_NAME).unlink()
    assert "Nothing is drawn:" in example_here(*given, folder=tmp_path, status=1)
    assert not (tmp_path / "live.png").exists()


def test_a_method_of_ones_own_is_a_trial_and_a_stage_like_any(workspace: Path) -> None:
    """A file in the project: compared, and its code among what DVC holds the adapter to."""
    shutil.copyfile(ROOT / "examples/own_method.py", workspace / "own_method.py")
    changes = {"threads": 1, "mean-shift.strength": 0.5}
    (entry,) = plan_contest(["own_method:METHOD"], ["cat:horse"], project=PROJECT, changes=changes)
    assert entry.spec.methods == {"mean-shift": {"strength": 0.5}}
    row = trial(entry.folder, here=True)
    assert row["steps"] == 1
    assert load_card(entry.folder / "adapter")["method"] == "mean-shift"
    write_pipeline(entry.folder, entry.spec)
    stages = yaml.safe_load((entry.folder / "dvc.yaml").read_text())["stages"]
    assert "own_method.py" in stages["adapter"]["deps"]
    assert not {"saliency", "mask", "distill"} & set(stages)


@pytest.fixture(scope="module")
def own_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    example_here("own_pictures.py", "pictures", "--count", 2, folder=folder)
    assert len(list(folder.rglob("*.jpg"))) == 8 * 12 * 2
    return folder / "pictures"


def test_from_pictures_to_a_base_of_ones_own(
    own_pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands of the README's section "Your own miniature", the trainings cut to a few steps."""
    project = tmp_path / "project"
    project.mkdir()
    Repo.init(str(project), no_scm=True).close()
    (project / "params.yaml").write_text(yaml.safe_dump({"base": BASE, "base_report": REPORT, "judges": JUDGES}))
    monkeypatch.setenv("FADE_ROOT", str(project))
    monkeypatch.chdir(project)

    def fade(*arguments: str) -> str:
        result = CliRunner().invoke(app, [*arguments])
        assert result.exit_code == 0, result.output
        return result.output

    catalog = "data/catalog/mine"
    fade("catalog", "build", "unlearncanvas", str(own_pictures), "--out", catalog, "--size", "64")
    assert "fish" in fade("catalog", "show", catalog)
    more = tmp_path / "more/sun"
    more.mkdir(parents=True)
    shutil.copy(own_pictures / "Seed_Images/Star/1.jpg", more)
    fade("catalog", "add", catalog, "folder", str(more.parent), "--json", "added.json")
    assert read_json(Path("added.json")) != {}
    fade("init", "projects/mine", "--base", "data/base/mine")
    mine = ("--project", "projects/mine", "--threads", "1")
    fade("classifier", "train", *mine)
    assert (project / "data/judges-mine/report.safetensors").is_file()
    steps = ("--autoencoder-steps", "2", "--denoiser-steps", "2")
    said = fade("base", "train", *mine, "--judges", "data/judges-mine", *steps)
    assert "object recognised" in said
    assert (project / "data/base/mine.report/sheet.png").is_file()


def test_the_service_answers_and_ends_with_its_manifest(workspace: Path, tmp_path: Path) -> None:
    """`fade serve` as a process; what it draws, tests/flows/test_release.py and test_runtime.py look at."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    token = "a-token-for-this-test"
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.cli.app", "serve", "--port", str(port)],
        cwd=workspace,
        env={**os.environ, "FADE_SERVICE_TOKEN": token},
        stdout=(tmp_path / "log").open("w"),
        stderr=subprocess.STDOUT,
    )

    def health() -> bool:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=20) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    try:
        assert wait_until(lambda: health() or process.poll() is not None, 180), (tmp_path / "log").read_text()
        body = json.dumps({"prompt": "a cat image.", "steps": 1}).encode()
        spec = urllib.request.Request(f"{address}/generate", data=body, headers={"content-type": "application/json"})
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(spec, timeout=60)
        spec.add_header("authorization", f"Bearer {token}")
        with urllib.request.urlopen(spec, timeout=120) as answer:
            assert answer.read(8) == b"\x89PNG\r\n\x1a\n"
    finally:
        process.terminate()
        process.wait(timeout=60)


def test_no_webhook_waits_in_an_empty_ledger(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FADE_LEDGER_URL", f"sqlite:///{tmp_path / 'ledger.db'}")
    assert "FADE_WEBHOOK_SECRET" in CliRunner().invoke(app, ["webhooks"]).output
    monkeypatch.setenv("FADE_WEBHOOK_SECRET", "a-secret-for-this-test")
    assert "has version" in CliRunner().invoke(app, ["ledger", "upgrade"]).output
    assert "0 sent, 0 wait" in CliRunner().invoke(app, ["webhooks"]).output
