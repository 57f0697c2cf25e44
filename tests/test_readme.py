from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
import typer

from fade.environment import INFRA_NAMES, variables
from fade.lineage import ROOT
from flows.cli import app

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "infra/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_COMMAND = re.compile(r"^(?: {4}| {8})(?:[A-Z_]+=\S+ )*(fade .+)$", re.MULTILINE)
_INLINE = re.compile(r"`(?:[A-Z_]+=\S+ )*(fade [^`]+)`")


def commands(pattern: re.Pattern[str]) -> list[str]:
    """Every fade command of README and documentation that is written in this way."""
    return sorted({line.split(" #")[0].strip() for page in PAGES for line in pattern.findall(page.read_text())})


COMMANDS = commands(_COMMAND)


def test_the_readme_shows_commands() -> None:
    assert len(COMMANDS) >= 50
    assert "make demo" in README
    assert "make test" in README


@pytest.mark.parametrize("line", COMMANDS)
def test_every_fade_command_of_readme_and_docs_parses(line: str) -> None:
    command, arguments = find(line)
    with command.make_context(command.name, arguments) as context:
        assert context.command is command


def find(line: str) -> tuple[Any, list[str]]:
    """The command that a line calls, and what it is given."""
    command, arguments = typer.main.get_command(app), shlex.split(line)[1:]
    while hasattr(command, "commands") and arguments:
        name, *arguments = arguments
        assert name in command.commands, f"{line}: there is no command {name}"
        command = command.commands[name]
    return command, arguments


def test_commands_that_a_sentence_names_are_there_with_their_options() -> None:
    """Such a command may be cut short, so it is not parsed."""
    mentioned = commands(_INLINE)
    assert len(mentioned) > 15
    for line in mentioned:
        command, arguments = find(line)
        options = {option for one in command.params for option in (*one.opts, *one.secondary_opts)}
        assert {part for part in arguments if part.startswith("--")} <= options, line


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


def test_every_variable_of_the_pages_is_a_setting() -> None:
    for page in PAGES:
        named = set(re.findall(r"\bFADE_[A-Z_]*[A-Z]\b", page.read_text()))
        assert {name for name in named if not name.startswith("FADE_TEST")} <= {*variables(), *INFRA_NAMES}, page


def test_every_picture_and_link_of_the_pages_is_there() -> None:
    links = 0
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"
            links += 1
    assert links > 10


def test_the_navigation_names_every_page() -> None:
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    named = set(re.findall(r"([\w/-]+\.md)", (ROOT / "mkdocs.yml").read_text()))
    assert pages == named
