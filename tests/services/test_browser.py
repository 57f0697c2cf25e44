"""A reviewer with a browser: the alias is clicked in MLflow's page, and the service's picture changes.

Screenshots are kept under ``.fade/browser`` of the project. Nothing is installed here: it needs Debian's
``chromium`` (or another, named by CHROMIUM).
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fade.adapters.runtime import Runtime
from fade.asking.prepare import prepare_spec
from fade.config import load_settings
from fade.files import write_json
from fade.lineage import ROOT
from fade.models.family import load_base
from fade.requests.ledger import Ledger
from fade.spec import Spec
from flows.erasing.erase import erase, prepare_folder
from flows.proving.purge import purge
from flows.releasing import manifests, release, released
from flows.releasing.watch import Watch, serving
from flows.services import runtime_http
from flows.services.local import running
from flows.settings import ERASURES
from tasks.mlflow import tracking
from tests.servers import free_port
from tests.tiny import PROJECT, entered, make_workspace

pytestmark = pytest.mark.timeout(600)
TOKEN = "a-token-for-tests-alone"
ASKED = {"prompt": "a cat image in mosaic style.", "seed": 1, "steps": 2, "guidance": 2.0}
SHOTS = ROOT / ".fade/browser"


@pytest.fixture
def page() -> Iterator[Any]:
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        reason = "no Chromium here: apt-get install chromium, or name one by CHROMIUM"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        opened = browser.new_page(viewport={"width": 1400, "height": 1000})
        opened.set_default_timeout(60_000)
        SHOTS.mkdir(parents=True, exist_ok=True)
        yield opened
        browser.close()


def _until(found: Callable[[], bool], what: str, seconds: float = 60) -> float:
    begun = time.monotonic()
    while not found():
        assert time.monotonic() - begun < seconds, what
        time.sleep(0.1)
    return time.monotonic() - begun


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project where no other test's erasures are: what is approved must stand alone."""
    with entered(make_workspace(tmp_path_factory.mktemp("alone") / "workspace")) as folder:
        yield folder


@pytest.fixture(scope="module")
def erased(workspace: Path) -> Iterator[tuple[str, Spec, tracking.AdapterVersion]]:
    """MLflow's address, and an erasure that is registered there."""
    with running(mlflow_port=free_port(), prefect_port=free_port()) as services, pytest.MonkeyPatch.context() as set_:
        set_.setenv("MLFLOW_TRACKING_URI", services.mlflow)
        set_.setenv("PREFECT_API_URL", f"{services.prefect}/api")
        fast = {"distill.learning_rate": 0.02, "distill.precision": "fp32", "evaluate.precision": "fp32", "threads": 1}
        spec = prepare_spec(
            "mosaic", "photo", project=PROJECT, settings=load_settings(Path("params.yaml"), changes=fast)
        )
        prepare_folder(spec)
        yield services.mlflow, spec, erase(spec.id)


def test_a_click_in_mlflow_changes_the_picture_and_another_brings_the_bases_back(
    erased: tuple[str, Spec, tracking.AdapterVersion], tmp_path: Path, page: Any
) -> None:
    server, request, version = erased
    sd = load_base(request.base)
    folder = manifests.open_release(request.base, sd.sha256)
    runtime = Runtime(sd, folder, public_key=released.KEYS / "public.pem", state=tmp_path / "state.json")
    watcher, port = Watch(valid_seconds=0), free_port()
    thread = threading.Thread(target=lambda: list(watcher.run()), daemon=True)
    address = f"http://127.0.0.1:{port}"
    http = httpx.Client(headers={"Authorization": f"Bearer {TOKEN}"}, timeout=120)

    def picture() -> bytes:
        return http.post(f"{address}/generate", json=ASKED).raise_for_status().content

    def draw_in_the_page(name: str) -> None:
        page.goto(address)
        page.fill("#token", TOKEN)
        page.fill("#prompt", ASKED["prompt"])
        page.click("button")
        page.wait_for_function("document.querySelector('#live').dataset.counter && !said.textContent", timeout=120_000)
        page.screenshot(path=SHOTS / f"{name}-page.png")

    with serving(runtime_http.make_app(runtime, token=TOKEN, compare=True), host="127.0.0.1", port=port):
        thread.start()
        base = picture()
        _edit_alias(page, server, version, "approved", name="approved")
        live_after = _until(lambda: picture() != base, "the picture did not change")
        _until(lambda: tracking.find_version(version.model).release == "live", "the page does not say so")
        draw_in_the_page("approved")
        assert version.model in page.inner_text("#adapters")
        _edit_alias(page, server, version, None, name="rolled-back")
        gone_after = _until(lambda: picture() == base, "the base's picture did not come back")
        draw_in_the_page("rolled-back")
        watcher.ended.set()
        watcher.woken.set()
        thread.join(timeout=60)
    write_json(SHOTS / "seconds.json", {"click_to_live": live_after, "click_to_base": gone_after})


def test_the_page_of_what_was_purged_says_so_and_shows_nothing_that_is_gone(
    erased: tuple[str, Spec, tracking.AdapterVersion], page: Any
) -> None:
    server, request, version = erased
    tracking.approve(version.model)
    release.reconcile()
    address = f"{server}/#/models/{version.model}/versions/{version.version}"
    page.goto(address)
    page.wait_for_function("[...document.images].some((one) => one.src.includes('sheet.png') && one.naturalWidth)")
    page.screenshot(path=SHOTS / "before-purge.png", full_page=True)
    with Ledger() as ledger:
        purge(tracking.find_version(version.model), ERASURES / request.id, ledger)
    page.goto("about:blank")
    page.goto(address)
    page.get_by_text("Purged", exact=True).wait_for()
    page.screenshot(path=SHOTS / "after-purge.png", full_page=True)
    assert page.evaluate("[...document.images].filter((one) => one.complete && !one.naturalWidth).length") == 0
    assert "sheet.png" not in page.content()


def _edit_alias(page: Any, server: str, version: tracking.AdapterVersion, alias: str | None, *, name: str) -> None:
    """Open the version's page and set its aliases by hand: one added, or all but the candidate's removed."""
    page.goto(f"{server}/#/models/{version.model}/versions/{version.version}")
    # The page never falls idle: it asks the server again and again.
    button = page.locator("button[title='Edit aliases'], button[title='Add aliases']").first
    button.wait_for()
    page.screenshot(path=SHOTS / f"{name}-before.png")
    button.click()
    save = page.get_by_role("button", name="Save aliases")
    save.wait_for()
    field = page.locator(".ant-modal, .du-bois-light-modal, [role=dialog]").locator("input").first
    field.focus()
    if alias is None:
        for _ in range(4):  # one key removes the last alias
            field.press("Backspace")
        alias = "candidate"
    page.keyboard.type(alias)
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.screenshot(path=SHOTS / f"{name}-dialog.png")
    save.click()
