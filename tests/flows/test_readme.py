"""Every command of README and documentation: none is left out, and each parses."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from dvc.cli import DvcParserError, parse_args
from kombu import Connection
from markdown_it import MarkdownIt

from fade.environment import INFRA_NAMES, variables
from fade.lineage import ROOT
from fade.requests import webhooks
from fade.requests.messages import read_message
from flows.cli.app import app
from tests.databases import missing

GROUP: Any = typer.main.get_command(app)
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "infra/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOREIGN = {
    *INFRA_NAMES,
    "MLFLOW_TRACKING_URI",
    "PREFECT_API_DATABASE_CONNECTION_URL",
    "PREFECT_API_AUTH_STRING",
    "FADE_PUBLIC_KEY",
}
"""Variables that commands set and no setting of ours is."""
MADE = {"infra/.env", ".fade/native.env", "my-secret.yaml", "prefect.yaml", ".venv/bin/activate"}
"""Files that a command names and that a person or another command makes."""
_INLINE = re.compile(r"`(?:[A-Z_]+=\S+ )*(fade [^`]+)`")
_VARIABLE = re.compile(r"([A-Z][A-Z0-9_]+)=(\S*)\s*")


def blocks(page: Path) -> list[str]:
    """Every block of code on a page but Python's, each of its paragraphs by itself."""
    tokens = MarkdownIt().parse(page.read_text())
    code = [one.content for one in tokens if one.type in ("code_block", "fence") and one.info != "python"]
    return [paragraph for block in code for paragraph in block.split("\n\n") if paragraph.strip()]


def is_picture(block: str) -> bool:
    """A drawing of a request's way, the tree of files, or a formula."""
    return " -> " in block or block.lstrip().startswith(("fade/  ", "L = "))


def commands() -> list[str]:
    """Every command in a block, without what it says behind a #."""
    lines = [
        line for page in PAGES for block in blocks(page) if not is_picture(block) for line in block.strip().split("\n")
    ]
    found = {re.sub(r"(^|\s+)#.*", "", line).strip() for line in lines}
    return sorted(part for line in found - {""} for part in line.split(" && "))


COMMANDS = commands()
OURS = sorted({_VARIABLE.sub("", line) for line in COMMANDS if _VARIABLE.sub("", line).startswith("fade ")})


def find(line: str) -> tuple[Any, list[str]]:
    """The command that a line calls, and what it is given."""
    command, arguments = GROUP, shlex.split(line)[1:]
    while hasattr(command, "commands") and arguments:
        name, *arguments = arguments
        assert name in command.commands, f"{line}: there is no command {name}"
        command = command.commands[name]
    return command, arguments


def _fade(arguments: list[str]) -> None:
    command, given = find(shlex.join(["fade", *arguments]))
    with command.make_context(command.name, given) as context:
        assert context.command is command


def _make(arguments: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for name in arguments:
        variable, given, _ = name.partition("=")
        assert f"\n{variable} ?=" in makefile if given else f"\n{name}:" in makefile, name


def _python(arguments: list[str]) -> None:
    """A program of the project, with options that it has."""
    module = arguments[0] == "-m"
    name, rest = arguments[module], arguments[module + 1 :]
    assert ((ROOT / f"{name.replace('.', '/')}.py") if module else ROOT / name).is_file(), name
    if any(part.startswith("-") for part in rest):
        told = subprocess.run(
            [sys.executable, *arguments[: module + 1], "--help"], capture_output=True, cwd=ROOT, check=False
        )
        assert {part.encode() for part in rest if part.startswith("--")} <= set(told.stdout.split()), name


def _pip(arguments: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert arguments[0] == "install"
    for one in arguments:
        if asked := re.fullmatch(r"\.\[(.+)\]", one):
            assert set(asked[1].split(",")) <= set(extras), one
    assert "-c" not in arguments or (ROOT / arguments[arguments.index("-c") + 1]).is_file()


def _dvc(arguments: list[str]) -> None:
    assert parse_args(arguments).func


def _prefect(arguments: list[str]) -> None:
    words = [one for one in arguments if not one.startswith("-")]
    asked = {"work-pool": ["work-pool", "create"], "deploy": ["deploy"], "worker": ["worker", "start"]}[words[0]]
    told = subprocess.run(
        [sys.executable, "-m", "prefect", *asked, "--help"], capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stderr
    options = {one for one in arguments[arguments.index(asked[-1]) :] if one.startswith("--")}
    assert options <= set(re.findall(r"--[\w-]+", told.stdout)), told.stdout
    _files(arguments)


def _accelerate(arguments: list[str]) -> None:
    """A program of the project in several processes."""
    assert arguments[0] == "launch"
    _python(arguments[arguments.index("-m") :])


def _dask(arguments: list[str]) -> None:
    told = subprocess.run(
        [sys.executable, "-m", "dask", arguments[0], "--help"], capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stderr
    assert {one for one in arguments if one.startswith("--")} <= set(re.findall(r"--[\w-]+", told.stdout)), told.stdout


def _files(arguments: list[str]) -> None:
    """Another's program: what it is given of ours is there. What it does with it, services/test_infra.py looks at."""
    for one in arguments:
        if re.search(r"/|\.ya?ml$|\.env$", one) and not one.startswith(("-", "http")):
            assert one in MADE or (ROOT / one).exists(), one


def _honcho(arguments: list[str]) -> None:
    """With `run`, another command with the environment of a file."""
    place = arguments.index("run") if "run" in arguments else len(arguments)
    _files(arguments[:place])
    if rest := arguments[place + 1 :]:
        KNOWN[rest[0]](rest[1:])


def _export(arguments: list[str]) -> None:
    # What a shell puts in place of $(...) is no variable, though it may hold blanks.
    for one in shlex.split(re.sub(r"\$\(.*?\)", "value", shlex.join(arguments).replace("'", ""))):
        _set(one.partition("=")[0])


def _set(name: str) -> None:
    assert name in FOREIGN or name in variables(), f"{name} is no variable"


KNOWN: dict[str, Callable[[list[str]], None]] = {
    "fade": _fade,
    "make": _make,
    "python": _python,
    "pip": _pip,
    "dvc": _dvc,
    "prefect": _prefect,
    "accelerate": _accelerate,
    "dask": _dask,
    "export": _export,
    "pytest": _files,
    "honcho": _honcho,
    "docker": _files,
    "kubectl": _files,
    "cp": _files,
    ".": _files,
    "git": lambda arguments: None if arguments[0] in ("clone", "diff") else pytest.fail(f"git {arguments}"),
    "pip-audit": _files,
    "apt-get": lambda arguments: None if arguments[0] == "install" else pytest.fail(f"apt-get {arguments}"),
    "pre-commit": lambda arguments: None if arguments == ["install"] else pytest.fail(f"pre-commit {arguments}"),
}


def test_commands_are_found_and_no_picture_hides_one() -> None:
    assert {"make demo", "make test", "fade ledger verify"} <= set(COMMANDS)
    pictures = [block for page in PAGES for block in blocks(page) if is_picture(block)]
    assert pictures
    assert not [
        block for block in pictures if re.search(r"^(fade|make|python|pip|dvc|pytest|docker) ", block, re.MULTILINE)
    ]


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_of_readme_and_docs_is_known_and_parses(line: str) -> None:
    """What no entry of KNOWN looks at fails: nothing is left out in silence."""
    while found := _VARIABLE.match(line):
        _set(found[1])
        line = line[found.end() :]
    if line:
        program, *arguments = shlex.split(line)
        assert program in KNOWN, f"no test knows the command {line!r}"
        KNOWN[program](arguments)


def test_a_wrong_command_would_be_seen() -> None:
    for line in ("fade eras --concept cat", "make everything", "python examples/none.py", "pip install .[non]"):
        program, *arguments = shlex.split(line)
        with pytest.raises(AssertionError):
            KNOWN[program](arguments)
    with pytest.raises(DvcParserError):
        _dvc(["repro", "--nonsense"])


def test_the_programs_on_the_pages_run() -> None:
    """One sends a request to RabbitMQ, here to a queue of its own; one is what a receiver of webhooks does."""
    found = [one.content for page in PAGES for one in MarkdownIt().parse(page.read_text()) if one.info == "python"]
    program, receiver = found
    exec(receiver, receiving := {})  # type: ignore[var-annotated]  # noqa: S102 (the page's own program)
    headers = {"X-Fade-Timestamp": "1", "X-Fade-Signature": webhooks.sign(b"{}", timestamp=1, key=b"secret")}
    assert receiving["is_genuine"](headers, b"{}", "secret")
    assert not receiving["is_genuine"](headers, b"{ }", "secret")
    name = f"fade.test.{uuid.uuid4().hex}"
    assert '"fade.requests"' in program
    sent: dict[str, Any] = {}
    try:
        exec(program.replace('"fade.requests"', f'"{name}"'), sent)  # noqa: S102 (the page's own program)
    except OSError:
        missing("RabbitMQ")
    with Connection(re.search(r"amqp://[^\"]+", program)[0]) as connection:  # type: ignore[index]
        queue = connection.SimpleQueue(name)
        letter = queue.get(timeout=20)
        letter.ack()
        queue.close()
        connection.default_channel.queue_delete(name)
        connection.default_channel.exchange_delete(name)
    assert str(read_message(letter.body).id) == sent["message"]["id"]


def test_commands_that_a_sentence_names_are_there_with_their_options() -> None:
    """Such a command may be cut short, so it is not parsed."""
    mentioned = sorted({line for page in PAGES for line in _INLINE.findall(page.read_text())})
    assert mentioned
    for line in mentioned:
        command, arguments = find(line)
        options = {option for one in command.params for option in (*one.opts, *one.secondary_opts)}
        assert {part for part in arguments if part.startswith("--")} <= options, line


def test_every_path_of_the_readme_is_there() -> None:
    named = re.findall(r"`([a-z_]+(?:/[a-z_.]+)+)`", README)
    assert named
    for path in named:
        if not path.startswith(("splits/", "adapter/", "evaluation/", "docs/index", "data/erasures")):
            assert (ROOT / path).exists() or (ROOT / "fade/methods" / path).exists(), path
    for linked in re.findall(r"\]\((docs/[^)]+)\)", README):
        file, _, heading = linked.partition("#")
        assert (ROOT / file).is_file(), linked
        if heading:
            titles = re.findall(r"^#+ (.+)$", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, linked


def test_the_makefile_has_the_readmes_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?:^    |`)make ([\w-]+)", README, re.MULTILINE))
    assert {"demo", "test", "check"} <= targets
    for target in targets:
        assert f"\n{target}:" in makefile, target


def test_every_variable_of_the_pages_is_a_setting() -> None:
    for page in PAGES:
        named = set(re.findall(r"\bFADE_[A-Z_]*[A-Z]\b", page.read_text()))
        assert {name for name in named if not name.startswith("FADE_TEST")} <= {*variables(), *FOREIGN}, page


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


def test_before_a_commit_what_make_check_runs_is_run() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    entries = {one["entry"].removeprefix(".venv/bin/") for one in hooks}
    recipe = re.search(r"^check: install\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    asked = {re.sub(r" \.$", "", line.strip()) for line in recipe[1].splitlines()}
    assert len(asked) == 4
    assert asked <= entries
    assert all(one["language"] == "system" and one["types"] == ["python"] for one in hooks)
