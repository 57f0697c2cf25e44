"""Small commands: what they load, what the embedded registry says without MLflow, and a service that does them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from alembic.script import ScriptDirectory
from mlflow import MlflowClient
from mlflow.store.db.utils import _get_alembic_config

from fade.errors import RegistryError
from fade.lineage import ROOT
from flows.cli import main
from flows.releasing import manifests
from flows.services import commands
from flows.settings import DEFAULTS, is_running
from tasks.mlflow import embedded, tracking, version_page
from tasks.mlflow.client import mlflow_client, tables_beside, tracking_uri
from tasks.mlflow.tracking import AdapterVersion
from tests.registered import BASE, registered
from tests.servers import wait_until

HEAVY = (
    *("torch", "transformers", "diffusers", "peft", "pandas", "sklearn", "skimage", "matplotlib"),
    *("mlflow", "prefect", "dvc", "great_expectations", "fastapi"),
)
SMALL = """
import sys
from flows.cli.app import app
for words in {commands}:
    try:
        app(words, prog_name="fade")
    except SystemExit as end:
        print("ENDED", words[0], end.code, *sorted({heavy} & sys.modules.keys()))
"""
QUICK = """
import atexit, contextlib, os, time
from flows.services import commands
atexit.register(lambda service=os.getpid(): os.getpid() == service or time.sleep(3))
from flows.settings import DEFAULTS
commands.PRELOADED, commands.base_at_hand = (), contextlib.nullcontext
commands.main()
"""
"""A service that has nothing at hand but torch, and whose commands are long in ending, as those of libraries are."""
BESIDE = """
import os, sys
from flows.cli.main import ending_quickly
from flows.prefect_beside import _BEGUN, beside_is_up, prefect_beside
def work():
    prefect_beside()
    if sys.argv[1:] == ["flow"]:
        beside_is_up()
        from prefect.client.orchestration import get_client
        (beside, _), = _BEGUN
        with get_client(sync_client=True) as client:
            print(client.api_healthcheck(), str(client.api_url).rstrip("/") == beside.url, end=" ")
        print("PREFECT_API_URL" in os.environ, "prefect.server.api.server" in sys.modules, flush=True)
    else:
        print(bool(_BEGUN), flush=True)
ending_quickly(work)
"""
"""Begins Prefect's server beside it, and waits for it or ends at once."""
HELD = """
import time
from flows.cli.main import ending_quickly
from flows.prefect_beside import beside_is_up, prefect_beside
def work():
    prefect_beside()
    beside_is_up()
    from prefect import flow
    @flow
    def held():
        print("held", flush=True)
        time.sleep(200)
    try:
        held()
    except KeyboardInterrupt:
        return 130
ending_quickly(work)
"""
"""A flow beside the server that was begun for it, which somebody stops."""
ENDS = """
import atexit, os, sys, threading, time
from flows.cli.main import ending_quickly
class Held:
    def __del__(self, write=os.write): write(1, b"taken apart ")
held = Held()
def work():
    atexit.register(os.write, 1, b"registered ")
    threading.Thread(target=lambda: (time.sleep(0.3), os.write(1, b"thread "))).start()
    return 3
"""


@pytest.fixture(scope="module")
def version(workspace: Path) -> AdapterVersion:
    return registered("cat", "horse")[1]


@pytest.fixture
def client(version: AdapterVersion) -> MlflowClient:
    return MlflowClient(tracking_uri(), tracking_uri())


def test_small_commands_load_nothing_heavy(workspace: Path, version: AdapterVersion) -> None:
    # A base's first release hashes its files, which asks its family which they are: from then on nobody has to.
    manifests.open_release(BASE, version.base_sha256)
    erasure = version.erasure
    words = [
        ["list"],
        ["show", erasure],
        ["status"],
        ["approve", erasure],
        ["release"],
        ["live"],
        ["rollback", erasure],
    ]
    code = SMALL.format(commands=words, heavy=set(HEAVY))
    done = subprocess.run([sys.executable, "-c", code], cwd=workspace, capture_output=True, text=True, check=False)
    ended = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("ENDED")]
    assert ended == [[one[0], "0"] for one in words], done.stdout + done.stderr
    assert "is live" in done.stdout
    assert "no longer live" in done.stdout


def test_what_is_wrong_in_the_words_of_an_erasure_is_said_before_anything_heavy(workspace: Path) -> None:
    words = [
        ["erase", "--concept", "tulips"],
        ["erase", "--concept", "cat", "--protect", "tulips"],
        ["erase", "--concept", "cat", "--set", "mask.dens=3"],
    ]
    # torch says in which precision this machine computes, which belongs to the settings; pandas reads the catalog.
    code = SMALL.format(commands=words, heavy=set(HEAVY) - {"torch", "pandas"})
    done = subprocess.run([sys.executable, "-c", code], cwd=workspace, capture_output=True, text=True, check=False)
    ended = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("ENDED")]
    assert ended == [["erase", "1"]] * len(words), done.stdout + done.stderr
    assert done.stderr.count("Unknown concept 'tulips'") == 2
    assert "mask.dens: Extra inputs" in done.stderr


def test_the_revision_that_is_known_is_that_of_the_installed_mlflow() -> None:
    config = _get_alembic_config("sqlite://")
    assert ScriptDirectory.from_config(config).get_heads() == [embedded.REVISION]


def test_the_embedded_registry_says_what_mlflow_says(client: MlflowClient, version: AdapterVersion) -> None:
    asked: dict[str, Any] = {"filter_string": "name LIKE 'erasure-%'", "max_results": 1000, "page_token": None}
    gone = "erasure-gone"
    client.create_registered_model(gone)
    client.create_model_version(gone, source="file:///nowhere")
    client.delete_model_version(gone, "1")
    run = client.create_run(client.get_experiment_by_name("erasures").experiment_id)
    client.log_metric(run.info.run_id, "bad", float("nan"))
    client.log_metric(run.info.run_id, "good", 1.5)
    try:
        with embedded.opened(tracking_uri()) as ours:
            assert ours is not None
            models, versions = ours.search_registered_models(**asked), ours.search_model_versions(**asked)
            theirs = client.search_registered_models(**asked)
            assert {one.name: one.aliases for one in models} == {
                one.name: {alias: int(number) for alias, number in one.aliases.items()} for one in theirs
            }
            assert {(one.name, one.version, one.run_id, one.creation_timestamp) for one in versions} == {
                (one.name, int(one.version), one.run_id, one.creation_timestamp)
                for one in client.search_model_versions(**asked)
            }
            for one in versions:
                assert one.tags == client.get_model_version(one.name, str(one.version)).tags
                assert ours.get_model_version(one.name, str(one.version)).tags == one.tags
                mine, other = ours.get_run(one.run_id), client.get_run(one.run_id)
                assert (mine.info.artifact_uri, mine.info.experiment_id) == (
                    other.info.artifact_uri,
                    other.info.experiment_id,
                )
                assert (mine.data.params, mine.data.tags) == (other.data.params, other.data.tags)
                assert mine.data.metrics == other.data.metrics
                experiments, order = [mine.info.experiment_id], ["attributes.start_time DESC"]
                newest = ours.search_runs(experiments, order_by=order, max_results=1)[0]
                assert newest.info.run_id == client.search_runs(experiments, order_by=order)[0].info.run_id
            assert str(ours.get_run(run.info.run_id).data.metrics) == str(client.get_run(run.info.run_id).data.metrics)
            assert ours.get_experiment_by_name("erasures") is not None
            assert ours.get_experiment_by_name("none such") is None
    finally:
        client.delete_registered_model(gone)
        client.delete_run(run.info.run_id)


def test_what_the_embedded_registry_writes_mlflow_reads(client: MlflowClient, version: AdapterVersion) -> None:
    model, number = version.model, str(version.version)
    with embedded.opened(tracking_uri()) as ours:
        assert ours is not None
        for value in ("first", "then 'another' ü"):
            ours.set_model_version_tag(model, number, "said", value)
            assert client.get_model_version(model, number).tags["said"] == value
        for _ in range(2):
            ours.set_registered_model_alias(model, "seen", number)
            assert client.get_model_version_by_alias(model, "seen").version in (number, int(number))
            ours.delete_registered_model_alias(model, "seen")
            assert "seen" not in client.get_registered_model(model).aliases
        ours.update_model_version(model, number, description="a page")
        assert client.get_model_version(model, number).description == "a page"
        for write in (
            lambda: ours.set_model_version_tag(model, "99", "said", "x"),
            lambda: ours.set_registered_model_alias(model, "seen", "99"),
            lambda: ours.update_model_version("erasure-none", "1", description="x"),
        ):
            with pytest.raises(RegistryError, match="has no version"):
                write()
        client.set_model_version_tag(model, number, "said", "not locked")  # a refused write holds nothing
    client.delete_model_version_tag(model, number, "said")
    version_page.refresh_page(version)


def test_tables_of_another_revision_are_left_to_mlflow(
    version: AdapterVersion, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for uri in ("http://127.0.0.1:5000", "postgresql://host/db", f"sqlite:///{tmp_path}/none.db"):
        with embedded.opened(uri) as ours:
            assert ours is None
    assert not list(tmp_path.iterdir())
    known = tracking.versions()
    monkeypatch.setattr(embedded, "REVISION", "another")
    with embedded.opened(tracking_uri()) as ours:
        assert ours is None
    assert tracking.versions() == known


def test_what_the_projects_own_server_keeps_is_read_from_its_tables_and_written_by_itself(
    version: AdapterVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, nobody = tracking.versions(), "http://127.0.0.1:9"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", nobody)
    with pytest.raises(RegistryError, match="cannot be reached"):
        tracking.versions()
    embedded.SERVICES.write_text(json.dumps({"pid": os.getpid(), "mlflow": "http://127.0.0.1:10"}), encoding="utf-8")
    try:
        with pytest.raises(RegistryError, match="cannot be reached"):  # another server is not this project's
            tracking.versions()
        embedded.SERVICES.write_text(json.dumps({"pid": os.getpid(), "mlflow": nobody}), encoding="utf-8")
        assert tracking.versions() == known
        with pytest.raises(RegistryError, match="cannot be reached"):
            version_page.tag_version(version, {"said": "x"})
    finally:
        embedded.SERVICES.unlink()


def test_tables_are_made_by_another_process_where_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[object] = []
    plain = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *given, **named: begun.append(given) or plain(*given, **named))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    tables_beside()  # a server has its own
    assert begun == []
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    tables_beside()
    assert wait_until(lambda: bool(begun))
    with mlflow_client() as client:  # waits for the other, and finds what it made
        assert list(client.search_registered_models()) == []
    with embedded.opened(uri) as ours:
        assert ours is not None
    tables_beside()
    assert len(begun) == 1, "they are there"


@pytest.mark.parametrize("until", ["flow", "an error", "a server elsewhere"])
def test_prefects_server_is_begun_beside_and_never_left_behind(until: str, tmp_path: Path) -> None:
    home = str(tmp_path / "prefect")
    surroundings = {name: value for name, value in _surroundings().items() if not name.startswith("PREFECT_API")}
    surroundings |= {"PREFECT_HOME": home, "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180"}
    if until == "a server elsewhere":
        surroundings["PREFECT_API_URL"] = "http://127.0.0.1:9/api"
    command = [sys.executable, "-c", BESIDE, *([until] if until == "flow" else [])]
    done = subprocess.run(command, env=surroundings, cwd=ROOT, check=True, capture_output=True, text=True, timeout=240)
    said = done.stdout.split()
    if until == "flow":
        assert done.stdout.strip() == "None True False False", done.stderr
    else:
        assert said == [str(until == "an error")]
    assert wait_until(lambda: not _living_with(home)), "nobody is left"


@pytest.mark.parametrize("stopped", [signal.SIGINT, signal.SIGKILL])
def test_prefects_server_outlives_a_flow_that_is_stopped_only_until_it_was_told(
    stopped: signal.Signals, tmp_path: Path
) -> None:
    home = str(tmp_path / "prefect")
    surroundings = {name: value for name, value in _surroundings().items() if name != "PREFECT_API_URL"}
    surroundings |= {"PREFECT_HOME": home, "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180"}
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-c", HELD],
            env=surroundings,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=said,
            start_new_session=True,
        )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n", (tmp_path / "said").read_text()
        assert len(_living_with(home)) == 2
        os.killpg(process.pid, stopped)  # as a terminal does: all of its group are told
        assert process.wait(timeout=60) == (130 if stopped is signal.SIGINT else -signal.SIGKILL)
    assert wait_until(lambda: not _living_with(home)), "nobody is left"
    told = (tmp_path / "said").read_text()
    assert not re.search("attempts failed|Connection refused", told), "the server was there to be told"
    assert ("Crash detected" in told) == (stopped is signal.SIGINT)


def _living_with(home: str) -> list[str]:
    """Processes that were told this home of Prefect."""
    found = []
    for one in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"PREFECT_HOME={home}\0".encode() in one.read_bytes():
                found.append(one.parent.name)
    return found


@pytest.fixture(scope="module")
def service(workspace: Path, version: AdapterVersion) -> Iterator[subprocess.Popen[bytes]]:
    with (workspace / ".fade" / "commands.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", QUICK], cwd=workspace, env=_surroundings(), stdout=log, stderr=subprocess.STDOUT
        )
    socket = workspace / main.FOLDER / main.NAME
    deadline = time.monotonic() + 120
    while not socket.exists():
        assert process.poll() is None, (workspace / ".fade" / "commands.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    yield process
    process.terminate()
    assert process.wait(timeout=20) == 0
    assert not socket.exists()


def _surroundings(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


def _fade(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The program as its entry point runs it; prints at its end whether it did the command itself."""
    code = (
        "import sys, atexit\nfrom flows.cli.main import main\n"
        "atexit.register(lambda: sys.stderr.write(f\"itself: {'typer' in sys.modules}\\n\"))\nmain()"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=cwd,
        env=_surroundings(**environment),
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_service_does_what_the_command_itself_does(
    workspace: Path, version: AdapterVersion, service: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    served = _fade("show", version.erasure, "--json", "figures.json", cwd=tmp_path)
    assert "itself: False" in served.stderr
    assert served.returncode == 0
    figures = json.loads((tmp_path / "figures.json").read_text())  # in the caller's folder
    alone = _fade("show", version.erasure, "--json", "alone.json", cwd=tmp_path, FADE_DEVICE="cpu", OMP_DYNAMIC="false")
    assert "another value of OMP_DYNAMIC. Done without it." in alone.stderr  # which torch read long ago
    assert "itself: True" in alone.stderr
    assert served.stdout == alone.stdout
    assert figures == json.loads((tmp_path / "alone.json").read_text())


def test_errors_and_settings_of_the_caller_come_through(
    workspace: Path, service: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    unknown = _fade("show", "nothing", cwd=tmp_path)
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert "No adapter 'nothing' is registered" in unknown.stderr
    assert "itself: False" in unknown.stderr
    wrong = _fade("status", cwd=tmp_path, FADE_LOG_LEVEL="LOUD")
    assert wrong.returncode == 1
    assert "FADE_LOG_LEVEL" in wrong.stderr
    misused = _fade("list", "--no-such-option", cwd=tmp_path)
    assert misused.returncode == 2


def test_many_at_once_do_not_disturb_each_other(
    workspace: Path, version: AdapterVersion, service: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    words = [("list",), ("status",), ("show", version.erasure), ("show", "nothing")] * 3
    with ThreadPoolExecutor(len(words)) as pool:
        done = list(pool.map(lambda one: _fade(*one, cwd=tmp_path), words))
    assert all("itself: False" in one.stderr for one in done)
    assert [one.returncode for one in done] == [0, 0, 0, 1] * 3
    assert len({one.stdout for one in done[::4]}) == 1


def test_whoever_reads_what_a_command_says_does_not_wait_for_what_is_done_at_its_end(
    workspace: Path, version: AdapterVersion, service: subprocess.Popen[bytes]
) -> None:
    connection = main.connected(workspace / main.FOLDER)
    assert connection is not None
    reading, writing = os.pipe()
    with connection, os.fdopen(reading) as said:
        main.socket.send_fds(connection, [b"\0"], [writing] * 3)
        os.close(writing)
        main.send(connection, {**main.request(["list"]), "folder": str(workspace)})
        begun = main.receive(connection)
        assert begun is not None
        assert version.model in said.read()  # to the end of the stream
        state = Path(f"/proc/{begun['begun']}/stat").read_text().rpartition(")")[2].split()[0]
        assert state in "RS", "it has not ended"
        assert main.receive(connection) == {"exit": 0}


@pytest.mark.parametrize(
    ("end", "said"),
    [("sys.exit(work())", "thread registered taken apart "), ("ending_quickly(work)", "thread registered ")],
)
def test_a_command_ends_as_python_does_but_for_taking_apart_what_the_service_holds(end: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDS + end], env=_surroundings(), capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.returncode) == (said, 3), done.stderr


def test_a_server_that_ended_is_none_though_nobody_asked_for_its_end() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert is_running(process.pid)
    assert process.stdin is not None
    process.stdin.close()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended; its parent was not told yet
    os.kill(process.pid, 0)  # and its number is still taken
    assert not is_running(process.pid)
    process.wait()
    assert not is_running(process.pid)


def test_only_its_owner_may_ask(
    workspace: Path, service: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = workspace / main.FOLDER
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / main.NAME).stat().st_mode & 0o777 == 0o600
    connection = main.connected(folder)
    assert connection is not None
    connection.close()
    folder.chmod(0o750)  # somebody else could have put a socket there
    try:
        assert main.connected(folder) is None
    finally:
        folder.chmod(0o700)
    uid = os.getuid()
    monkeypatch.setattr("flows.cli.main.peer_uid", lambda _: uid + 1)
    assert main.connected(folder) is None
    monkeypatch.setattr("flows.services.commands.peer_uid", lambda _: uid + 1)
    ours, theirs = main.socket.socketpair()
    with ours, theirs, pytest.raises(ValueError, match="another user"):
        commands.request(ours)


def test_a_service_of_other_code_is_not_asked() -> None:
    asked = {"version": main.__version__, "code": "here", "environment": {"A": "b"}}
    loaded = {**DEFAULTS, "B": "c"}
    assert commands.refusal(asked, "here", loaded) == ""
    assert "start it again" in commands.refusal({**asked, "version": "0.0.1"}, "here", loaded)
    assert "start it again" in commands.refusal({**asked, "code": "there"}, "here", loaded)
    # What is set where nobody said otherwise is no difference, whoever set it.
    assert commands.refusal({**asked, "environment": dict(DEFAULTS)}, "here", loaded) == ""
    assert "HF_HUB_OFFLINE" in commands.refusal({**asked, "environment": {"HF_HUB_OFFLINE": "0"}}, "here", loaded)
    assert "OMP_NUM_THREADS" in commands.refusal(asked, "here", {**loaded, "OMP_NUM_THREADS": "1"})


def test_a_caller_that_leaves_ends_its_command_and_no_other(
    workspace: Path, service: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    connection = main.connected(workspace / main.FOLDER)
    assert connection is not None
    with connection, (tmp_path / "out").open("w") as out:
        main.socket.send_fds(connection, [b"\0"], [out.fileno()] * 3)
        main.send(connection, {**main.request(["status", "--watch", "0.2"]), "folder": str(workspace)})
        begun = main.receive(connection)
        assert begun is not None
        child = int(begun["begun"])
        os.kill(child, 0)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()
    assert _fade("list", cwd=tmp_path).returncode == 0


def test_without_a_service_it_is_done_here(workspace: Path, version: AdapterVersion, tmp_path: Path) -> None:
    left = tmp_path / ".fade" / "run"
    left.mkdir(mode=0o700, parents=True)
    assert main.connected(left) is None
    with main.socket.socket(main.socket.AF_UNIX) as gone:  # as a service leaves it that was killed
        here = Path.cwd()
        os.chdir(left)
        gone.bind(main.NAME)
        os.chdir(here)
    assert main.connected(left) is None
    assert main.asked(["erase", "--concept", "cat"]) is None
    assert main.asked(["status", "--watch", "1"]) is None
    assert main.asked(["list", "--help"]) is None
    assert main.asked([]) is None
