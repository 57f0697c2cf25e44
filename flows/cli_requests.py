"""Commands for deletion requests: submit, follow and steer them; the ledger's upkeep; how all of it stands."""

from __future__ import annotations

import getpass
import uuid
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fade.errors import ConfigError
from flows.console import JsonOption, console, guarded, write_figures

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
    return f"cli:{getpass.getuser()}"


@request_app.command()
@guarded
def submit(
    file: Annotated[Path | None, typer.Argument(help="A request as JSON; instead of the options.")] = None,
    kind: Annotated[str | None, typer.Option(help="object, style, person or pictures.")] = None,
    concept: Annotated[str | None, typer.Option(help="What is erased, as the catalog calls it.")] = None,
    alias: Annotated[list[str] | None, typer.Option(help="Another name of it; repeatable.")] = None,
    surrogate: Annotated[str, typer.Option(help="What its prompts shall give instead; auto; nothing.")] = "auto",
    base: Annotated[str, typer.Option(help="The base model.")] = "data/base/canvas",
    request_id: Annotated[
        str | None, typer.Option("--id", help="UUID, the idempotency key; a new one if left out.")
    ] = None,
    external_id: Annotated[str | None, typer.Option(help="Your own number of it; no name.")] = None,
    regulation: Annotated[str, typer.Option(help="gdpr, ccpa, lgpd or other.")] = "gdpr",
    legal_basis: Annotated[str | None, typer.Option(help="e.g. 'GDPR Art. 17(1)(b)'.")] = None,
    priority: Annotated[int, typer.Option(help="0 to 9, the most urgent.")] = 5,
    callback_url: Annotated[str | None, typer.Option(help="Signed webhooks go there.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Put a request into the ledger. Sent twice with the same id and content, it is one request."""
    from fade.requests.ledger import Ledger
    from fade.requests.messages import make_message, read_message

    if file is not None:
        if kind or concept:
            raise ConfigError("Give a file, or --kind and --concept; not both.")
        if not file.is_file():
            raise ConfigError(f"There is no file {file}: expected a request as JSON there.")
        message = read_message(file.read_bytes())
    else:
        message = make_message(
            id=request_id or str(uuid.uuid4()),
            kind=kind or "object",
            concept=concept,
            aliases=tuple(alias or ()),
            surrogate=surrogate,
            base=base,
            external_id=external_id,
            regulation=regulation,
            legal_basis=legal_basis,
            priority=priority,
            callback_url=callback_url,
        )
    with Ledger() as ledger:
        record, new = ledger.submit(message, actor=actor())
    console.print(
        f"{record.id} is [bold]{record.state}[/bold], due {record.due_at:%Y-%m-%d}"
        + ("" if new else " (it was here already)")
    )
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
    table = Table("id", "external id", "kind", "state", "due", "erasure")
    for record in found:
        table.add_row(
            record.id, record.external_id, record.kind, record.state, f"{record.due_at:%Y-%m-%d}", record.erasure_id
        )
    console.print(table if found else "No request is in the ledger. Begin with: fade request submit")
    write_figures(json_file, {"requests": [as_json(record) for record in found]})


@request_app.command()
@guarded
def show(request_id: IdArgument, json_file: JsonOption = None) -> None:
    """Show a request and all that happened to it."""
    from fade.requests.ledger import Ledger

    with Ledger() as ledger:
        record, entries = ledger.get(request_id), ledger.history(request_id=request_id)
    table = Table("", "", show_header=False)
    for key, value in as_json(record).items():
        if value not in (None, [], ""):
            table.add_row(key, ", ".join(value) if isinstance(value, list) else str(value))
    console.print(table)
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
    """Move the deadline by two months: once, within the first month, with the reason the person is told."""
    _steer(request_id, json_file, lambda ledger: ledger.extend(request_id, actor=actor(), reason=reason))


@ledger_app.command()
@guarded
def verify(json_file: JsonOption = None) -> None:
    """Check that no row of the log was changed, removed or added, and no state changed beside it."""
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
            console.print(_status_table(found))
        else:
            with Live(_status_table(found), console=console, auto_refresh=False) as live:
                try:
                    while True:
                        time.sleep(watch)
                        found = overview(ledger, limit=limit)
                        live.update(_status_table(found), refresh=True)
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


@app.command()
@guarded
def intake(
    follow: Annotated[bool, typer.Option("--follow", help="Go on until Ctrl-C.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Take messages from the queue (FADE_QUEUE_URL; the folder .fade/queue) into the ledger."""
    import time

    from fade.errors import RegistryError
    from fade.requests.intake import take_in, transport
    from fade.requests.ledger import Ledger

    sums = {"new": 0, "known": 0, "dead": 0}
    try:
        while True:
            try:
                with Ledger() as ledger, transport() as source:
                    while (found := take_in(ledger, source)).total or follow:
                        sums = {name: sums[name] + getattr(found, name) for name in sums}
                break
            except RegistryError as error:
                if not follow:
                    raise
                console.print(str(error))
                time.sleep(5)
    except KeyboardInterrupt:
        pass
    console.print(f"{sums['new']} new, {sums['known']} known already, {sums['dead']} dead letters")
    write_figures(json_file, sums)


@app.command()
@guarded
def drain(
    limit: Annotated[int | None, typer.Option(min=1, help="Run at most so many.")] = None,
    cron: Annotated[str | None, typer.Option(help="Serve it on a schedule instead, e.g. '*/5 * * * *'.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Run the requests that are due; several may run at once, and a dead one's work is taken over.

    With --cron also `fade deadlines`, every hour.
    """
    from flows.drain import drain as drain_flow
    from flows.drain import serve_schedule

    if cron is not None:
        serve_schedule(cron)
        return
    ended = drain_flow(limit)
    console.print(", ".join(f"{count} {state}" for state, count in sorted(ended.items())) or "Nothing is due.")
    write_figures(json_file, ended)


@app.command()
@guarded
def deadlines(
    days: Annotated[float, typer.Option(min=0, help="Tell of what is due within so many days.")] = 7.0,
    json_file: JsonOption = None,
) -> None:
    """Tell of requests whose deadline is near or over, each once: log, Prefect event, webhook to FADE_ALERT_URL."""
    from flows.deadlines import deadlines as flow

    told = flow(days)
    for one in told:
        console.print(f"{one.event}: {one.request.id} is {one.request.state}, due {one.request.due_at:%Y-%m-%d %H:%M}")
    if not told:
        console.print("Nothing new is near its deadline.")
    write_figures(json_file, {"told": [{"event": one.event, **as_json(one.request)} for one in told]})


@app.command()
@guarded
def up(
    mlflow_port: Annotated[int, typer.Option(help="Port of MLflow.")] = 5000,
    prefect_port: Annotated[int, typer.Option(help="Port of Prefect.")] = 4200,
    intake_port: Annotated[int, typer.Option(help="Port of the HTTP intake.")] = 8700,
    cron: Annotated[str, typer.Option(help="When the drain runs.")] = "*/5 * * * *",
) -> None:
    """Start everything on loopback until Ctrl-C: servers, intake, drain on its schedule, release watch."""
    import signal
    import time

    from fade.environment import environment
    from fade.requests.intake import DEFAULT_QUEUE
    from fade.requests.tables import ledger_url
    from flows.up import TOKEN_FILE, everything

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with everything(
            mlflow_port=mlflow_port, prefect_port=prefect_port, intake_port=intake_port, cron=cron
        ) as found:
            given = environment()
            token = "FADE_INTAKE_TOKEN" if given.intake_token else f"in {TOKEN_FILE}"
            queue = given.queue_url or DEFAULT_QUEUE
            lines = {
                "MLflow": f"{found.mlflow}   adapters: approve and roll back by alias",
                "Prefect": f"{found.prefect}   runs, logs, progress; the drain runs at '{cron}'",
                "Intake": f"{found.intake}/requests   token: {token}; metrics: /metrics",
                "Queue": queue.rpartition("@")[2],
                "Ledger": ledger_url(given.ledger_url).render_as_string(),
                "Webhooks": "sent" if "webhooks" in found.programs.commands else "kept: set FADE_WEBHOOK_SECRET",
            }
            for name, said in lines.items():
                console.print(f"{name:<9}{said}", highlight=False, soft_wrap=True)
            console.print("Ctrl-C stops all of it.")
            while True:
                time.sleep(0.5)
                for said in found.programs.look():
                    console.print(said, highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        console.print("Stopped.")


@app.command("intake-http")
@guarded
def intake_http(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8700,
) -> None:
    """Take requests over HTTP, with the token FADE_INTAKE_TOKEN; Prometheus metrics under /metrics."""
    import uvicorn

    from fade.requests.ledger import Ledger
    from flows.intake_http import make_app, token
    from flows.services import check_port

    expected = token()
    check_port(port, "the HTTP intake", "--port")
    with Ledger() as ledger:
        console.print(f"Intake   http://{host}:{port}/requests   metrics: /metrics")
        uvicorn.run(make_app(ledger, expected=expected), host=host, port=port, log_config=None, access_log=False)


@app.command()
@guarded
def webhooks(
    follow: Annotated[bool, typer.Option("--follow", help="Go on until Ctrl-C.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Send the webhooks whose turn it is, signed with FADE_WEBHOOK_SECRET."""
    import time

    from fade.requests import webhooks as outbox
    from fade.requests.ledger import Ledger

    key, sent, failed = outbox.secret(), 0, 0
    with Ledger() as ledger:
        try:
            while True:
                sums = outbox.deliver(ledger, key=key)
                sent, failed = sent + sums[0], failed + sums[1]
                if not follow and sums[0] == 0:
                    break
                if sums[0] == 0:
                    time.sleep(2)
        except KeyboardInterrupt:
            pass
    console.print(f"{sent} sent, {failed} to be tried again")
    write_figures(json_file, {"sent": sent, "failed": failed})


def _status_table(found: Overview) -> Table:
    counts = "  ".join(f"{state} {count}" for state, count in sorted(found.counts.items())) or "no request yet"
    table = Table("id", "kind", "state", "step", "age", "due in", "attempts", title=counts)
    table.caption = f"{found.overdue} overdue, {found.webhooks} webhooks wait, {found.at:%Y-%m-%d %H:%M:%S} UTC"
    for record in found.urgent:
        left = (record.due_at - found.at).total_seconds()
        table.add_row(
            *(record.id, record.kind, record.state, record.step or ""),
            _span((found.at - record.received_at).total_seconds()),
            f"[red]-{_span(-left)}[/red]" if left < 0 else _span(left),
            str(record.attempts),
        )
    return table


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
    console.print(f"{request_id} is [bold]{record.state}[/bold], due {record.due_at:%Y-%m-%d}")
    write_figures(json_file, as_json(record))
