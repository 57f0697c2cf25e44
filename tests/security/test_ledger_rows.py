"""Attacks on what lies beside the log: requests' own rows, letters, the key, names behind hashes, malformed text."""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from fastapi.testclient import TestClient

from fade.environment import environment
from fade.errors import ConfigError, DataError, LineageError
from fade.lineage import ROOT
from fade.requests import chain, sealing, tables
from fade.requests.deadlines import warn
from fade.requests.ledger import Ledger
from fade.requests.messages import Message, concept_digest, make_message, read_message
from fade.requests.states import State
from flows.operations import doctor
from flows.releasing.watch import is_genuine
from flows.services.intake_http import make_app
from tests.databases import database
from tests.tiny import PROJECT, PROJECTS

ACTOR = "test"
CALLBACK = "https://sender.example/hook"
LATER = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture(params=["sqlite", "postgresql"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with database(request.param, tmp_path) as url:
        yield url


@pytest.fixture
def ledger(address: str) -> Iterator[Ledger]:
    with Ledger(address) as found:
        yield found


@pytest.fixture
def own_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of its own: no key in its environment, an empty project."""
    monkeypatch.delenv(sealing.KEY_VARIABLE)
    monkeypatch.setattr(sealing, "KEY_FILE", tmp_path / "machine" / "keys" / "ledger.key")
    return sealing.KEY_FILE


def ask(concept: str = "Zoe Lovelace", **changes: Any) -> Message:
    return make_message(**{"id": str(uuid.uuid4()), "kind": "person", "concept": concept, **changes})


def by_hand(ledger: Ledger, *statements: Any) -> None:
    with ledger.engine.begin() as connection:
        for statement in statements:
            assert connection.execute(statement).rowcount


ROW = tables.requests
EDITS = {
    "another concept": {"concept": "horse"},
    "another base": {"base": "data/base/other"},
    "a later deadline": {"due_at": LATER},
    "an earlier receipt": {"received_at": LATER},
    "letters to another": {"callback_url": "https://attacker.example/"},
    "no letters": {"callback_url": None},
    "other pictures": {"pictures": []},
    "another person": {"subject": "s-2"},
    "another surrogate": {"surrogate": "nothing"},
    "never tried again": {"not_before": LATER},
    "another erasure": {"erasure_id": "e9"},
    "the same as another": {"concept_key": "0" * 64},
    "no longer urgent": {"priority": 0},
}


def test_an_edit_of_a_requests_row_is_found(ledger: Ledger) -> None:
    ledger.submit_all(
        [(one, PROJECT) for one in [ask(callback_url=CALLBACK, pictures=("p1",), subject="s-1"), ask("cat")]],
        actor=ACTOR,
    )
    ledger.extend(ledger.find()[0].id, actor=ACTOR, reason="many")
    rows = ledger.verify().rows
    with ledger.reading() as connection:
        before = {row["id"]: dict(row) for row in connection.execute(sa.select(ROW)).mappings()}
    name = next(name for name, row in before.items() if row["callback_url"])
    for columns in EDITS.values():
        assert any(before[name][column] != value for column, value in columns.items())
        by_hand(ledger, sa.update(ROW).where(ROW.c.id == name).values(**columns))
        with pytest.raises(LineageError, match=f"{name} is not as the log sealed it"):
            ledger.verify()
        by_hand(ledger, sa.update(ROW).where(ROW.c.id == name).values(**{one: before[name][one] for one in columns}))
        assert ledger.verify().rows == rows
    by_hand(ledger, sa.insert(ROW).values(**{**before[name], "id": str(uuid.uuid4())}))
    with pytest.raises(LineageError, match="which its log does not say"):
        ledger.verify()


def test_a_row_that_changes_by_the_rules_holds(ledger: Ledger) -> None:
    record, _ = ledger.submit(ask(callback_url=CALLBACK), PROJECT, actor=ACTOR)
    for state in (State.ON_HOLD, State.SCHEDULED, State.RUNNING, State.CANDIDATE, State.LIVE):
        ledger.transition(record.id, state, actor=ACTOR, reason="on", erasure_id="e1")
        ledger.verify()
    ledger.minimise(record.id, actor=ACTOR, reason="over")
    ledger.verify()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (sa.update(tables.outbox).values(url="https://attacker.example/"), "changed or added by hand"),
        (sa.update(tables.outbox).values(body='{"state": "live"}'), "changed or added by hand"),
        (sa.delete(tables.outbox).where(tables.outbox.c.seq == 2), "is gone from the outbox"),
        (sa.update(tables.outbox).where(tables.outbox.c.seq == 2).values(sent_at=LATER), "marked as sent by hand"),
        (
            sa.insert(tables.outbox).from_select(
                ["request_id", "seq", "url", "body", "attempts", "next_at"],
                sa.select(
                    *(tables.outbox.c[name] for name in ("request_id", "seq", "url", "body", "attempts", "next_at"))
                ),
            ),
            "changed or added by hand",
        ),
    ],
)
def test_an_edit_of_the_outbox_is_found(ledger: Ledger, spoil: Any, said: str) -> None:
    ledger.submit(ask(callback_url=CALLBACK, received_at=datetime(2026, 1, 1, tzinfo=UTC)), PROJECT, actor=ACTOR)
    warn(ledger, days=7, url="https://alerts.example/x", now=LATER)
    with ledger.reading() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(tables.outbox)) == 3
    ledger.verify()
    by_hand(ledger, spoil)
    with pytest.raises(LineageError, match=said):
        ledger.verify()


def test_names_cannot_be_tried_on_what_the_ledger_keeps(ledger: Ledger) -> None:
    """The attacker has the database and a list of names, not the key; the names themselves were forgotten."""
    message = ask()
    record, _ = ledger.submit(message, PROJECT, actor=ACTOR)
    for state in (State.RUNNING, State.CANDIDATE, State.LIVE):
        ledger.transition(record.id, state, actor=ACTOR, reason="on", erasure_id="e1")
    ledger.minimise(record.id, actor=ACTOR, reason="over")
    with ledger.reading() as connection:
        kept = str([connection.execute(sa.select(table)).all() for table in tables.metadata.tables.values()])
    text = str(message.concept)
    guesses = {concept_digest(text, PROJECT.base), message.sha256, hashlib.sha256(text.encode()).hexdigest()}
    assert record.id in kept
    assert not [guess for guess in (*guesses, "Lovelace", "lovelace") if guess in kept]
    again, _ = ledger.submit(ask(" zoe LOVELACE "), PROJECT, actor=ACTOR)
    assert again.duplicate_of == record.id  # known all the same, by the key
    assert ledger.submit(message, PROJECT, actor=ACTOR)[1] is False


def test_the_key_is_made_once_for_its_owner_alone_and_is_the_same_everywhere(
    address: str, own_key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Ledger(address) as ledger:
        ledger.submit(ask("cat"), PROJECT, actor=ACTOR)
    assert own_key.stat().st_mode & 0o777 == 0o600
    first = own_key.read_bytes()
    with Ledger(address) as ledger:
        ledger.submit(ask("dog"), PROJECT, actor=ACTOR)
    assert own_key.read_bytes() == first
    # Another machine: it may look, makes no key, and neither writes nor verifies without the right one.
    monkeypatch.setattr(sealing, "KEY_FILE", tmp_path / "other" / "ledger.key")
    with Ledger(address) as ledger:
        assert len(ledger.find()) == 2
        for act in (lambda: ledger.submit(ask("horse"), PROJECT, actor=ACTOR), ledger.verify):
            with pytest.raises(ConfigError, match="key is not here"):
                act()
        assert not sealing.KEY_FILE.exists()
        monkeypatch.setenv("FADE_LEDGER_URL", address)
        assert (doctor.ledger(address).verdict, "key is not here" in doctor.ledger(address).said) == ("fail", True)
        monkeypatch.setenv(sealing.KEY_VARIABLE, "another key of sixteen")
        assert doctor.ledger(address).verdict == "fail"
        with pytest.raises(ConfigError, match="was made with the key"):
            ledger.submit(ask("horse"), PROJECT, actor=ACTOR)
        monkeypatch.setenv(sealing.KEY_VARIABLE, first.decode())
        ledger.submit(ask("horse"), PROJECT, actor=ACTOR)
        assert doctor.ledger(address).verdict == "ok"
        monkeypatch.setattr(doctor, "utc_now", lambda: datetime(2040, 1, 1, tzinfo=UTC))
        assert "clock differs" in doctor.ledger(address).said
        assert ledger.verify().rows == 6


def test_what_others_can_read_is_refused_or_closed(
    tmp_path: Path, own_key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "ledger.db"
    before = os.umask(0)
    try:
        with Ledger(f"sqlite:///{path}") as ledger:
            ledger.submit(ask(), PROJECT, actor=ACTOR)
            files = list(path.parent.glob("ledger.db*"))
            assert {one.name for one in files} >= {"ledger.db", "ledger.db-wal"}
            modes = {one.name: one.stat().st_mode & 0o077 for one in files if not one.name.endswith(".lock")}
    finally:
        os.umask(before)
    assert set(modes.values()) == {0}
    own_key.chmod(0o644)
    with Ledger(f"sqlite:///{path}") as ledger, pytest.raises(ConfigError, match="Others can read the ledger's key"):
        ledger.submit(ask(), PROJECT, actor=ACTOR)
    state = tmp_path / "state"
    state.mkdir()
    monkeypatch.setenv("FADE_LEDGER_URL", f"sqlite:///{path}")
    assert doctor.permissions(state).verdict == "ok"
    path.chmod(0o640)
    assert (doctor.permissions(state).verdict, str(path) in doctor.permissions(state).said) == ("fail", True)


def test_an_older_ledger_is_sealed_and_its_hashes_go_under_the_key(
    address: str, own_key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FADE_PROJECT", str(ROOT))
    message = ask(callback_url=CALLBACK)
    old = _first_version(address, message)
    with Ledger(address) as ledger:
        with ledger.reading() as connection:
            row = connection.execute(sa.select(ROW).where(ROW.c.id == str(message.id))).mappings().one()
        assert row["concept_key"] not in (None, old["concept_key"])
        assert row["body_sha256"] != old["body_sha256"]
        assert {record.project for record in ledger.find()} == {"canvas"}, "an older ledger knew no other project"
        assert [entry.event for entry in ledger.history()] == ["state"] * 2 + ["sealed"] * 4
        assert ledger.verify().rows == 6
        hashes = [entry.hash for entry in ledger.history()]
        assert [ledger.ended_at(rows, hashes[rows - 1]) for rows in range(1, 7)] == [False, *[True] * 5]
        assert not ledger.ended_at(2, hashes[0])
        assert ledger.submit(message, PROJECT, actor=ACTOR)[1] is False
        assert ledger.submit(ask(), PROJECT, actor=ACTOR)[0].duplicate_of == str(message.id)
        assert ledger.submit(ask("forgotten"), PROJECT, actor=ACTOR)[0].duplicate_of is not None
        assert not ledger.ended_at(2, hashes[1])  # what came since is no mere seal
        by_hand(ledger, sa.update(tables.outbox).values(url="https://attacker.example/"))
        with pytest.raises(LineageError, match="outbox"):
            ledger.verify()
    assert own_key.is_file()


def _first_version(address: str, message: Message) -> dict[str, Any]:
    """A ledger as the first version made it, with a request in force, a minimised one, and a letter."""
    engine = tables.open_engine(tables.ledger_url(address))
    config = Config()
    config.set_main_option("script_location", str(ROOT / "fade/requests/migrations"))
    now = datetime(2026, 1, 31, tzinfo=UTC)
    row = {
        **message.model_dump(mode="json", exclude={"version", "received_at", "project"}), "id": str(message.id),
        "base": PROJECT.base, "body_sha256": message.sha256,
        "concept_key": concept_digest(str(message.concept), PROJECT.base),
        "received_at": now, "due_at": now,
        "extended": False, "state": "live", "state_at": now, "attempts": 1, "fence": 1, "erasure_id": "e1",
    }  # fmt: skip
    gone = {"id": str(uuid.uuid4()), "concept": None, "concept_key": concept_digest("forgotten", PROJECT.base)}
    letter = {"request_id": row["id"], "seq": 1, "url": CALLBACK, "body": "{}", "attempts": 1, "next_at": now}
    letter["sent_at"] = now
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.execute(sa.insert(ROW), [row, {**row, **gone, "callback_url": None}])
        connection.execute(sa.insert(tables.outbox), letter)
        previous = tables.GENESIS
        for seq, name in enumerate((row["id"], gone["id"]), start=1):
            said = {
                "seq": seq, "request_id": name, "erasure_id": "e1", "event": "state", "before": "candidate",
                "after": "live", "actor": "test", "reason": "", "details": "{}", "at": now, "previous": previous,
            }  # fmt: skip
            previous = said["hash"] = chain.row_hash(said)
            connection.execute(sa.insert(tables.log), said)
        connection.execute(sa.text("UPDATE head SET seq = 2, hash = :hash"), {"hash": previous})
    engine.dispose()
    return row


@pytest.mark.parametrize(
    "secret", [" " * 40, "\t" * 20, "a" * 40, "ab" * 20, "a b c d e f g", " a-good-secret-of-16 ", "ÄÖÜ" * 9]
)
def test_a_token_that_is_none_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch, secret: str) -> None:
    monkeypatch.setenv("FADE_INTAKE_TOKEN", "a-good-secret-of-16")
    assert environment().intake_token
    for name in ("INTAKE_TOKEN", "SERVICE_TOKEN", "WEBHOOK_SECRET", "MLFLOW_WEBHOOK_SECRET", "LEDGER_KEY"):
        monkeypatch.setenv(f"FADE_{name}", secret)
        with pytest.raises(ConfigError, match=f"FADE_{name} must hold") as caught:
            environment()
        assert secret.strip() == "" or secret not in str(caught.value)
        monkeypatch.setenv(f"FADE_{name}", "a-good-secret-of-16")


STAMPS = [
    "",
    "x",
    "-1",
    "1e9",
    "\N{SUPERSCRIPT TWO}",
    "\N{ARABIC-INDIC DIGIT ONE}" * 10,
    "9" * 5000,
    "1_000",
    " 1",
    "\udcff",
]


@pytest.mark.parametrize("stamp", STAMPS)
def test_a_hook_with_a_malformed_time_is_no_genuine_one(stamp: str) -> None:
    for signature in ("", "v1,x", "v1,\udcff"):
        headers = {"x-mlflow-delivery-id": "1", "x-mlflow-timestamp": stamp, "x-mlflow-signature": signature}
        assert is_genuine(b"{}", headers, "a-good-secret-of-16") is False
    headers = {
        "x-mlflow-delivery-id": "\udcff",
        "x-mlflow-timestamp": str(int(time.time())),
        "x-mlflow-signature": "\udcff",
    }
    assert is_genuine(b"{}", headers, "a-good-secret-of-16") is False


ODD = ["\udcff", "a\ud800b", "x\x00y"]


@pytest.mark.parametrize("odd", ODD)
def test_lone_surrogates_and_nul_are_said_and_never_crash(ledger: Ledger, odd: str) -> None:
    for field in ("concept", "external_id", "base", "surrogate", "subject", "legal_basis"):
        with pytest.raises(DataError, match="not valid"):
            ask(**{field: odd})
        with pytest.raises(DataError, match="not valid"):
            read_message(json.dumps({"id": str(uuid.uuid4()), "kind": "object", "concept": "cat", field: odd}))
    record, _ = ledger.submit(ask("cat"), PROJECT, actor=ACTOR)
    with pytest.raises(DataError, match="not valid"):
        ledger.release(ledger.hold(record.id, actor=ACTOR, reason=odd).id, actor=ACTOR, reason="x", concept=odd)
    assert ledger.history(request_id=record.id)[-1].reason.isprintable()
    with pytest.raises(DataError, match="There is no request"):
        ledger.get(odd)
    ledger.append("noted", actor=odd, reason=odd, details={"file": odd})
    ledger.verify()


def test_over_http_a_wrong_message_is_422_and_an_odd_id_404(ledger: Ledger) -> None:
    token = "a token of the test"
    client = TestClient(
        make_app(ledger, PROJECTS, expected=token),
        base_url="http://127.0.0.1",  # under a foreign name nothing is answered
        headers={"authorization": f"Bearer {token}"},
        raise_server_exceptions=False,
    )
    good = {"id": str(uuid.uuid4()), "kind": "person", "concept": "Zoe Lovelace"}
    wrong: list[Any] = [
        b"\xff", b"[" * 100_000, b'"\\ud800"', json.dumps({**good, "concept": "\ud800"}),
        json.dumps({**good, "received_at": "0001-01-01T00:00:00+01:00"}),
        json.dumps({**good, "received_at": "9999-12-31T23:59:59-12:00", "priority": 1e400}),
        json.dumps({**good, "received_at": -(10**30)}), json.dumps({**good, "priority": 10**400}),
    ]  # fmt: skip
    for body in wrong:
        answer = client.post("/requests", content=body)
        assert (answer.status_code, "Zoe" in answer.text) == (422, False), body[:80]
    for path in ("%00", "%ff", "%ED%A0%80", "x" * 5000):
        assert client.get(f"/requests/{path}").status_code == 404
        assert client.delete(f"/requests/{path}").status_code == 404
    assert ledger.find() == []
    assert client.post("/requests", json=good).status_code == 201
