from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from fade import logs
from fade.requests.ledger import Ledger
from fade.requests.messages import make_message
from flows.services.intake_http import make_app
from tests.tiny import PROJECTS

TOKEN = "a token of the test"


@pytest.fixture
def json_logs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FADE_LOG_FORMAT", "json")
    monkeypatch.setenv("FADE_LOG_LEVEL", "INFO")
    handler = logs.set_up("test")
    assert handler is not None
    yield
    logging.getLogger().removeHandler(handler)
    for name in ("fade", "tasks", "flows"):
        logging.getLogger(name).setLevel(logging.NOTSET)


def test_plain_logs_are_pythons_own() -> None:
    before = list(logging.getLogger().handlers)
    assert logs.set_up("test") is None
    assert logging.getLogger().handlers == before


@pytest.mark.usefixtures("json_logs")
def test_the_requests_id_is_in_every_line_about_it(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("flows.x")
    with logs.about("a"):
        with logs.about("b"):
            logger.info("inside")
        logger.info("outside")
    logger.info("nowhere")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["message"], line["request_id"]) for line in lines] == [
        ("inside", "b"),
        ("outside", "a"),
        ("nowhere", None),
    ]
    assert {line["service"] for line in lines} == {"test"}


@pytest.mark.usefixtures("json_logs")
def test_a_request_over_http_is_followed_and_its_concept_is_in_no_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    identity = str(uuid.uuid4())
    message = make_message(id=identity, kind="object", concept="astronaut", external_id="order 7")
    with Ledger(f"sqlite:///{tmp_path / 'ledger.db'}") as ledger:
        client = TestClient(
            make_app(ledger, PROJECTS, expected=TOKEN),
            base_url="http://127.0.0.1",
            headers={"Authorization": f"Bearer {TOKEN}"},
        )
        answer = client.post("/requests", content=message.model_dump_json(), headers={"X-Request-Id": "call-1"})
        assert answer.status_code == 201
        assert answer.headers["x-request-id"] == "call-1"
        assert client.get(f"/requests/{identity}", headers={"X-Request-Id": "a b\x7f"}).headers["x-request-id"] != "a b"
        ledger.cancel(identity, actor="test", reason="astronaut asked")
    text = capsys.readouterr().err
    lines = [json.loads(line) for line in text.splitlines()]
    ours = [line for line in lines if line.get("request_id") == identity]
    assert [line.get("after") for line in ours if line["logger"] == "fade.requests.ledger"] == [
        "received",
        "scheduled",
        "cancelled",
    ]
    calls = [line for line in lines if line["logger"] == "flows.services.http_logs"]
    assert [line["message"] for line in calls] == ["POST /requests 201", "GET /requests/{request_id} 200"]
    assert calls[0]["call_id"] == "call-1"
    assert "astronaut" not in text
    assert TOKEN not in text
