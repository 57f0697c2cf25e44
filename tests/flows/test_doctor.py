from __future__ import annotations

import socket
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from fade.files import read_json, write_json
from fade.requests.ledger import Ledger
from flows.cli.app import app
from flows.operations import doctor, doctor_servers
from flows.operations.findings import Finding


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _old_ledger(folder: Path, revision: str) -> str:
    path = folder / "ledger.db"
    url = f"sqlite:///{path}"
    Ledger(url).close()
    assert doctor.ledger(url).verdict == "ok"
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", [revision])
    return url


def _project(folder: Path, **changes: str) -> Path:
    places = {"name": "lost", "catalog": str(folder), "base": "no/base/there", "judges": "no/judges", **changes}
    (folder / "params.yaml").write_text(yaml.safe_dump({"project": places}))
    return folder


def _readable_key(folder: Path) -> Path:
    (folder / "keys").mkdir()
    key = folder / "keys/signing.pem"
    key.write_text("key")
    key.chmod(0o600)
    assert doctor.permissions(folder).verdict == "ok"
    key.chmod(0o644)
    return folder


def _constraints(folder: Path, text: str) -> Path:
    path = folder / "constraints.txt"
    path.write_text(text)
    return path


def _recorded(folder: Path) -> Path:
    write_json(folder / "data/recorded-on.json", {"processor": ["x86_64", "avx2"]})
    return folder


@pytest.mark.parametrize(
    ("look", "verdict", "said", "do"),
    [
        (lambda _: doctor.python_version((3, 13)), "fail", "Python 3.13; expected 3.11", "make"),
        (lambda t: doctor.pins(_constraints(t, "numpy==0.1\n")), "warn", r"numpy .* \(tried: 0\.1\)", "pip install"),
        (lambda t: doctor.pins(t / "none.txt"), "warn", "not compared", ""),
        (lambda _: doctor.torch_build("2.13", "fp32"), "warn", "fast in fp32", "several times as long"),
        (lambda t: doctor.disk(t, free=10), "fail", "0.0 GB free", "dvc gc"),
        (lambda t: doctor.disk(t, free=2 * 10**9), "warn", "2.0 GB free", "Free some"),
        (lambda t: doctor.permissions(_readable_key(t)), "fail", "others can read", "chmod 600"),
        (lambda t: doctor.ledger(_old_ledger(t, "0000")), "warn", "has tables 0000", "fade ledger upgrade"),
        (lambda t: doctor.ledger(_old_ledger(t, "9999")), "fail", "this version knows", "Update fade"),
        (lambda _: doctor.queue("kafka://host"), "warn", "not checked", ""),
        (lambda t: doctor.queue(f"folder:{t}"), "ok", "folder", ""),
        (lambda t: doctor.files([_project(t)]), "fail", "missing: no/judges of project lost, no/base", "git checkout"),
        (
            lambda t: doctor.files([_project(t, base=str(t), judges=str(t), catalog=f"{t}/later", render="canvas")]),
            *("ok", "names is there: lost; rendered at first use: .*later", ""),
        ),
        (doctor.recorded, "ok", "none are kept", ""),
        (lambda t: doctor.recorded(_recorded(t), ["x86_64", "avx2"]), "ok", "of this kind", ""),
        (lambda t: doctor.recorded(_recorded(t), ["arm64"]), "warn", "made on x86_64, avx2, this is arm64", "Audit"),
    ],
)
def test_each_check_sees_its_fault_and_says_what_to_do(
    tmp_path: Path, look: Callable[[Path], Finding], verdict: str, said: str, do: str
) -> None:
    import re

    found = look(tmp_path)
    assert found.verdict == verdict, found
    assert re.search(said, found.said), found
    assert do in found.do


def test_broken_pins_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.pins().verdict != "fail"
    monkeypatch.setattr(doctor, "_version", {"sqlalchemy": "2.1.9"}.get)
    found = doctor.pins()
    assert found.verdict == "fail"
    assert "sqlalchemy 2.1.9" in found.said


def test_ports_servers_and_brokers_that_are_not_there_or_taken(
    monkeypatch: pytest.MonkeyPatch, closed_port: int
) -> None:
    assert doctor.ports({"x": closed_port}).verdict == "ok"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", closed_port))
        taken.listen()
        found = doctor.ports({"MLflow": closed_port})
        assert (found.verdict, f"{closed_port} (MLflow)" in found.said) == ("warn", True)
    found = doctor.queue(f"amqp://guest:secret@127.0.0.1:{closed_port}//")
    assert found.verdict == "fail"
    assert "secret" not in found.said
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert doctor_servers.mlflow().verdict == "ok"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{closed_port}")
    found = doctor_servers.mlflow()
    assert found.verdict == "fail"
    assert "secret" not in found.said


def test_git_that_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert doctor.programs().verdict == "ok"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.programs().verdict == "warn"


def test_a_gpu_build_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    before = doctor.gpu()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert before != doctor.gpu()
    assert doctor.gpu().verdict == "warn"


def test_the_command_lists_every_check_and_fails_if_one_does(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "doctor.json"
    result = CliRunner().invoke(app, ["doctor", "--json", str(out)])
    found = {one["check"]: one["verdict"] for one in read_json(out)["findings"]}
    # The workspace has a base of its own making; all else is as this machine is.
    assert set(found) == {name for name, _ in doctor.CHECKS}
    assert result.exit_code == (1 if "fail" in found.values() else 0), result.output
    assert found["settings"] == "ok"
    monkeypatch.setenv("FADE_LEDGER_URI", "x")
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "FADE_LEDGER_URI is no setting. Did you mean LEDGER_URL" in result.output
