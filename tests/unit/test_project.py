"""A project is a value: read from a params.yaml, chosen by name, kept apart in the ledger, begun by `fade init`."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from fade.config import load_settings
from fade.environment import environment
from fade.errors import ConfigError, DataError
from fade.hardware import fast_precision
from fade.project import PARAMS, Project, Projects, load_project, load_projects
from fade.requests import leases
from fade.requests.in_force import settled_by, take_to_base
from fade.requests.ledger import Ledger
from fade.requests.messages import make_message
from fade.requests.states import State
from flows.cli.app import app
from tests.tiny import write_project

MINE = Project(name="mine", catalog="data/catalog/mine", base="data/base/mine", judges="data/judges-mine")
OTHER = MINE.model_copy(update={"name": "other", "base": "data/base/other"})


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(f"sqlite:///{tmp_path / 'ledger.db'}") as found:
        yield found


def asked(ledger: Ledger, project: Project, concept: str = "lamp") -> str:
    message = make_message(id=str(uuid.uuid4()), kind="object", concept=concept)
    return ledger.submit(message, project, actor="test")[0].id


def test_a_project_is_read_from_a_file_or_its_folder(tmp_path: Path) -> None:
    file = write_project(tmp_path / PARAMS, MINE)
    assert load_project(file) == load_project(tmp_path) == MINE.model_copy(update={"params": file})
    assert MINE.at(base="org/model").base == "org/model"
    assert MINE.at(base="org/model").catalog == MINE.catalog
    assert load_project(file).section("judges")["threads"] == 1
    with pytest.raises(ConfigError, match="has no section 'example'"):
        load_project(file).section("example")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"erasure": {}}, "has no section 'project'"),
        ({"project": {"name": "mine", "base": "b", "catalog": "c"}}, "judges: Field required"),
        ({"project": {**MINE.model_dump(mode="json"), "name": "My Model"}}, r"name: .*got 'My Model'"),
        ({"project": {**MINE.model_dump(mode="json"), "bases": []}}, "bases: Extra inputs are not permitted"),
        ({"project": {**MINE.model_dump(mode="json"), "render": "cats"}}, "render: Input should be 'canvas'"),
    ],
)
def test_a_faulty_section_names_its_fields(tmp_path: Path, content: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match="There is no project in"):
        load_project(tmp_path)
    (tmp_path / PARAMS).write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=said):
        load_project(tmp_path)


def test_a_name_chooses_one_of_several_and_none_the_only_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = Projects((MINE, OTHER))
    assert both.chosen("other") == OTHER
    assert Projects((MINE,)).chosen(None) == MINE
    with pytest.raises(DataError, match=r"2 are served\. Name one: mine, other"):
        both.chosen(None)
    with pytest.raises(DataError, match=r"not served here\. Served: mine, other") as refused:
        both.chosen("Ann Example")
    assert "Ann" not in str(refused.value), "what a sender wrote is kept by no reason"
    files = [write_project(tmp_path / name / PARAMS, MINE) for name in ("a", "b")]
    with pytest.raises(ConfigError, match="Two projects are called 'mine'"):
        load_projects(files)
    monkeypatch.setenv("FADE_PROJECT", f"{files[0]}, projects/b")
    assert environment().projects == (files[0], Path("projects/b"))


def test_a_worker_takes_requests_of_its_projects_alone(ledger: Ledger) -> None:
    mine, other = asked(ledger, MINE), asked(ledger, OTHER)
    assert {ledger.get(name).state for name in (mine, other)} == {State.SCHEDULED}, "no duplicates: their bases differ"
    lease = leases.take(ledger, "w", seconds=60, projects=["other"])
    assert lease is not None
    assert (lease.request.id, lease.request.project, lease.request.base) == (other, "other", OTHER.base)
    assert leases.take(ledger, "w", seconds=60, projects=["other"], running_limit=9) is None
    again = leases.take(ledger, "w", seconds=60, projects=["mine", "other"], running_limit=9)
    assert again is not None
    assert again.request.id == mine
    ledger.verify()


def test_what_is_erased_on_one_projects_base_settles_nothing_on_anothers(ledger: Ledger) -> None:
    live, other = asked(ledger, MINE), asked(ledger, OTHER)
    for state in (State.RUNNING, State.CANDIDATE, State.LIVE):
        ledger.transition(live, state, actor="test", reason="", erasure_id="e1")
    assert settled_by(ledger, ledger.get(other)) is None
    assert ledger.get(asked(ledger, MINE)).state is State.DUPLICATE
    # A project whose base has become the other's: its waiting request goes along, and its log says so.
    moved = take_to_base(ledger, ledger.get(other), MINE.base, actor="test")
    assert moved.base == MINE.base
    settled = settled_by(ledger, moved)
    assert settled is not None
    assert settled.id == live
    assert ledger.history(request_id=other)[-1].event == "base"
    ledger.verify()


def test_init_writes_a_project_and_says_what_comes_next(workspace: Path) -> None:
    run = CliRunner()
    done = run.invoke(app, ["init", "projects/lamps", "--base", "data/base/lamps", "--protect", "vase"])
    assert done.exit_code == 0, done.output
    file = Path("projects/lamps/params.yaml")
    project = load_project(file)
    assert project == Project(
        name="lamps", catalog="data/catalog/lamps", base="data/base/lamps", judges="data/judges-lamps",
        protected=("vase",), params=file,
    )  # fmt: skip
    assert load_settings(file) == load_settings(PARAMS)
    assert project.section("judges") == load_project().section("judges")
    commands = [line.split() for line in done.output.splitlines() if line.strip().startswith("fade ")]
    assert [words[1:3] for words in commands] == [
        ["catalog", "build"], ["catalog", "check"], ["base", "train"], ["classifier", "train"],
        ["doctor", "--base"], ["erase", "--project"], ["up", "--project"],
    ]  # fmt: skip
    before = file.read_bytes()
    again = run.invoke(app, ["init", "projects/lamps", "--base", "elsewhere"])
    assert again.exit_code == 1
    assert "is there already, and is left as it is" in again.output
    assert file.read_bytes() == before
    wrong = run.invoke(app, ["init", "projects/x", "--base", "b", "--name", "My Model"])
    assert wrong.exit_code == 1
    assert "name: " in wrong.output
    assert not Path("projects/x").exists()


def test_a_large_base_gets_settings_that_fit_into_memory(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.operations import init

    monkeypatch.setattr(init, "picture_size", lambda _: 512)
    project, settings = init.write_params(
        Path("projects/large"), name="large", base="org/model", catalog=None, judges=None, protected=()
    )
    assert settings == init.FOR_LARGE
    found = load_settings(project.params)
    assert found.weights == fast_precision()  # float32 where bfloat16 would be widened for every product
    assert found.saliency.gradient_checkpointing
    assert found.distill.gradient_checkpointing
    assert found.distill.micro_batch == found.saliency.at_once == found.evaluate.batch == 1
    assert "--size 512" in init.next_commands(project, Path("projects/large"), size=512)[0]
