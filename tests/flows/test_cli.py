from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from fade.errors import ConfigError, ResourceError
from flows.cli.app import app
from flows.services.local import check_port
from flows.settings import project_root


def run(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line as a user has it; wide enough that no message is wrapped."""
    return subprocess.run(
        [sys.executable, "-m", "flows.cli.app", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", **environment},
    )


def run_here(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The same without a process of its own, whose imports take longer than most of what is asked of it."""
    assert folder == Path.cwd(), "a process works in one folder"
    result = CliRunner(env=environment).invoke(app, arguments)
    return subprocess.CompletedProcess(arguments, result.exit_code, result.stdout, result.stderr)


def _all_commands(group: Any, name: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for word, command in group.commands.items():
        yield (*name, word), command
        if hasattr(command, "commands"):
            yield from _all_commands(command, (*name, word))


def test_help_says_what_every_command_and_option_is_for() -> None:
    found = dict(_all_commands(typer.main.get_command(app)))
    assert ("request", "submit") in found
    for name, command in found.items():
        assert (command.help or "").strip(), name
        for option in command.params:
            if option.param_type_name == "option" and option.name != "help":
                assert (getattr(option, "help", "") or "").strip(), (name, option.name)
    assert CliRunner().invoke(app, ["--version"]).stdout == f"fade {version('fade-erasure')}\n"
    shown = CliRunner().invoke(app, ["--help"]).stdout
    assert all(name[0] in shown for name in found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["erase", "--concept", "astronot", "--surrogate", "cameraman"], "Did you mean 'astronaut'"),
        (["erase", "--concept", "cat", "--surrogate", "cat"], "surrogate must differ"),
        (["erase", "--concept", "cat", "--surrogate", "neon"], "must be of one kind"),
        (["erase", "--concept", "cat", "--surrogate", "horse", "--base", "nowhere"], "No base model in nowhere"),
        (["erase", "--concept", "cat", "--surrogate", "horse", "--base-sha256", "00"], "is another one"),
        (["erase", "--concept", "cat", "--surrogate", "horse", "--catalog", "nowhere"], "No concepts in nowhere"),
        (["erase", "--concept", "cat", "--surrogate", "horse", "--steps", "0"], "distill.steps"),
        (["erase", "--concept", "cat", "--surrogate", "horse", "--set", "mask.densty=1"], "mask.densty"),
        (["erase", "--concept", "cat", "--surrogate", "horse", "--set", "mask"], "expected NAME=VALUE"),
        (["erase", "--concept", "cat", "--surrogate", "horse", "--set", "seed.x=1"], "seed"),
        (["generate", "--prompt", "a cat", "-o", "x.png", "--without-erasures", "--live"], "Choose one of"),
        (["generate", "--prompt", " ", "-o", "x.png", "--without-erasures"], "prompt is empty"),
        (["erase", "--concept", "cat", "--surrogate", "horse", "--set", "[/x]"], "--set '[/x]' is no setting"),
        (["show", "nothing"], "No adapter 'nothing' is registered"),
        (["show", "[/red] x"], "No adapter '[/red] x' is registered"),
        (["approve", "nothing:x"], "expected an id, or id:version"),
        (["up", "--cron", "61 * * * *"], "'61 * * * *' is no cron line"),
        (["drain", "--cron", "hourly"], "'hourly' is no cron line"),
        (["drain", "--cron", "0 3 * * *", "--timezone", "Europe/Berln"], "Did you mean 'Europe/Berlin'"),
        (["up", "--timezone", "Nowhere"], "no time zone 'Nowhere'"),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(workspace: Path, arguments: list[str], message: str) -> None:
    erasures = workspace / "data/erasures"
    before = set(erasures.iterdir()) if erasures.is_dir() else set()
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1, result.output
    assert message in result.stderr
    assert result.stderr.startswith("Error:")
    assert result.stderr.count("\n") == 1
    assert (set(erasures.iterdir()) if erasures.is_dir() else set()) == before


def test_generate_writes_the_bases_picture_and_another_process_the_same_one(workspace: Path, tmp_path: Path) -> None:
    drawn = []
    for name, call in (("a", run), ("b", run_here)):
        out, figures = tmp_path / f"{name}.png", tmp_path / f"{name}.json"
        asked = ("--prompt", "a cat image in neon style.", "-o", str(out), "--json", str(figures))
        result = call("generate", *asked, "--without-erasures", folder=workspace)
        assert result.returncode == 0, result.stderr
        assert json.loads(figures.read_text())["adapters"] == []
        drawn.append(out.read_bytes())
    assert drawn[0] == drawn[1]


def test_a_taken_port_is_said_with_the_option_to_change_it(workspace: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=f"Port {port} is taken.*--mlflow-port PORT"):
            check_port(port, "MLflow", "--mlflow-port")
        result = run_here("ui", "--mlflow-port", str(port), folder=workspace)
    assert result.returncode == 1
    assert f"Port {port} is taken" in result.stderr


def test_outside_a_project_the_error_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lies in no FADE project"):
        project_root(tmp_path)


def test_the_demo_erases_approves_rolls_back_and_writes_its_figures(workspace: Path, tmp_path: Path) -> None:
    figures = tmp_path / "demo.json"
    result = run("demo", "--json", str(figures), folder=workspace)
    assert result.returncode == 0, result.stdout + result.stderr
    content = json.loads(figures.read_text())
    assert content["rollback_bits_equal"] is True
    assert [(row["concept"], row["surrogate"], row["kind"]) for row in content["erasures"]] == [
        ("astronaut", "cameraman", "person"),
        ("neon", "photo", "style"),
    ]
    asked = {"ua", "ira", "cra", "base_ira", "base_cra", "drift", "samples", "distill_seconds", "total_seconds"}
    for row in content["erasures"]:
        assert asked | {"adapter_bytes", "adapter_sha256", "model_version"} <= set(row)
        assert 0 <= row["ua"] <= 1
    assert (workspace / content["rollback_sheet"]).is_file()
    assert "bit for bit" in result.stdout


def test_what_only_looks_things_up_does_not_load_torch(workspace: Path) -> None:
    commands = [["--help"], ["list"], ["show", "nothing"], ["live"], ["status"], ["request", "list"]]

    def found(before: str) -> str:
        """The commands in one process, which stops at the first that loads something heavy."""
        code = (
            f"{before}import sys\nfrom flows.cli.app import app\n"
            f"for command in {commands!r}:\n"
            "    try: app(command)\n"
            "    except SystemExit: pass\n"
            "    heavy = [name for name in ('torch', 'diffusers') if name in sys.modules]\n"
            "    if heavy: break\n"
            "print('loaded:', (command, heavy) if heavy else heavy)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=workspace, capture_output=True, text=True, timeout=240, check=False
        )
        assert "loaded:" in done.stdout, done.stderr
        return done.stdout.rsplit("loaded:", 1)[1].strip()

    assert found("import torch\n") == "(['--help'], ['torch'])", "the list would tell"
    assert found("") == "[]"
