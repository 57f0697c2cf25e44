"""Fixtures: a workspace per session, and servers for the tests that need real ones."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What is printed is looked at by lines: as wide as they may be, whatever a worker is told of its terminal.
os.environ["COLUMNS"] = "200"
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the processor: more threads than that only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Nor may a thread that waits keep a processor busy: erasures with threads of their own run in a worker's process.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Prefect reads it when it is imported, which is before a workspace is there.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")
from flows.cli.main import COLLECTED
from tests.servers import PREFECT_AUTH

gc.set_threshold(*COLLECTED)  # as in the program: a worker holds all libraries at once
os.environ["PREFECT_API_AUTH_STRING"] = os.environ["PREFECT_SERVER_API_AUTH_STRING"] = PREFECT_AUTH

# One key for the ledgers of all tests, wherever they are run from.
os.environ.setdefault("FADE_LEDGER_KEY", "a key of the tests alone")

# torch and all that stands on it is imported where it is used: the process that only hands out tests to workers would
# load it for nothing, and no worker starts before.
if TYPE_CHECKING:
    from fade.models.families.stable_diffusion import StableDiffusion

HERE = Path(__file__).parent
LONGEST = (
    *("flows/test_erase.py", "flows/test_release.py", "flows/test_proof.py", "flows/test_studies.py"),
    *("services/test_services.py", "services/test_browser.py", "flows/test_drain.py", "flows/test_examples.py"),
    *(
        "flows/test_cli.py",
        "unit/models/test_flow_families.py",
        "unit/models/test_families.py",
        "security/test_purge.py",
    ),
    *(
        "security/test_foreign_pages.py",
        "unit/adapters/test_runtime.py",
        "flows/test_classes.py",
        "flows/test_asked.py",
    ),
)
"""Files that take longest. They come first, so that at the end no worker has one to itself while the other waits."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest first; and a test's tier is its folder: `pytest -m unit`, `pytest -m "flows and not slow"`."""
    order = {HERE / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))
    for item in items:
        item.add_marker(item.path.relative_to(HERE).parts[0])


@pytest.fixture(autouse=True)
def threads_as_they_were() -> Iterator[None]:
    """An erasure in this process sets the number of threads; the next test is not to inherit it."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def environment_as_it_was() -> Iterator[None]:
    """A command in this process points it at what it found running; the next test is not to go there."""
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project of its own; the current folder for the whole session, as services bind to it."""
    from tests.tiny import entered, make_workspace

    with entered(make_workspace(tmp_path_factory.mktemp("project") / "workspace")) as folder:
        yield folder


@pytest.fixture(scope="module", autouse=True)
def nothing_stays_live() -> Iterator[None]:
    """What a file of tests put live, the next one in the same workspace does not find so."""
    yield
    # A developer's own releases, in the checkout itself, are no test's to touch.
    if "flows.releasing.released" in sys.modules and HERE.parent != Path.cwd():
        from tests.registered import take_out_all

        take_out_all()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny import save_tiny_base

    folder = tmp_path_factory.mktemp("base") / "tiny"
    save_tiny_base(folder)
    return folder


@pytest.fixture
def base(tiny_base: Path) -> StableDiffusion:
    from fade.models.family import load_base

    return load_base(tiny_base)


@pytest.fixture
def sd(base: StableDiffusion) -> StableDiffusion:
    """The same one, for tests that call another thing ``base``."""
    return base
