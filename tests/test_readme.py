from __future__ import annotations

import re
import shlex

import pytest
import typer

from fade.lineage import ROOT
from flows.cli import app

README = (ROOT / "README.md").read_text()
COMMANDS = sorted({line.split("#")[0].strip() for line in re.findall(r"^    (fade .+)$", README, re.MULTILINE)})


def test_the_readme_shows_commands() -> None:
    assert len(COMMANDS) >= 7
    assert "make demo" in README
    assert "make test" in README


@pytest.mark.parametrize("line", COMMANDS)
def test_every_fade_command_of_the_readme_parses(line: str) -> None:
    group = typer.main.get_command(app)
    name, *arguments = shlex.split(line)[1:]
    command = group.commands[name]  # type: ignore[attr-defined]
    with command.make_context(name, arguments) as context:
        assert context.command is command


def test_every_path_of_the_readme_is_there() -> None:
    named = re.findall(r"`([a-z_]+(?:/[a-z_.]+)+)`", README)
    assert named
    for path in named:
        if not path.startswith(("splits/", "adapter/", "evaluation/", "docs/index", "data/erasures")):
            assert (ROOT / path).exists() or (ROOT / "fade/method" / path).exists(), path
    for picture in re.findall(r"\]\((docs/[^)]+)\)", README):
        assert (ROOT / picture).is_file(), picture


def test_the_makefile_has_the_readmes_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?:^    |`)make (\w+)", README, re.MULTILINE))
    assert {"demo", "test", "check"} <= targets
    for target in targets:
        assert f"\n{target}:" in makefile, target
