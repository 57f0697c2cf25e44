"""The ledger's laws, on SQLite and on PostgreSQL."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fade.errors import ConfigError, ConflictError, DataError, LeaseLostError, LineageError, TransitionError
from fade.files import read_json
from fade.lineage import ROOT
from fade.requests import leases, messages, tables
from fade.requests.deadlines import warn
from fade.requests.durations import Durations
from fade.requests.in_force import erased_among, settled_by
from fade.requests.ledger import Ledger
from fade.requests.messages import Message, make_message, read_message
from fade.requests.states import TRANSITIONS, State, check_transition
from flows.cli.app import app
from flows.cli.console import look_at_streams
from tests.databases import database
from tests.tiny import PROJECT

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)
ACTOR = "test"


@pytest.fixture(params=["sqlite", "postgresql"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ledger]:
    with database(request.param, tmp_path) as url, Ledger(url) as found:
        yield found


OTHER = PROJECT.at(base="other")


def ask(concept: str | None = "cat", **changes: Any) -> Message:
    return make_message(**{"id": str(uuid.uuid4()), "kind": "object", "concept": concept, **changes})


def to_live(ledger: Ledger, request_id: str, *, erasure_id: str = "e0") -> None:
    for state in (State.RUNNING, State.CANDIDATE, State.LIVE):
        ledger.transition(request_id, state, actor=ACTOR, reason="on", erasure_id=erasure_id, now=NOW)


@given(st.sampled_from(list(State)), st.sampled_from(list(State)))
def test_what_the_table_does_not_hold_is_refused(before: State, after: State) -> None:
    if after in TRANSITIONS[before]:
        check_transition("1", before, after)
    else:
        with pytest.raises(TransitionError, match=f"is {before} and cannot become {after}"):
            check_transition("1", before, after)


def test_every_state_can_be_reached_and_has_a_row() -> None:
    assert set(TRANSITIONS) == set(State)
    assert set().union(*TRANSITIONS.values()) | {State.RECEIVED} == set(State)


def test_the_migrations_make_the_tables_the_code_knows(ledger: Ledger) -> None:
    with ledger.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, tables.metadata) == []
    config = Config()
    config.set_main_option("script_location", str(ROOT / "fade/requests/migrations"))
    assert ScriptDirectory.from_config(config).get_current_head() == tables.HEAD
    tables.upgrade(ledger.engine)


def test_the_same_request_twice_is_one_and_another_body_is_refused(ledger: Ledger) -> None:
    message = ask()
    first, new = ledger.submit(message, PROJECT, actor=ACTOR)
    assert new
    assert first.state is State.SCHEDULED
    again, new = ledger.submit(message, PROJECT, actor=ACTOR)
    assert (again, new) == (first, False)
    with pytest.raises(ConflictError, match="with other content"):
        ledger.submit(ask("dog", id=str(message.id)), PROJECT, actor=ACTOR)
    assert ledger.find() == [first]
    assert [entry.after for entry in ledger.history(request_id=first.id)] == ["received", "scheduled"]


def test_a_batch_holds_duplicates_and_conflicts_apart(ledger: Ledger) -> None:
    one, two = ask(), ask("horse")
    other = ask("dog", id=str(one.id))
    results = ledger.submit_all([(one, PROJECT) for one in [one, two, one, other]], actor=ACTOR)
    assert [result[1] for result in results if not isinstance(result, ConflictError)] == [True, True, False]
    assert isinstance(results[3], ConflictError)


def test_a_concept_already_in_force_on_the_same_base_makes_a_linked_duplicate(ledger: Ledger) -> None:
    first, _ = ledger.submit(ask("Cat"), PROJECT, actor=ACTOR)
    before, _ = ledger.submit(ask("cat"), PROJECT, actor=ACTOR)
    assert before.state is State.SCHEDULED  # nothing is in force yet
    to_live(ledger, first.id, erasure_id="e0123")
    after, _ = ledger.submit(ask(" cAt "), PROJECT, actor=ACTOR)
    assert (after.state, after.duplicate_of, after.erasure_id) == (State.DUPLICATE, first.id, "e0123")
    elsewhere, _ = ledger.submit(ask("cat"), OTHER, actor=ACTOR)
    assert elsewhere.state is State.SCHEDULED
    assert {record.id for record in ledger.find(erasure_id="e0123")} == {first.id, after.id}


@pytest.mark.parametrize("own", [{"pictures": ("p2",)}, {"pictures": ("p1", "p2")}, {"subject": "s-2"}])
def test_who_names_pictures_of_their_own_is_no_duplicate(ledger: Ledger, own: dict[str, Any]) -> None:
    first, _ = ledger.submit(ask(pictures=("p1",), subject="s-1"), PROJECT, actor=ACTOR, now=NOW)
    to_live(ledger, first.id)
    for known in ({}, {"pictures": ("p1",)}, {"subject": "s-1", "pictures": ("p1",)}):
        assert ledger.submit(ask(**known), PROJECT, actor=ACTOR)[0].state is State.DUPLICATE
    record, _ = ledger.submit(ask(**own), PROJECT, actor=ACTOR, now=NOW)
    assert (record.state, record.duplicate_of) == (State.SCHEDULED, None)
    late = NOW + timedelta(days=40)
    assert record.id in {one.request.id for one in warn(ledger, days=7, now=late)}  # its deadline counts
    settled = settled_by(ledger, record)
    assert settled is not None
    assert settled.id == first.id
    ledger.minimise(first.id, actor=ACTOR, reason="over")
    again, _ = ledger.submit(ask(pictures=("p1",)), PROJECT, actor=ACTOR)
    assert again.state is State.SCHEDULED  # nobody knows any more whose pictures were meant


def test_once_one_of_two_candidates_is_in_force_the_other_is_due_to_be_settled_by_it(ledger: Ledger) -> None:
    """An adapter for a concept that another one erases cannot go live; its request must not wait for it for ever."""
    first, _ = ledger.submit(ask(), PROJECT, actor=ACTOR, now=NOW)
    own, _ = ledger.submit(ask(pictures=("p2",)), PROJECT, actor=ACTOR, now=NOW)
    same, _ = ledger.submit(ask(), PROJECT, actor=ACTOR, now=NOW)
    elsewhere, _ = ledger.submit(ask(), OTHER, actor=ACTOR, now=NOW)
    for record, erasure in ((first, "e1"), (own, "e2"), (same, "e1"), (elsewhere, "e3")):
        for state in (State.RUNNING, State.CANDIDATE):
            ledger.transition(record.id, state, actor=ACTOR, reason="on", erasure_id=erasure)
    ledger.transition(first.id, State.LIVE, actor=ACTOR, reason="released")
    states = [ledger.get(record.id).state for record in (first, own, same, elsewhere)]
    assert states == [State.LIVE, State.SCHEDULED, State.CANDIDATE, State.CANDIDATE]
    settled = settled_by(ledger, ledger.get(own.id))
    assert settled is not None
    assert settled.erasure_id == "e1"
    ledger.verify()


def test_a_duplicate_is_due_once_what_closed_it_is_no_longer_in_force(ledger: Ledger) -> None:
    first, _ = ledger.submit(ask(), PROJECT, actor=ACTOR, now=NOW)
    to_live(ledger, first.id)
    closed, _ = ledger.submit(ask(), PROJECT, actor=ACTOR)
    withdrawn, _ = ledger.submit(ask(), PROJECT, actor=ACTOR)
    ledger.cancel(withdrawn.id, actor=ACTOR, reason="withdrawn")
    assert closed.state is State.DUPLICATE
    ledger.transition(first.id, State.ROLLED_BACK, actor=ACTOR, reason="back")
    record = ledger.get(closed.id)
    assert (record.state, record.duplicate_of, record.erasure_id) == (State.SCHEDULED, None, None)
    assert ledger.get(withdrawn.id).state is State.CANCELLED
    ledger.verify()


def test_what_is_erased_is_known_however_many_there_are_and_without_its_name(ledger: Ledger) -> None:
    names = [f"thing {number}" for number in range(1100)]
    ledger.submit_all([(one, PROJECT) for one in [ask(name, received_at=NOW) for name in names]], actor=ACTOR, now=NOW)
    with ledger.engine.begin() as connection:  # by hand, as 3,300 transitions would take their time
        changed = sa.update(tables.requests).where(tables.requests.c.concept != "thing 7")
        connection.execute(changed.values(state="live", erasure_id="e1", concept=None))
    found = erased_among(ledger, [*names, "other"], "data/base/canvas/", besides="")
    assert found == {*names} - {"thing 7"}
    assert len(ledger.find()) == 1100
    assert erased_among(ledger, names, "other", besides="") == set()


def test_a_deadline_is_told_when_it_is_near_and_over_and_again_after_an_extension(ledger: Ledger) -> None:
    near, far = ask(received_at=NOW - timedelta(days=25)), ask("horse", received_at=NOW)
    closed = ask("coins", received_at=NOW - timedelta(days=40))
    for one in (near, far, closed):
        ledger.submit(one, PROJECT, actor=ACTOR, now=NOW)
    ledger.cancel(str(closed.id), actor=ACTOR, reason="withdrawn", now=NOW)

    def told(days_later: float) -> list[tuple[str, str]]:
        now = NOW + timedelta(days=days_later)
        found = warn(ledger, days=7, url="https://alerts.example/x", now=now)
        return [(one.request.id, one.event) for one in found]

    assert told(-3) == []
    assert told(0) == [(str(near.id), "deadline.near")]
    assert told(0.5) == []
    ledger.extend(str(near.id), actor=ACTOR, reason="many requests", now=NOW + timedelta(days=1))
    assert told(1) == []
    assert told(60) == [(str(near.id), "deadline.near"), (str(far.id), "deadline.over")]
    with ledger.reading() as connection:
        letters = [json.loads(body) for body in connection.scalars(sa.select(tables.outbox.c.body))]
    assert [letter["alert"] for letter in letters] == ["deadline.near", "deadline.near", "deadline.over"]
    assert all("cat" not in str(letter) for letter in letters)
    ledger.verify()


def test_durations_are_counted_from_the_log_once(ledger: Ledger) -> None:
    one = ask(received_at=NOW - timedelta(days=2))
    ledger.submit(one, PROJECT, actor=ACTOR, now=NOW)
    found = Durations()
    for state, seconds in (("running", 0), ("scheduled", 5), ("running", 100), ("candidate", 140)):
        ledger.transition(str(one.id), State(state), actor=ACTOR, reason="on", now=NOW + timedelta(seconds=seconds))
        found.read(ledger)
    found.read(ledger)
    again = Durations()
    again.read(ledger)
    for counted in (found, again):
        assert {name: (sum(h.counts), h.total) for name, h in counted.runs.items()} == {
            "scheduled": (1, 5.0),
            "candidate": (1, 40.0),
        }
        assert counted.runs["candidate"].cumulative()[1:3] == [("30.0", 0.0), ("60.0", 1.0)]
        assert counted.requests["candidate"].total == timedelta(days=2, seconds=140).total_seconds()


def test_pictures_without_a_concept_wait_for_an_answer(ledger: Ledger) -> None:
    record, _ = ledger.submit(ask(None, kind="pictures", pictures=("p1",)), PROJECT, actor=ACTOR)
    assert record.state is State.NEEDS_INPUT
    with pytest.raises(ConfigError, match="names no concept"):
        ledger.release(record.id, actor=ACTOR, reason="go")
    record = ledger.release(record.id, actor=ACTOR, reason="asked", concept="cat", surrogate="horse")
    assert (record.state, record.concept, record.surrogate) == (State.SCHEDULED, "cat", "horse")


@pytest.mark.parametrize(
    ("received", "due"),
    [("2026-01-31", "2026-02-28"), ("2028-01-31", "2028-02-29"), ("2026-04-30", "2026-05-30")],
)
def test_the_deadline_is_one_calendar_month(ledger: Ledger, received: str, due: str) -> None:
    at = datetime.fromisoformat(received).replace(tzinfo=UTC)
    record, _ = ledger.submit(ask(received_at=at), PROJECT, actor=ACTOR, now=at)
    assert f"{record.due_at:%Y-%m-%d}" == due


def test_a_deadline_is_extended_once_within_the_first_month_with_a_reason(ledger: Ledger) -> None:
    record, _ = ledger.submit(ask(), PROJECT, actor=ACTOR, now=NOW)
    with pytest.raises(ConfigError, match="needs a reason"):
        ledger.extend(record.id, actor=ACTOR, reason=" ", now=NOW)
    with pytest.raises(TransitionError, match="before that day alone"):
        ledger.extend(record.id, actor=ACTOR, reason="many", now=record.due_at + timedelta(seconds=1))
    extended = ledger.extend(record.id, actor=ACTOR, reason="many", now=record.due_at)
    assert extended.due_at == datetime(2026, 4, 30, 12, tzinfo=UTC)
    with pytest.raises(TransitionError, match="extended before"):
        ledger.extend(record.id, actor=ACTOR, reason="more", now=NOW)


@pytest.mark.parametrize(
    ("regulation", "due", "extended"),
    [("gdpr", "2026-02-28", "2026-04-30"), ("ccpa", "2026-03-17", "2026-05-01"), ("other", "2026-02-28", "2026-04-30")],
)
def test_each_regulation_has_its_own_terms(ledger: Ledger, regulation: str, due: str, extended: str) -> None:
    record, _ = ledger.submit(ask(regulation=regulation, received_at=NOW), PROJECT, actor=ACTOR, now=NOW)
    assert f"{record.due_at:%Y-%m-%d}" == due
    late = ledger.extend(record.id, actor=ACTOR, reason="complex", now=NOW)
    assert f"{late.due_at:%Y-%m-%d}" == extended
    assert regulation != "ccpa" or late.due_at - late.received_at == timedelta(days=90)


def test_a_month_is_one_where_it_was_received_and_an_extension_goes_no_further(ledger: Ledger) -> None:
    auckland = datetime.fromisoformat("2026-03-31T08:00:00+13:00")  # still the 30th in UTC
    assert auckland.astimezone(UTC).day == 30
    record, _ = ledger.submit(ask(received_at=auckland), PROJECT, actor=ACTOR, now=datetime(2026, 4, 1, tzinfo=UTC))
    assert record.due_at == datetime.fromisoformat("2026-04-30T08:00:00+13:00")
    late = ledger.extend(record.id, actor=ACTOR, reason="complex", now=record.due_at)
    assert late.due_at == datetime.fromisoformat("2026-06-30T08:00:00+13:00")


@pytest.mark.parametrize("given", ["0001-01-01T00:00:00+02:00", "0001-01-01T00:00:00Z", "1970-01-01T00:00:00Z", 0])
def test_a_time_that_was_never_set_is_refused(given: str | int) -> None:
    asked = {"id": str(uuid.uuid4()), "kind": "object", "concept": "cat"}
    read_message(json.dumps({**asked, "received_at": "2025-01-31T10:00:00Z"}))
    with pytest.raises(DataError, match="received_at: must not be before 2000"):
        read_message(json.dumps({**asked, "received_at": given}))


def test_a_senders_clock_that_is_ahead_does_not_move_the_deadline(ledger: Ledger) -> None:
    record, _ = ledger.submit(ask(received_at=NOW + timedelta(days=400)), PROJECT, actor=ACTOR, now=NOW)
    assert record.received_at == NOW


def test_the_log_holds_no_names(ledger: Ledger) -> None:
    # No hexadecimal hash or id holds these by chance.
    record, _ = ledger.submit(
        ask("Zoe Lovelace", kind="person", aliases=("Zoe",), subject="s-9", pictures=("x-17",)), PROJECT, actor=ACTOR
    )
    ledger.release(ledger.hold(record.id, actor=ACTOR, reason="see x-17").id, actor=ACTOR, reason="over")
    ledger.hold(record.id, actor=ACTOR, reason="ZOE LOVELACE asked; Zoe, s-9 again, for zoe/picture-3")
    with ledger.reading() as connection:
        text = str(connection.execute(sa.select(tables.log)).all()).lower()
    assert "hold" in text
    assert "zoe" not in text
    assert "s-9" not in text
    assert "x-17" not in text


def test_names_are_forgotten_when_a_request_is_over(ledger: Ledger) -> None:
    record, _ = ledger.submit(ask("Ada Lovelace", aliases=("Ada",)), PROJECT, actor=ACTOR)
    with pytest.raises(TransitionError, match="still needed"):
        ledger.minimise(record.id, actor=ACTOR, reason="over")
    to_live(ledger, record.id)
    record = ledger.minimise(record.id, actor=ACTOR, reason="over")
    assert (record.concept, record.aliases) == (None, ())
    ledger.verify()
    again, _ = ledger.submit(ask("ada lovelace"), PROJECT, actor=ACTOR)
    assert again.duplicate_of == record.id  # still known, without its name


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (sa.update(tables.log).where(tables.log.c.seq == 2).values(reason="x"), "broken at row 2"),
        (sa.delete(tables.log).where(tables.log.c.seq == 2), "broken at row 2"),
        (sa.delete(tables.log).where(tables.log.c.seq >= 3), "ends at row 2"),
        (sa.update(tables.requests).values(state="live"), "is live, which its log does not say"),
        (sa.delete(tables.requests), "a request that is gone"),
        (sa.update(tables.head).values(seq=9), "not the recorded end"),
    ],
)
def test_a_changed_ledger_is_noticed(ledger: Ledger, spoil: Any, message: str) -> None:
    ledger.submit_all([(one, PROJECT) for one in [ask(), ask("horse")]], actor=ACTOR)
    ledger.append("released", actor=ACTOR, erasure_id="e1", details={"counter": 3})
    assert ledger.verify().rows == 5
    with ledger.engine.begin() as connection:
        connection.execute(spoil)
    with pytest.raises(LineageError, match=message):
        ledger.verify()


def test_the_chain_holds_when_many_write_at_once(ledger: Ledger) -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(5):
                ledger.submit(ask(), PROJECT, actor=ACTOR)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert ledger.verify().rows == 40


def take(ledger: Ledger, worker: str = "w", *, now: datetime = NOW, **more: Any) -> leases.Lease | None:
    return leases.take(ledger, worker, seconds=60, now=now, **{"running_limit": 10, **more})


def test_near_deadlines_go_first_then_priority_then_deadline(ledger: Ledger) -> None:
    asked = {
        "late": ask("a", received_at=NOW - timedelta(days=40), priority=0),
        "urgent": ask("b", received_at=NOW - timedelta(days=1), priority=9),
        "older": ask("c", received_at=NOW - timedelta(days=9)),
        "newer": ask("d", received_at=NOW - timedelta(days=2)),
    }
    ledger.submit_all([(one, PROJECT) for one in list(reversed(asked.values()))], actor=ACTOR, now=NOW)
    order = []
    while lease := take(ledger):
        order.append(lease.request.id)
    assert order == [str(message.id) for message in asked.values()]


def test_no_request_is_two_workers_and_the_limit_holds(ledger: Ledger) -> None:
    ledger.submit_all([(one, PROJECT) for one in [ask(f"c{i}") for i in range(12)]], actor=ACTOR, now=NOW)
    taken: list[leases.Lease] = []

    def work(worker: str) -> None:
        while lease := leases.take(ledger, worker, seconds=60, running_limit=8, now=NOW):
            taken.append(lease)

    threads = [threading.Thread(target=work, args=(f"w{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 8
    assert len({lease.request.id for lease in taken}) == 8


def test_the_same_concept_does_not_run_twice_at_once(ledger: Ledger) -> None:
    ledger.submit_all([(one, PROJECT) for one in [ask("cat"), ask("CAT"), ask("horse")]], actor=ACTOR, now=NOW)
    found = [take(ledger), take(ledger)]
    assert all(found)
    assert take(ledger) is None


def test_a_dead_workers_request_is_taken_over_and_it_can_end_nothing(ledger: Ledger) -> None:
    ledger.submit(ask(), PROJECT, actor=ACTOR, now=NOW)
    dead = take(ledger, "dead")
    assert dead
    assert take(ledger, "next") is None
    leases.renew(ledger, dead, seconds=60, step="mask", now=NOW + timedelta(seconds=50))
    assert take(ledger, "next", now=NOW + timedelta(seconds=100)) is None
    later = NOW + timedelta(seconds=111)
    heir = take(ledger, "next", now=later)
    assert heir
    assert heir.request.id == dead.request.id
    assert heir.fence > dead.fence
    for late in (
        lambda: leases.renew(ledger, dead, seconds=60, now=later),
        lambda: leases.finish(ledger, dead, State.CANDIDATE, reason="done", now=later),
    ):
        with pytest.raises(LeaseLostError, match="no longer runs under lease 1"):
            late()
    done = leases.finish(ledger, heir, State.CANDIDATE, reason="passed", erasure_id="e1", now=later)
    assert (done.state, done.erasure_id, done.worker) == (State.CANDIDATE, "e1", None)


def test_a_worker_whose_clock_is_ahead_takes_no_live_lease(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    if ledger.engine.dialect.name == "sqlite":
        pytest.skip("all that share the file share its machine's clock")
    ledger.submit(ask(), PROJECT, actor=ACTOR)
    first = leases.take(ledger, "right", seconds=120)
    assert first
    ahead = datetime.now(UTC) + timedelta(minutes=5)
    assert ahead > first.until
    monkeypatch.setattr("fade.requests.records.utc_now", lambda: ahead)
    assert leases.take(ledger, "ahead", seconds=120, running_limit=10) is None
    leases.renew(ledger, first, seconds=120)
    assert ledger.get(first.request.id).worker == "right"
    assert all(entry.at < ahead - timedelta(minutes=4) for entry in ledger.history())
    # For who says the time itself it is over: the lease can end at all.
    assert leases.take(ledger, "heir", seconds=120, now=ahead)


def test_a_request_whose_workers_keep_dying_is_given_up(ledger: Ledger) -> None:
    record, _ = ledger.submit(ask(), PROJECT, actor=ACTOR, now=NOW)
    now = NOW
    for _ in range(3):
        assert take(ledger, now=now, attempts_limit=3)
        now += timedelta(seconds=61)
    assert take(ledger, now=now, attempts_limit=3) is None
    record = ledger.get(record.id)
    assert record.state is State.FAILED
    assert "given up after 3 attempts" in str(record.reason)
    ledger.release(record.id, actor=ACTOR, reason="mended", now=now)
    assert take(ledger, now=now, attempts_limit=3)


def test_a_cancelled_run_ends_its_workers_lease(ledger: Ledger) -> None:
    ledger.submit(ask(), PROJECT, actor=ACTOR, now=NOW)
    lease = take(ledger)
    assert lease
    ledger.cancel(lease.request.id, actor=ACTOR, reason="withdrawn", now=NOW)
    with pytest.raises(LeaseLostError, match="a person"):
        leases.renew(ledger, lease, seconds=60, now=NOW)
    ledger.verify()


def test_a_retry_waits_for_its_time(ledger: Ledger) -> None:
    ledger.submit(ask(), PROJECT, actor=ACTOR, now=NOW)
    lease = take(ledger)
    assert lease
    later = NOW + timedelta(minutes=5)
    leases.finish(ledger, lease, State.SCHEDULED, reason="again", retry_seconds=300, now=NOW)
    assert take(ledger, now=later - timedelta(seconds=1)) is None
    assert take(ledger, now=later)


def test_the_published_schema_is_the_models_and_agrees_with_it() -> None:
    published = read_json(ROOT / messages.SCHEMA)
    assert published == messages.schema(), "run: python -m fade.requests.messages"
    jsonschema.validate(json.loads(ask().model_dump_json()), published)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"id": str(uuid.uuid4()), "kind": "dog"}, published)


def test_an_unknown_database_and_a_missing_request_are_said(ledger: Ledger) -> None:
    with pytest.raises(ConfigError, match="does not know the database 'mysql'"):
        Ledger("mysql://127.0.0.1/x")
    with pytest.raises(DataError, match="There is no request 'x'"):
        ledger.get("x")


def test_a_request_is_steered_from_the_command_line(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FADE_LEDGER_URL", f"sqlite:///{tmp_path / 'ledger.db'}")
    name, out = str(uuid.uuid4()), tmp_path / "out.json"

    def fade(*arguments: str, status: int = 0) -> str:
        result = CliRunner().invoke(app, [*arguments])
        assert result.exit_code == status, result.output
        return result.output

    asked = ["request", "submit", "--kind", "object", "--concept", "cat", "--id", name, "--json", str(out)]
    fade(*asked)
    assert json.loads(out.read_text())["state"] == "scheduled"
    assert "was here already" in fade(*asked)
    assert "with other content" in fade(*asked[:5], "dog", *asked[6:], status=1)
    fade("request", "hold", name, "--reason", "court")
    assert name in fade("request", "list", "--state", "on_hold")
    assert "cannot become on_hold" in fade("request", "hold", name, "--reason", "court", status=1)
    fade("request", "release", name, "--reason", "over")
    fade("request", "extend", name, "--reason", "many requests")
    fade("request", "cancel", name, "--reason", "withdrawn")
    assert "many requests" in fade("request", "show", name, "--json", str(out))
    assert len(json.loads(out.read_text())["log"]) == 6
    assert "6 rows" in fade("ledger", "verify")
    assert "Did you mean 'on_hold'" in fade("request", "list", "--state", "onhold", status=1)
    assert "concept is missing" in fade("request", "submit", "--kind", "style", status=1)


def test_what_a_stranger_wrote_is_shown_as_it_is_and_no_id_is_cut(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FADE_LEDGER_URL", f"sqlite:///{tmp_path / 'ledger.db'}")
    name, number = str(uuid.uuid4()), "[/b] :cat: [red]5[/red]"
    message = tmp_path / "request.json"
    message.write_text(json.dumps({"id": name, "kind": "object", "concept": "cat", "external_id": number}))

    def fade(*arguments: str, columns: int = 160) -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        look_at_streams()
        return CliRunner().invoke(app, [*arguments]).output

    try:
        assert "no request yet" in fade("status")
        fade("request", "submit", str(message))
        beside = fade("request", "submit", str(message), "--priority", "9", "--surrogate", "dog")
        assert "surrogate, priority must stand in it" in beside
        fade("request", "hold", name, "--reason", number)
        for asked in (["request", "list"], ["request", "show", name]):
            assert number in fade(*asked), asked
        for asked in (["request", "list"], ["status"]):
            narrow = fade(*asked, columns=60)
            assert f"\n{name}\n    " in f"\n{narrow}", narrow
            assert all(len(line) <= 60 for line in narrow.splitlines())
        assert "No request is live." in fade("request", "list", "--state", "live")
        assert "--limit shows more" in fade("request", "list", "--limit", "1")
    finally:
        monkeypatch.undo()
        look_at_streams()


def test_a_messages_faults_are_named_without_their_values() -> None:
    with pytest.raises(DataError) as caught:
        read_message(json.dumps({"id": "secret", "kind": "object", "concept": "x\x00y", "priority": 11, "nmae": 1}))
    for field in ("id:", "concept:", "priority:", "nmae"):
        assert field in str(caught.value)
    assert "secret" not in str(caught.value)
