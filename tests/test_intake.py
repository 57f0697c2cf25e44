"""Intake: 50 messages over every transport end where they should; malformed ones are named, none is dropped."""

from __future__ import annotations

import json
import random
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kombu import Connection, Queue

from fade.errors import ConfigError, DataError, RegistryError
from fade.requests import intake
from fade.requests.intake import DEAD, QUEUE, take_in, transport
from fade.requests.ledger import Ledger
from fade.requests.messages import Message, read_message
from fade.requests.states import State
from tests.databases import database, missing

BROKERS = {"rabbitmq": "amqp://guest:guest@127.0.0.1:5672//", "redis": "redis://127.0.0.1:6379/7"}


@pytest.fixture(params=["folder", "rabbitmq", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "folder":
        yield f"folder:{tmp_path}/queue"
        return
    address = BROKERS[request.param]
    for name in ("QUEUE", "DEAD"):
        monkeypatch.setattr(intake, name, f"{getattr(intake, name)}.{uuid.uuid4().hex[:8]}")
    try:
        with Connection(address, connect_timeout=3) as connection:
            connection.ensure_connection(max_retries=1, timeout=3)
    except OSError:
        missing(f"{request.param} at {address}")
    yield address
    with Connection(address) as connection:
        for name in (intake.QUEUE, intake.DEAD):
            connection.default_channel.queue_delete(name)


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
    live = ledger.submit(Message(**request("rocket")), actor="test")[0]
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
        while (found := take_in(ledger, source, limit=7, seconds=0.5)).total:
            taken.update(new=found.new, known=found.known, dead=found.dead)
        assert take_in(ledger, source, seconds=0.1).total == 0
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
            take_in(ledger, source, seconds=2)
    assert ledger.find() == []
    with transport(url) as source:
        assert take_in(ledger, source, seconds=2).new == 1
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
        assert take_in(ledger, source, seconds=0).dead == 1
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
