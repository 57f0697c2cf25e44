"""Intake: 50 messages over every transport end where they should; malformed ones are named, none is dropped."""

from __future__ import annotations

import json
import logging
import os
import random
import socket
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kombu import Connection, Queue
from typer.testing import CliRunner

from fade.errors import ConfigError, DataError, RegistryError
from fade.project import Projects
from fade.requests import intake
from fade.requests.durations import Durations
from fade.requests.intake import DEAD, QUEUE, take_in, transport
from fade.requests.ledger import Ledger
from fade.requests.messages import Message, read_message
from fade.requests.states import State
from flows.cli import queue
from flows.cli.app import app
from flows.operations import doctor
from tests.brokers import own_queue
from tests.databases import database
from tests.tiny import PROJECT, PROJECTS


@pytest.fixture(params=["folder", "rabbitmq", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "folder":
        yield f"folder:{tmp_path}/queue"
        return
    with own_queue(request.param) as address:
        yield address


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with database("postgresql", tmp_path) as address, Ledger(address) as found:
        yield found


def dead_letters(url: str) -> list[tuple[bytes, str]]:
    if url.startswith("folder"):
        folder = Path(url.removeprefix("folder:")) / "dead"
        kept = [path for path in folder.glob("*.json") if not path.name.endswith(".reason.json")]
        return [
            (path.read_bytes(), json.loads((folder / f"{path.name}.reason.json").read_text())["reason"])
            for path in kept
        ]
    found = []
    with Connection(url) as connection, connection.channel() as channel:
        queue = Queue(intake.DEAD, channel=channel)
        while (message := queue.get(accept=None)) is not None:
            body = message.body.encode() if isinstance(message.body, str) else bytes(message.body)
            found.append((body, message.headers["reason"]))
            message.ack()
    return found


def request(concept: str, **changes: Any) -> dict[str, Any]:
    return {"id": str(uuid.uuid4()), "kind": "object", "concept": concept, **changes}


def test_fifty_messages_each_end_in_the_state_they_should(url: str, ledger: Ledger) -> None:
    assert (QUEUE, DEAD) == ("fade.requests", "fade.requests.dead") or not url.startswith("folder")
    live = ledger.submit(Message(**request("rocket")), PROJECT, actor="test")[0]
    for state in (State.RUNNING, State.CANDIDATE, State.LIVE):
        ledger.transition(live.id, state, actor="test", reason="on")
    valid = [request(f"concept {i}") for i in range(25)]
    twice = valid[:8]
    in_force = [request("Rocket") for _ in range(4)]
    pictures = [request("", kind="pictures", pictures=["p1"]) for _ in range(3)]
    for one in pictures:
        del one["concept"]
    bodies = [json.dumps(one).encode() for one in (*valid, *twice, *in_force, *pictures)]
    malformed = [b"", b"\xff\xfe", b"[]", b"{", b'{"id": 3}', json.dumps(request("x", kind="dog")).encode()]
    malformed += [json.dumps(request("x", priority=10)).encode(), json.dumps(request("x", extra=1)).encode()]
    malformed += [json.dumps({**valid[0], "concept": f"other {i}"}).encode() for i in range(2)]  # conflicts
    everything = bodies + malformed
    assert len(everything) == 50
    # A conflict is one only after what it conflicts with; all else comes in any order.
    random.Random(3).shuffle(bodies)
    order = random.Random(4).sample(malformed[:-2], 8)
    with transport(url) as source:
        for body in [*bodies[:20], *order, *bodies[20:], *malformed[-2:]]:
            source.send(body)
    taken = Counter[str]()
    with transport(url) as source:
        while (found := take_in(ledger, source, PROJECTS, limit=7, seconds=0.5)).total:
            taken.update(new=found.new, known=found.known, dead=found.dead)
        assert take_in(ledger, source, PROJECTS, seconds=0.1).total == 0
    assert taken == Counter(new=32, known=8, dead=10)
    states = {record.id: record.state for record in ledger.find()}
    assert states.pop(live.id) is State.LIVE
    assert states == {
        **{one["id"]: State.SCHEDULED for one in valid},
        **{one["id"]: State.DUPLICATE for one in in_force},
        **{one["id"]: State.NEEDS_INPUT for one in pictures},
    }
    dead = dead_letters(url)
    assert Counter(body for body, _ in dead) == Counter(malformed)
    assert all(reason for _, reason in dead)
    ledger.verify()


def test_a_message_is_not_acknowledged_before_the_ledger_has_it(
    url: str, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request("cat")

    def refuse(*_: Any, **__: Any) -> None:
        raise RegistryError("the ledger is down")

    with transport(url) as source:
        source.send(json.dumps(asked).encode())
    with monkeypatch.context() as patched, transport(url) as source:
        patched.setattr(ledger, "submit_all", refuse)
        with pytest.raises(RegistryError, match="is down"):
            take_in(ledger, source, PROJECTS, seconds=2)
    assert ledger.find() == []
    with transport(url) as source:
        assert take_in(ledger, source, PROJECTS, seconds=2).new == 1
    assert ledger.get(asked["id"]).state is State.SCHEDULED


def test_an_unknown_queue_and_a_broker_that_is_down_are_said() -> None:
    with pytest.raises(ConfigError, match="No queue is known for sqla"), transport("sqla+sqlite:///x"):
        pass
    with pytest.raises(RegistryError, match="cannot be reached"), transport("amqp://guest:guest@127.0.0.1:9//"):
        pass


_JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=8), st.lists(st.none()),
    st.dictionaries(st.text(max_size=3), st.none(), max_size=2),
)  # fmt: skip


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(field=st.sampled_from([*Message.model_fields, "unknown"]), junk=_JUNK)
def test_a_malformed_request_is_refused_with_the_fields_name(tmp_path: Path, field: str, junk: Any) -> None:
    asked = {**request("cat"), field: junk}
    refused = _refusal(json.dumps(asked))
    if refused is None:
        assert field in Message.model_fields  # what was drawn happens to be valid
        return
    assert field in refused
    queue = tmp_path / "queue"
    with Ledger(f"sqlite:///{tmp_path / 'ledger.db'}") as ledger, transport(f"folder:{queue}") as source:
        source.send(json.dumps(asked).encode())
        assert take_in(ledger, source, PROJECTS, seconds=0).dead == 1
        assert not list(queue.glob("*.json"))
        assert ledger.find() == []


def _refusal(body: str) -> str | None:
    try:
        read_message(body)
    except DataError as error:
        return str(error)
    return None


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60))
def test_no_bytes_crash_the_intake(body: bytes) -> None:
    with pytest.raises(DataError, match="not valid"):
        read_message(body)


POISON = {"received_at": "0001-01-01T00:00:00+01:00", "concept": "Jane Roe"}


def test_each_poison_message_is_dead_alone_and_no_name_is_told(
    url: str, ledger: Ledger, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG, "fade")
    bodies = [json.dumps(request(f"concept {number}")).encode() for number in range(4)]
    odd = json.dumps(request("Jane Roe", external_id="odd")).encode()
    with transport(url) as source:
        for body in (*bodies[:2], json.dumps(request(**POISON)).encode(), odd, *bodies[2:]):
            source.send(body)
    submit_all = ledger.submit_all

    def overflowing(messages: Any, **given: Any) -> Any:
        """As a fault of ours would be, that no check has foreseen."""
        if any(message.external_id == "odd" for message, _ in messages):
            raise OverflowError("Jane Roe is out of range")
        return submit_all(messages, **given)

    monkeypatch.setattr(ledger, "submit_all", overflowing)
    taken = Counter[str]()
    with transport(url) as source:
        while (found := take_in(ledger, source, PROJECTS, seconds=0.5)).total:
            taken.update(new=found.new, dead=found.dead)
    assert taken == Counter(new=4, dead=2)
    reasons = sorted(reason for _, reason in dead_letters(url))
    assert reasons[0] == "It cannot be taken in (OverflowError)."
    assert "received_at: must not be before 2000" in reasons[1]
    told = str(reasons) + caplog.text + str([entry.reason for entry in ledger.history()])
    assert "Jane Roe" not in told
    figures = Durations()
    figures.read(ledger)
    figures.read(ledger)
    assert figures.dead_letters == 2


def test_what_is_no_file_in_the_folder_holds_up_nothing(tmp_path: Path, ledger: Ledger) -> None:
    folder = tmp_path / "queue"
    with transport(f"folder:{folder}") as source:
        (folder / "0.json").mkdir()
        (folder / "0.json" / "x").write_text("x")
        os.mkfifo(folder / "1.json")
        (folder / "2.json").symlink_to(folder / "nowhere")
        (folder / "3.json").symlink_to("/etc/passwd")
        (folder / "4.json").write_bytes(b"x" * ((1 << 20) + 10))
        (folder / "dead" / "4.json").write_text("an earlier one")
        source.send(json.dumps(request("cat")).encode())
        found = take_in(ledger, source, PROJECTS, seconds=0)
        assert (found.new, found.dead) == (1, 5)
        assert take_in(ledger, source, PROJECTS, seconds=0).total == 0
    assert [one.name for one in folder.iterdir()] == ["dead"]
    assert (folder / "dead" / "4.json").read_text() == "an earlier one"
    reasons = [json.loads(one.read_text())["reason"] for one in (folder / "dead").glob("*.reason.json")]
    assert sorted(reason.split()[1] for reason in reasons) == ["is", "is", "is", "is", "request"]


def test_a_queue_on_a_share_that_is_not_mounted_is_no_empty_queue(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not there"), transport(f"folder:{tmp_path}/mounted/queue"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_request_pushed_into_redis_without_an_envelope_is_taken(ledger: Ledger, url: str) -> None:
    if not url.startswith("redis"):
        pytest.skip("a list of Redis is meant")
    odd = [b"\xff no json", b"{}", json.dumps({"body": "%", "properties": {"body_encoding": "base64"}}).encode()]
    with Connection(url) as connection:
        for body in (odd[0], json.dumps(request("cat")).encode(), *odd[1:]):
            connection.default_channel.client.lpush(intake.QUEUE, body)
    taken = Counter[str]()
    with transport(url) as source:
        while (found := take_in(ledger, source, PROJECTS, seconds=0.5)).total:
            taken.update(new=found.new, dead=found.dead)
    assert taken == Counter(new=1, dead=3)
    assert {body for body, _ in dead_letters(url)} == {*odd}


@pytest.fixture
def rabbitmq() -> Iterator[str]:
    """RabbitMQ with queue names of a test's own, and nothing declared."""
    with own_queue("rabbitmq") as address:
        yield address


@pytest.mark.parametrize(
    "how", [{"x-queue-type": "quorum"}, {"x-message-ttl": 86_400_000, "x-dead-letter-exchange": "dlx"}]
)
def test_a_queue_that_others_declared_is_used_as_it_is(rabbitmq: str, ledger: Ledger, how: dict[str, Any]) -> None:
    with Connection(rabbitmq) as connection:
        Queue(intake.QUEUE, channel=connection.default_channel, durable=True, queue_arguments=how).declare()
    assert doctor.queue(rabbitmq).said.endswith("is there")
    with transport(rabbitmq) as source:
        source.send(json.dumps(request("cat")).encode())
        assert take_in(ledger, source, PROJECTS, seconds=2).new == 1


def test_what_the_broker_refuses_is_said_once_and_doctor_sees_it(rabbitmq: str) -> None:
    host = rabbitmq.partition("@")[2].rstrip("/")
    for address, said in (
        (f"amqp://guest:wrong-password@{host}//", "user or the password"),
        (f"amqp://guest:guest@{host}/no-such-host", "virtual host"),
    ):
        with pytest.raises(ConfigError, match=said) as caught, transport(address):
            pass
        assert "wrong-password" not in str(caught.value)
        finding = doctor.queue(address)
        assert (finding.verdict, said in finding.said, "wrong-password" in finding.said) == ("fail", True, False)
    assert doctor.queue(rabbitmq).verdict == "ok"
    assert "made at first use" in doctor.queue(rabbitmq).said


class Between:
    """A way to a broker that passes everything on, and on demand ends connections as a broker does that is stopped."""

    CLOSE = bytes.fromhex("000a0032 0140") + b"\x16CONNECTION_FORCED - op" + bytes(4)

    def __init__(self, host: str, port: int) -> None:
        self.target, self.open = (host, port), list[socket.socket]()
        self.server = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def port(self) -> int:
        return int(self.server.getsockname()[1])

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.server.accept()
            except OSError:
                return
            broker = socket.create_connection(self.target)
            self.open.append(client)
            for source, sink in ((client, broker), (broker, client)):
                threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
        except OSError:
            pass
        for one in (source, sink):
            one.close()

    def cut(self, *, told: bool) -> None:
        """End every connection, with AMQP's word for it or without one."""
        frame = bytes([1, 0, 0]) + len(self.CLOSE).to_bytes(4, "big") + self.CLOSE + b"\xce"
        for client in self.open:
            if told:
                client.sendall(frame)
            else:
                client.shutdown(socket.SHUT_RDWR)
        self.open.clear()


@pytest.mark.parametrize("told", [True, False])
def test_a_broker_that_restarts_ends_no_intake_that_follows(
    rabbitmq: str, tmp_path: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    monkeypatch.setattr(queue, "AGAIN_SECONDS", 0)
    between = Between("127.0.0.1", 5672)
    monkeypatch.setenv("FADE_QUEUE_URL", f"amqp://guest:guest@127.0.0.1:{between.port}//")
    monkeypatch.setenv("FADE_LEDGER_URL", f"sqlite:///{tmp_path / 'ledger.db'}")
    rounds = list[str]()

    def round_(ledger: Ledger, source: Any, projects: Projects) -> Any:
        rounds.append("")
        if len(rounds) == 1:
            between.cut(told=told)
        found = take_in(ledger, source, projects, seconds=2)
        rounds[-1] = f"{found.new} new"
        if found.new:
            raise KeyboardInterrupt
        source.send(json.dumps(request("cat")).encode())
        return found

    monkeypatch.setattr(intake, "take_in", round_)
    result = CliRunner().invoke(app, ["intake", "--follow"])
    between.server.close()
    assert result.exit_code == 0, result.output
    assert "cannot be reached" in result.output
    assert ("CONNECTION_FORCED" in result.output) == told
    assert rounds[0] == ""  # the first was cut off
    assert rounds[-1] == "1 new"
