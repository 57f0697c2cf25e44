"""Two projects and no canvas in their workspace: asked for over a real broker, erased, approved, live."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from kombu import Connection, Queue
from PIL import Image, ImageDraw, ImageOps
from typer.testing import CliRunner

from fade.data.catalog import load_concepts
from fade.data.intake import build
from fade.models.source import base_sha256
from fade.project import Project, load_projects
from fade.requests import intake
from fade.requests.intake import take_in, transport
from fade.requests.ledger import Ledger
from fade.requests.states import State
from fade.spec import load_spec
from fade.steps.catalog import open_set
from flows.cli.app import app
from flows.queue.drain import drain
from flows.releasing.pictures import draw, live_adapters, load_with
from flows.releasing.released import released
from flows.settings import ERASURES
from tasks.mlflow import tracking
from tests.brokers import own_queue
from tests.tiny import entered, make_workspace, save_judges, save_tiny_base, write_project

KITCHEN = Project(name="kitchen", catalog="data/kitchen", base="data/base/kitchen", judges="data/judges-kitchen")
GARDEN = Project(
    name="garden", catalog="data/garden", base="data/base/garden", judges="data/judges-garden", protected=("Vase",)
)
FILES = [Path("params.yaml"), Path("projects/garden/params.yaml")]
THINGS = {"kitchen": ("Lamp", "Kettle", "Chair"), "garden": ("Lamp", "Spade", "Vase")}


def _draw_set(root: Path, things: tuple[str, ...]) -> Path:
    """Coloured shapes in two styles, laid out as UnlearnCanvas is."""
    for style in ("Seed_Images", "Gray_Days"):
        for number, thing in enumerate(things):
            for i in range(6):
                picture = Image.new("RGB", (64, 64), (200, 220 - 20 * i, 240))
                corners = (6 + 3 * i, 10 + 4 * number, 40 + 3 * i, 50)
                shape = (ImageDraw.Draw(picture).ellipse, ImageDraw.Draw(picture).rectangle)[number % 2]
                shape(corners, fill=(60 * number, 40 + 30 * i, 90))
                path = root / style / thing / f"{i + 1}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                (picture if style == "Seed_Images" else ImageOps.invert(picture.convert("L"))).save(path)
    return root


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A workspace of two projects, each with a base, a catalog and judges of its own, and nothing of the canvas."""
    place = tmp_path_factory.mktemp("two")
    folder = make_workspace(place / "workspace", canvas=False)
    for seed, project in enumerate((KITCHEN, GARDEN), start=1):
        sources = _draw_set(place / project.name, THINGS[project.name])
        for _ in build(folder / project.catalog, open_set("unlearncanvas", sources), size=64, workers=1):
            pass
        words = [one.name for one in load_concepts(folder / project.catalog).values()]
        save_tiny_base(folder / project.base, seed=seed, names=(words, words))
        save_judges(folder / project.judges, folder / project.catalog)
    write_project(folder / FILES[0], KITCHEN)
    write_project(folder / FILES[1], GARDEN, saliency={"groups": 2, "group_size": 3})
    with entered(folder):
        yield folder


@pytest.fixture
def queue() -> Iterator[str]:
    """A queue of RabbitMQ for this test alone."""
    with own_queue("rabbitmq") as address:
        yield address


def _message(concept: str, project: str | None, **changes: object) -> dict[str, object]:
    asked = {"id": str(uuid.uuid4()), "kind": "object", "concept": concept, **changes}
    return asked if project is None else {**asked, "project": project}


def test_a_request_over_rabbitmq_goes_live_on_its_projects_base_alone(two: Path, queue: str) -> None:
    projects = load_projects(FILES)
    lamp = _message("lamp", "garden", kind="person", aliases=["the lantern"])
    same = _message("lamp", "kitchen", surrogate="kettle")
    nameless, unknown = _message("lamp", None), _message("lamp", "attic")
    with transport(queue) as source:
        for one in (lamp, same, nameless, unknown):
            source.send(json.dumps(one).encode())
    with Ledger() as ledger:
        with transport(queue) as source:
            taken = take_in(ledger, source, projects, limit=4, seconds=2)
            assert (taken.new, taken.dead) == (2, 2)
        with Connection(queue) as connection, connection.channel() as channel:
            dead = Queue(intake.DEAD, channel=channel)
            reasons = [str(dead.get(accept=None, no_ack=True).headers["reason"]) for _ in range(2)]
        assert sorted(reasons) == [
            "No project is named, and 2 are served. Name one: kitchen, garden.",
            "The project that is named is not served here. Served: kitchen, garden.",
        ]
        asked = ledger.get(str(lamp["id"]))
        assert (asked.project, asked.base, asked.state) == ("garden", GARDEN.base, State.SCHEDULED)
        # The same concept on another base is no duplicate, and a worker leaves alone what it does not serve.
        assert ledger.get(str(same["id"])).state is State.SCHEDULED
        assert drain(projects=[FILES[1]]) == {"candidate": 1}, ledger.get(asked.id).reason
        assert ledger.get(str(same["id"])).state is State.SCHEDULED
        asked = ledger.get(str(lamp["id"]))
        spec = load_spec(ERASURES / str(asked.erasure_id))
        assert (spec.base, spec.catalog, spec.judges) == (GARDEN.base, GARDEN.catalog, GARDEN.judges)
        assert (spec.concept, spec.surrogate) == ("lamp", "spade"), "the vase is protected"
        assert spec.person, "the message's kind reaches the erasure"
        assert "the lantern" in spec.aliases, "and its aliases do"
        assert spec.saliency.group_size == 3, "the settings are the project's"
        # One worker serves both.
        assert drain(projects=FILES) == {"candidate": 1}
        other = ledger.get(str(same["id"]))
        assert load_spec(ERASURES / str(other.erasure_id)).base == KITCHEN.base
        done = CliRunner().invoke(app, ["approve", str(asked.erasure_id)])
        assert done.exit_code == 0, done.output
        assert ledger.get(asked.id).state is State.LIVE
        assert ledger.get(other.id).state is State.CANDIDATE
        ledger.verify()
    garden, kitchen = base_sha256(Path(GARDEN.base)), base_sha256(Path(KITCHEN.base))
    (version,) = live_adapters(garden)
    assert version.erasure == asked.erasure_id
    assert live_adapters(kitchen) == []
    (manifest,) = [one for one in released().values() if one.adapters]
    assert manifest.base_sha256 == garden
    live = draw(load_with(GARDEN.base, [version]), ["a lamp image"], seed=1, steps=2)
    assert (live != draw(load_with(GARDEN.base, []), ["a lamp image"], seed=1, steps=2)).any()
    (candidate,) = [one for one in tracking.versions() if one.erasure == other.erasure_id]
    assert candidate.base_sha256 == kitchen
    listed = CliRunner().invoke(app, ["request", "list"])
    assert "garden" in listed.output
    assert "kitchen" in listed.output
    assert not (two / "data/catalog").exists(), "nothing of the canvas was made meanwhile"
