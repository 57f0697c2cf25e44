"""Commands for deletion requests: submit, follow and steer them; the ledger's upkeep; how all of it stands."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.table import Table

from fade.errors import ConfigError, listing
from flows.account import this_user
from flows.cli.console import JsonOption, console, detailed, guarded, listed_rows, served, styled, write_figures

if TYPE_CHECKING:
    from fade.requests.overview import Overview
    from fade.requests.records import Record

app = typer.Typer()
request_app = typer.Typer(help="Submit a deletion request, follow it, hold it, extend its deadline.")
ledger_app = typer.Typer(help="Check the ledger's chain, and bring its tables up to date.")
app.add_typer(request_app, name="request")
app.add_typer(ledger_app, name="ledger")
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="The request's id.")]
ReasonOption = Annotated[str, typer.Option(help="Why; it is kept in the log, so name nobody.")]


def actor() -> str:
    """Who gives the command, for the log."""
    return f"cli:{this_user()}"


@request_app.command()
@guarded
def submit(
    file: Annotated[Path | None, typer.Argument(help="A request as JSON; instead of the options.")] = None,
    kind: Annotated[str | None, typer.Option(help="object, style, person or pictures; object if left out.")] = None,
    concept: Annotated[str | None, typer.Option(help="What is erased, as the catalog calls it.")] = None,
    alias: Annotated[list[str] | None, typer.Option(help="Another name of it; repeatable.")] = None,
    surrogate: Annotated[
        str | None, typer.Option(help="What its prompts shall give instead; nothing; auto, as if left out.")
    ] = None,
    project: Annotated[
        str | None, typer.Option(help="Which of the projects of FADE_PROJECT it is for; the only one if left out.")
    ] = None,
    request_id: Annotated[
        str | None, typer.Option("--id", help="UUID, the idempotency key; a new one if left out.")
    ] = None,
    external_id: Annotated[str | None, typer.Option(help="Your own number of it; no name.")] = None,
    regulation: Annotated[str | None, typer.Option(help="gdpr, as if left out; ccpa, lgpd or other.")] = None,
    legal_basis: Annotated[str | None, typer.Option(help="e.g. 'GDPR Art. 17(1)(b)'.")] = None,
    priority: Annotated[int | None, typer.Option(help="0 to 9, the most urgent; 5 if left out.")] = None,
    callback_url: Annotated[str | None, typer.Option(help="Signed webhooks go there.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Put a request into the ledger. Sent twice with the same id and content, it is one request."""
    from fade.requests.ledger import Ledger
    from fade.requests.messages import make_message, read_message

    fields = {
        **{"id": request_id, "kind": kind, "concept": concept, "aliases": alias, "surrogate": surrogate},
        **{"project": project, "external_id": external_id, "regulation": regulation, "legal_basis": legal_basis},
        **{"priority": priority, "callback_url": callback_url},
    }
    given = {name: value for name, value in fields.items() if value not in (None, [])}
    if file is not None:
        if given:
            raise ConfigError(f"A file is the whole request: {listing(given)} must stand in it, not beside it.")
        if not file.is_file():
            raise ConfigError(f"There is no file {file}: expected a request as JSON there.")
        message = read_message(file.read_bytes())
    else:
        message = make_message(**{"id": str(uuid.uuid4()), "kind": "object", **given})
    with Ledger() as ledger:
        record, new = ledger.submit(message, served().chosen(message.project), actor=actor())
    known = "" if new else " (it was here already)"
    console.print(styled(f"{record.id} is ", (record.state, "bold"), f", due {record.due_at:%Y-%m-%d}{known}"))
    if record.reason not in (None, "complete"):
        console.print(str(record.reason))
    write_figures(json_file, {**as_json(record), "new": new})


@request_app.command("list")
@guarded
def list_requests(
    state: Annotated[list[str] | None, typer.Option(help="Only those in this state; repeatable.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, the nearest deadline first.")] = 50,
    json_file: JsonOption = None,
) -> None:
    """List requests, the nearest deadline first."""
    from fade.errors import nearest
    from fade.requests.ledger import Ledger
    from fade.requests.states import State

    for name in state or ():
        if name not in set(State):
            raise ConfigError(f"There is no state {name!r}. {nearest(name, [str(one) for one in State])}")
    with Ledger() as ledger:
        found = ledger.find(states=[State(name) for name in state] if state else None, limit=limit)
    several = len({record.project for record in found}) > 1
    rows = [
        {
            **{"id": record.id, "project": record.project * several, "external id": record.external_id},
            **{"kind": record.kind, "state": record.state, "due": f"{record.due_at:%Y-%m-%d}"},
            "erasure": record.erasure_id,
        }
        for record in found
    ]
    none = f"No request is {' or '.join(state or ())}." if state else "No request is in the ledger."
    console.print(listed_rows(rows) if found else f"{none} Begin with: fade request submit")
    if len(found) == limit:
        console.print(f"The first {limit}; --limit shows more.")
    write_figures(json_file, {"requests": [as_json(record) for record in found]})


@request_app.command()
@guarded
def show(request_id: IdArgument, json_file: JsonOption = None) -> None:
    """Show a request and all that happened to it."""
    from fade.requests.ledger import Ledger

    with Ledger() as ledger:
        record, entries = ledger.get(request_id), ledger.history(request_id=request_id)
    content = {key: value for key, value in as_json(record).items() if value not in (None, [], "")}
    console.print(
        detailed({key: ", ".join(one) if isinstance(one, list) else str(one) for key, one in content.items()})
    )
    log = Table("row", "when (UTC)", "event", "by", "reason")
    for entry in entries:
        said = f"{entry.before or ''} -> {entry.after}" if entry.after else entry.event
        log.add_row(str(entry.seq), f"{entry.at:%Y-%m-%d %H:%M:%S}", said, entry.actor, entry.reason)
    console.print(log)
    write_figures(
        json_file,
        {**as_json(record), "log": [{**asdict(entry), "at": entry.at.isoformat()} for entry in entries]},
    )


@request_app.command()
@guarded
def cancel(request_id: IdArgument, reason: ReasonOption, json_file: JsonOption = None) -> None:
    """Withdraw a request that is not in force yet."""
    _steer(request_id, json_file, lambda ledger: ledger.cancel(request_id, actor=actor(), reason=reason))


@request_app.command()
@guarded
def minimise(request_id: IdArgument, reason: ReasonOption, json_file: JsonOption = None) -> None:
    """Forget the names in a request that is over; that it was, and when, stays in the log."""
    _steer(request_id, json_file, lambda ledger: ledger.minimise(request_id, actor=actor(), reason=reason))


@request_app.command()
@guarded
def hold(request_id: IdArgument, reason: ReasonOption, json_file: JsonOption = None) -> None:
    """Keep a request from running; its deadline stays."""
    _steer(request_id, json_file, lambda ledger: ledger.hold(request_id, actor=actor(), reason=reason))


@request_app.command()
@guarded
def release(
    request_id: IdArgument,
    reason: ReasonOption,
    concept: Annotated[str | None, typer.Option(help="The answer, where a concept was asked for.")] = None,
    surrogate: Annotated[str | None, typer.Option(help="Another surrogate.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Let a request run: from hold, after an answer, after a failure or a roll-back."""
    _steer(
        request_id,
        json_file,
        lambda ledger: ledger.release(request_id, actor=actor(), reason=reason, concept=concept, surrogate=surrogate),
    )


@request_app.command()
@guarded
def extend(request_id: IdArgument, reason: ReasonOption, json_file: JsonOption = None) -> None:
    """Move the deadline as far as the law lets it: once, before it is over, with the reason the person is told."""
    _steer(request_id, json_file, lambda ledger: ledger.extend(request_id, actor=actor(), reason=reason))


@ledger_app.command()
@guarded
def verify(json_file: JsonOption = None) -> None:
    """Check that no row of the log was changed, removed or added, and no request or webhook changed beside it."""
    from fade.requests.ledger import Ledger

    with Ledger() as ledger:
        report = ledger.verify()
    console.print(f"The chain holds: {report.rows} rows, head {report.head}")
    write_figures(json_file, asdict(report))


@ledger_app.command()
@guarded
def upgrade() -> None:
    """Bring the ledger's tables to this version; opening it does the same."""
    from fade.requests.ledger import Ledger
    from fade.requests.tables import HEAD

    with Ledger() as ledger:
        console.print(f"{ledger.engine.url.render_as_string()} has version {HEAD}.")


@app.command()
@guarded
def status(
    watch: Annotated[float | None, typer.Option(min=0.2, help="Show it anew every so many seconds.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Rows of the table.")] = 20,
    json_file: JsonOption = None,
) -> None:
    """How all requests stand: counts by state, and the open ones by deadline."""
    import time

    from rich.live import Live

    from fade.requests.ledger import Ledger
    from fade.requests.overview import overview

    with Ledger() as ledger:
        found = overview(ledger, limit=limit)
        if watch is None:
            console.print(_status(found))
        else:
            with Live(_status(found), console=console, auto_refresh=False) as live:
                try:
                    while True:
                        time.sleep(watch)
                        found = overview(ledger, limit=limit)
                        live.update(_status(found), refresh=True)
                except KeyboardInterrupt:
                    pass
    write_figures(
        json_file,
        {
            "counts": found.counts,
            "overdue": found.overdue,
            "oldest_seconds": found.oldest_seconds,
            "webhooks": found.webhooks,
            "urgent": [as_json(record) for record in found.urgent],
        },
    )


def _status(found: Overview) -> Group:
    counts = "  ".join(f"{state} {count}" for state, count in sorted(found.counts.items())) or "no request yet"
    several = len({record.project for record in found.urgent}) > 1
    rows = []
    for record in found.urgent:
        left = (record.due_at - found.at).total_seconds()
        rows.append(
            {
                **{"id": record.id, "project": record.project * several, "kind": record.kind, "state": record.state},
                **{"step": record.step, "age": _span((found.at - record.received_at).total_seconds())},
                "due in": styled((f"-{_span(-left)}", "red")) if left < 0 else _span(left),
                "attempts": str(record.attempts or ""),
            }
        )
    waits = f"{found.overdue} overdue, {found.webhooks} webhooks wait, {found.at:%Y-%m-%d %H:%M:%S} UTC"
    return Group(counts, *([listed_rows(rows)] if rows else []), waits)


def _span(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def as_json(record: Record) -> dict[str, Any]:
    """A record as JSON holds it."""
    return {
        key: value.isoformat() if isinstance(value, datetime) else list(value) if isinstance(value, tuple) else value
        for key, value in asdict(record).items()
    }


def _steer(request_id: str, json_file: Path | None, act: Callable[[Any], Record]) -> None:
    from fade.requests.ledger import Ledger

    with Ledger() as ledger:
        record = act(ledger)
    console.print(styled(f"{request_id} is ", (record.state, "bold"), f", due {record.due_at:%Y-%m-%d}"))
    write_figures(json_file, as_json(record))
