"""A page of another origin, in a real browser, against every server that FADE starts: nothing it sends is taken.

The same page against the servers as Prefect and MLflow start them by themselves: there it succeeds.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from fade.errors import RefusedError
from fade.requests.ledger import Ledger
from flows.operations import doctor_servers
from flows.releasing.watch import serving
from flows.services import intake_http, local, runtime_http
from flows.settings import PREFECT_AUTH
from tests.servers import free_port
from tests.tiny import PROJECTS

pytestmark = pytest.mark.timeout(300)
TOKEN = "a-token-for-tests-alone"
SHELL = [{"prefect.deployments.steps.run_shell_script": {"script": "touch a-page-was-here"}}]
STRANGER = "rebinding.test"
ASK = """async ([url, method, body, headers]) => {
    const how = {method, headers, body: body && JSON.stringify(body)};
    try { const answer = await fetch(url, how); return [answer.status, await answer.text()]; }
    catch (error) { return [0, String(error)]; }
}"""
BLIND = """async ([url, body]) => {
    // What needs no leave of the server: it is sent, and the answer is hidden.
    const how = {method: 'POST', mode: 'no-cors', credentials: 'include', body: JSON.stringify(body)};
    await fetch(url, how).catch(() => 0);
}"""
SOCKET = """(url) => new Promise((done) => {
    const socket = new WebSocket(url, 'prefect');
    socket.onopen = () => { socket.close(); done('open'); };
    socket.onerror = () => done('refused');
})"""


class NoRuntime:
    """A runtime that counts what it is asked to draw."""

    manifest = None
    asked = 0

    def refresh(self) -> None:
        raise RefusedError("nothing to draw with")

    def generate(self, *_: Any, **__: Any) -> None:
        self.asked += 1
        raise RefusedError("nothing to draw with")


@dataclass(frozen=True)
class Servers:
    old_prefect: str
    old_mlflow: str
    prefect: str
    mlflow: str
    runtime: str
    intake: str
    drawing: NoRuntime
    ledger: Ledger
    auth: tuple[str, str]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder, ports = tmp_path_factory.mktemp("servers"), [free_port() for _ in range(6)]
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.chdir(folder)
        for name in ("PREFECT_SERVER_API_AUTH_STRING", "PREFECT_API_AUTH_STRING"):
            patch.delenv(name)
        patch.setenv("PREFECT_HOME", str(folder / "prefect-home"))
        old = _as_they_are(folder, *ports[:2])
        stack.callback(_kill, old.values())
        found = stack.enter_context(local.running(mlflow_port=ports[2], prefect_port=ports[3]))
        ledger = stack.enter_context(Ledger(f"sqlite:///{folder / 'ledger.db'}"))
        drawing = NoRuntime()
        runtime = runtime_http.make_app(drawing, token=TOKEN)  # type: ignore[arg-type]
        stack.enter_context(serving(runtime, host="127.0.0.1", port=ports[4]))
        stack.enter_context(
            serving(intake_http.make_app(ledger, PROJECTS, expected=TOKEN), host="127.0.0.1", port=ports[5])
        )
        base = [f"http://127.0.0.1:{port}" for port in ports]
        local.wait_for(f"{base[0]}/api/health", "old-prefect", old["old-prefect"])
        local.wait_for(f"{base[1]}/health", "old-mlflow", old["old-mlflow"])
        user, _, password = PREFECT_AUTH.read_text().partition(":")
        assert PREFECT_AUTH.stat().st_mode & 0o777 == 0o600
        yield Servers(
            base[0], base[1], found.prefect, found.mlflow, base[4], base[5], drawing, ledger, (user, password)
        )


def _as_they_are(folder: Path, prefect_port: int, mlflow_port: int) -> dict[str, subprocess.Popen[bytes]]:
    """Prefect and MLflow as their own commands start them."""
    commands = {
        "old-prefect": ["prefect", "server", "start", "--no-services", "--port", str(prefect_port)],
        "old-mlflow": [
            *("mlflow", "server", "--port", str(mlflow_port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{folder / 'old.db'}"),
        ],
    }
    local.STATE.mkdir(exist_ok=True)
    started = {}
    for name, command in commands.items():
        # Not what another test's project set for its own servers.
        kept = {one: value for one, value in os.environ.items() if not one.startswith(("PREFECT_", "MLFLOW_"))}
        environment = {**kept, "PREFECT_HOME": str(folder / "old-home"), "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (local.STATE / f"{name}.log").open("wb") as log:
            started[name] = subprocess.Popen(
                [sys.executable, "-m", *command],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )
    return started


def _kill(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """At once: there is nothing in them to be kept, and Prefect takes its time to end."""
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        reason = "no Chromium here: apt-get install chromium, or name one by CHROMIUM"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    # Newer browsers keep pages of the outside from loopback by themselves. Here the servers are asked, not the browser.
    arguments += ["--disable-features=LocalNetworkAccessChecks,BlockInsecurePrivateNetworkRequests"]
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(
            executable_path=chromium, args=[*arguments, f"--host-resolver-rules=MAP {STRANGER} 127.0.0.1"]
        )
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def foreign(browser: Any) -> Iterator[Any]:
    """A page of another port of this machine."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(b"<p>a page like any other</p>")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    page = browser.new_page()
    page.goto(f"http://127.0.0.1:{server.server_port}/")
    yield page
    server.shutdown()
    server.server_close()


def _ask(page: Any, url: str, method: str = "GET", body: Any = None, **headers: str) -> tuple[int, str]:
    given = {"content-type": "application/json", **headers} if body is not None else headers
    status, text = page.evaluate(ASK, [url, method, body, given])
    return status, text


def _deployment(server: str, auth: tuple[str, str] | None) -> str:
    """A deployment as the drain's, made by a program."""
    with httpx.Client(base_url=f"{server}/api", auth=auth, timeout=60) as client:
        flow = client.post("/flows/", json={"name": "drain"}).raise_for_status().json()["id"]
        made = client.post("/deployments/", json={"name": "drain", "flow_id": flow, "pull_steps": []})
        return str(made.raise_for_status().json()["id"])


def _pull_steps(server: str, deployment: str, auth: tuple[str, str] | None) -> Any:
    return (
        httpx.get(f"{server}/api/deployments/{deployment}", auth=auth, timeout=60)
        .raise_for_status()
        .json()["pull_steps"]
    )


def _models(server: str) -> set[str]:
    url = f"{server}/api/2.0/mlflow/registered-models/search"
    return {one["name"] for one in httpx.get(url, timeout=60).raise_for_status().json().get("registered_models", ())}


def test_a_foreign_page_gives_the_drains_deployment_no_command(servers: Servers, foreign: Any) -> None:
    old = _deployment(servers.old_prefect, None)
    status, _ = _ask(foreign, f"{servers.old_prefect}/api/deployments/{old}", "PATCH", {"pull_steps": SHELL})
    assert status == 204, "as Prefect starts it, the page succeeds"
    assert _pull_steps(servers.old_prefect, old, None) == SHELL

    new = _deployment(servers.prefect, servers.auth)
    url = f"{servers.prefect}/api/deployments/{new}"
    # Even a page that knew the string would not be let in.
    known = httpx.BasicAuth(*servers.auth)._auth_header
    for headers in ({}, {"authorization": known}):
        assert _ask(foreign, url, "PATCH", {"pull_steps": SHELL}, **headers)[0] == 0
        assert _ask(foreign, f"{servers.prefect}/api/flows/", "POST", {"name": "strange"}, **headers)[0] == 0
    foreign.evaluate(BLIND, [f"{servers.prefect}/api/flows/", {"name": "strange"}])
    assert _pull_steps(servers.prefect, new, servers.auth) == []
    flows = httpx.post(f"{servers.prefect}/api/flows/filter", json={}, auth=servers.auth, timeout=60).json()
    assert {one["name"] for one in flows} == {"drain"}
    for server, said in ((servers.old_prefect, "open"), (servers.prefect, "refused")):
        assert foreign.evaluate(SOCKET, f"{server.replace('http', 'ws')}/api/events/in") == said


def test_a_foreign_page_registers_and_approves_nothing_in_mlflow(servers: Servers, foreign: Any) -> None:
    path = "api/2.0/mlflow/registered-models/create"
    assert _ask(foreign, f"{servers.old_mlflow}/{path}", "POST", {"name": "strange"})[0] == 200
    assert _models(servers.old_mlflow) == {"strange"}, "as MLflow starts it, the page succeeds"
    for prefix in (path, f"ajax-{path}"):
        assert _ask(foreign, f"{servers.mlflow}/{prefix}", "POST", {"name": "strange"})[0] == 0
        foreign.evaluate(BLIND, [f"{servers.mlflow}/{prefix}", {"name": "strange"}])
    assert _ask(foreign, f"{servers.mlflow}/api/2.0/mlflow/experiments/search?max_results=1")[0] == 0
    assert _models(servers.mlflow) == set()


def test_a_foreign_page_draws_nothing_and_enters_no_request(servers: Servers, foreign: Any) -> None:
    request = {"id": str(uuid.uuid4()), "kind": "object", "concept": "cat"}
    own = {"Authorization": f"Bearer {TOKEN}"}
    assert httpx.post(f"{servers.runtime}/generate", json={"prompt": "x"}, headers=own, timeout=60).status_code == 503
    assert servers.drawing.asked == 1, "a program with the token is let through"
    for headers in ({}, {"authorization": own["Authorization"]}):
        assert _ask(foreign, f"{servers.runtime}/generate", "POST", {"prompt": "x"}, **headers)[0] == 0
        assert _ask(foreign, f"{servers.intake}/requests", "POST", request, **headers)[0] == 0
    foreign.evaluate(BLIND, [f"{servers.runtime}/generate", {"prompt": "x"}])
    foreign.evaluate(BLIND, [f"{servers.intake}/requests", request])
    assert servers.drawing.asked == 1
    assert list(servers.ledger.find()) == []


def test_a_name_that_is_turned_to_loopback_gets_nothing(servers: Servers, browser: Any) -> None:
    """DNS rebinding: to the browser the page is the server's own, and only its name tells."""
    for server, path, expected in (
        (servers.old_prefect, "api/admin/version", 200),
        (servers.prefect, "api/admin/version", 403),
        (servers.mlflow, "api/2.0/mlflow/experiments/search?max_results=1", 403),
        (servers.runtime, "live", 403),
        (servers.intake, "requests/x", 403),
    ):
        page, port = browser.new_page(), server.rpartition(":")[2]
        page.route("**/mine", lambda route: route.fulfill(body="<p>mine</p>", content_type="text/html"))
        page.goto(f"http://{STRANGER}:{port}/mine")
        status, text = _ask(page, f"/{path}")
        assert status == expected, (server, text)
        page.close()


def test_a_person_logs_in_and_sees_the_pages(servers: Servers, browser: Any) -> None:
    page = browser.new_page()
    page.set_default_timeout(60_000)
    page.goto(servers.prefect)
    field = page.locator("input[type=password]")
    field.wait_for()
    field.fill(":".join(servers.auth))
    field.press("Enter")
    page.get_by_text("Deployments", exact=True).first.wait_for()
    page.goto(servers.mlflow)
    page.get_by_text("Experiments", exact=True).first.wait_for()
    page.close()


def test_the_doctor_says_which_server_is_open(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, address in (
        ("MLFLOW_TRACKING_URI", servers.old_mlflow),
        ("PREFECT_API_URL", f"{servers.old_prefect}/api"),
    ):
        monkeypatch.setenv(name, address)
    for found, words in (
        (doctor_servers.mlflow(), ["is open", "any page on loopback"]),
        (doctor_servers.prefect(), ["is open", "no authentication", r"CORS *"]),
    ):
        assert found.verdict == "fail"
        assert all(word in found.said for word in words), found
    monkeypatch.setenv("MLFLOW_TRACKING_URI", servers.mlflow)
    monkeypatch.setenv("PREFECT_API_URL", f"{servers.prefect}/api")
    monkeypatch.delenv("PREFECT_API_AUTH_STRING", raising=False)
    assert doctor_servers.mlflow().verdict == "ok"
    assert "does not let us in" in doctor_servers.prefect().said
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", ":".join(servers.auth))
    assert doctor_servers.prefect().verdict == "ok"


def test_the_doctor_asks_a_real_question_of_a_server_that_refuses_its_own_name(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``/health`` answers under every name; what the pipeline asks for does not."""
    own = "mlflow.localhost"  # resolves to loopback, and is no name of this server
    monkeypatch.setattr(doctor_servers.httpx, "Client", _resolving(own))
    address = servers.mlflow.replace("127.0.0.1", own)
    assert doctor_servers.httpx.Client().get(f"{address}/health").status_code == 200
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    found = doctor_servers.mlflow()
    assert (found.verdict, "refuses this name" in found.said) == ("fail", True), found
    assert f"Add {address.removeprefix('http://')}" in found.do


def _resolving(name: str) -> Any:
    """An HTTP client that finds a name on loopback, whatever the machine's resolver knows."""

    class Transport(httpx.HTTPTransport):
        def handle_request(self, spec: httpx.Request) -> httpx.Response:
            if spec.url.host == name:
                spec.url = spec.url.copy_with(host="127.0.0.1")  # the Host header stays
            return super().handle_request(spec)

    class Client(httpx.Client):
        def __init__(self, **options: Any) -> None:
            super().__init__(transport=Transport(), **options)

    return Client
