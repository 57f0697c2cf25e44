"""Commands that work requests off, once or on and on: intake, drain, deadlines, webhooks; and all of it at once."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.console import JsonOption, ServedOption, console, guarded, served, write_figures
from flows.cli.requests import as_json

app = typer.Typer()
TimezoneOption = Annotated[str, typer.Option(help="Whose clocks --cron means, e.g. Europe/Berlin.")]
AGAIN_SECONDS = 5.0
"""Until a queue or a ledger that was not there is asked again."""


@app.command()
@guarded
def intake(
    follow: Annotated[bool, typer.Option("--follow", help="Go on until Ctrl-C.")] = False,
    projects: ServedOption = None,
    json_file: JsonOption = None,
) -> None:
    """Take messages from the queue (FADE_QUEUE_URL; the folder .fade/queue) into the ledger."""
    import time

    from fade.errors import RegistryError
    from fade.requests.intake import DEAD, take_in, transport
    from fade.requests.ledger import Ledger

    known = served(projects)
    sums = {"new": 0, "known": 0, "dead": 0}
    try:
        while True:
            try:
                with Ledger() as ledger, transport() as source:
                    while (found := take_in(ledger, source, known)).total or follow:
                        sums = {name: sums[name] + getattr(found, name) for name in sums}
                break
            except RegistryError as error:
                if not follow:
                    raise
                console.print(str(error))
                time.sleep(AGAIN_SECONDS)
    except KeyboardInterrupt:
        pass
    console.print(f"{sums['new']} new, {sums['known']} known already, {sums['dead']} dead letters")
    if sums["dead"]:
        console.print(f"What is no request lies in {DEAD} (of a folder: in its folder dead), with the reason.")
    write_figures(json_file, sums)


@app.command()
@guarded
def drain(
    limit: Annotated[int | None, typer.Option(min=1, help="Run at most so many.")] = None,
    cron: Annotated[str | None, typer.Option(help="Serve it on a schedule instead, e.g. '*/5 * * * *'.")] = None,
    timezone: TimezoneOption = "UTC",
    together: Annotated[
        bool, typer.Option("--together", help="All that are due become one adapter; each keeps its own outcome.")
    ] = False,
    projects: ServedOption = None,
    json_file: JsonOption = None,
) -> None:
    """Run the requests that are due; several may run at once, and a dead one's work is taken over.

    With --cron also `fade deadlines`, every hour; where no Prefect server is named, one runs beside it.
    """
    from flows.prefect_beside import beside_is_up, prefect_beside

    files = [one.params for one in served(projects).served]
    if cron is not None:
        _serve(cron, timezone, files, together=together)
        return
    prefect_beside()
    from flows.queue.drain import counted
    from flows.queue.drain import drain as drain_flow

    beside_is_up()
    ended = drain_flow(limit, files, together)
    console.print(counted(ended) or "Nothing is due.")
    write_figures(json_file, ended)


def _serve(cron: str, timezone: str, projects: list[Path], *, together: bool) -> None:
    """Serve the drain on a schedule until Ctrl-C, with a server where there is none."""
    from flows.prefect_beside import none_is_named, tell_prefect
    from flows.queue.schedules import checked_cron, checked_zone
    from flows.services.local import prefect_running
    from flows.settings import PREFECT_AUTH

    checked_cron(cron), checked_zone(timezone)  # said before a server is started for it
    with ExitStack() as beside:
        if none_is_named():
            address = beside.enter_context(prefect_running())
            tell_prefect(f"{address}/api")
            console.print(f"Prefect  {address}   runs, logs; log in with what is in {PREFECT_AUTH}")
        from flows.queue.drain import serve_schedule

        console.print(f"Looks for what is due at {cron} ({timezone}). Ctrl-C ends it.", highlight=False)
        serve_schedule(cron, timezone, projects=projects, together=together)


@app.command()
@guarded
def deadlines(
    days: Annotated[float, typer.Option(min=0, help="Tell of what is due within so many days.")] = 7.0,
    json_file: JsonOption = None,
) -> None:
    """Tell of requests whose deadline is near or over, each once: log, Prefect event, webhook to FADE_ALERT_URL."""
    from fade.requests.deadlines import alert_url
    from flows.prefect_beside import beside_is_up, prefect_beside

    alert_url()  # a wrong one is said before a server is started for the flow
    prefect_beside()
    from flows.queue.deadlines import deadlines as flow

    beside_is_up()
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
    timezone: TimezoneOption = "UTC",
    projects: ServedOption = None,
) -> None:
    """Start everything on loopback until Ctrl-C: servers, intake, drain on its schedule, release watch."""
    from fade.environment import environment
    from fade.requests.intake import DEFAULT_QUEUE
    from fade.requests.tables import ledger_url
    from flows.services.local import told_to_end
    from flows.services.up import TOKEN_FILE, run_stack
    from flows.settings import PREFECT_AUTH

    ports = {"mlflow_port": mlflow_port, "prefect_port": prefect_port, "intake_port": intake_port}
    known = served(projects)
    with (
        told_to_end() as ended,
        suppress(KeyboardInterrupt),
        run_stack(**ports, projects=known, cron=cron, timezone=timezone, ended=ended) as found,
    ):
        given = environment()
        token = "FADE_INTAKE_TOKEN" if given.intake_token else f"in {TOKEN_FILE}"
        queue = given.queue_url or DEFAULT_QUEUE
        lines = {
            "MLflow": f"{found.mlflow}   adapters: approve and roll back by alias",
            "Prefect": f"{found.prefect}   drain at '{cron}' ({timezone}); log in with what is in {PREFECT_AUTH}",
            "Intake": f"{found.intake}/requests   token: {token}; metrics: /metrics",
            "Queue": queue.rpartition("@")[2],
            "Projects": ", ".join(f"{one.name} on {one.base}" for one in known.served),
            "Ledger": ledger_url(given.ledger_url).render_as_string(),
            "Webhooks": "sent" if "webhooks" in found.programs.commands else "kept: set FADE_WEBHOOK_SECRET",
        }
        for name, said in lines.items():
            console.print(f"{name:<9}{said}", highlight=False, soft_wrap=True)
        console.print("Ctrl-C stops all of it.")
        while not ended.wait(0.5):
            for said in found.programs.look():
                console.print(said, highlight=False, soft_wrap=True)
    console.print("Stopped.")


@app.command("intake-http")
@guarded
def intake_http(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8700,
    projects: ServedOption = None,
) -> None:
    """Take requests over HTTP, with the token FADE_INTAKE_TOKEN; Prometheus metrics under /metrics."""
    import uvicorn

    from fade.requests.ledger import Ledger
    from flows.services.intake_http import make_app, token
    from flows.services.local import check_port

    expected, known = token(), served(projects)
    check_port(port, "the HTTP intake", "--port")
    with Ledger() as ledger:
        console.print(f"Intake   http://{host}:{port}/requests   metrics: /metrics")
        uvicorn.run(make_app(ledger, known, expected=expected), host=host, port=port, log_config=None, access_log=False)


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
        reasons, next_at = outbox.waiting(ledger)
    console.print(
        f"{sent} sent, {sum(reasons.values())} wait"
        + (f", the next is tried {next_at:%Y-%m-%d %H:%M:%S} UTC" if next_at else "")
    )
    for reason, count in sorted(reasons.items()):
        console.print(f"  {count}: {reason}", highlight=False, soft_wrap=True)
    write_figures(json_file, {"sent": sent, "failed": failed, "waiting": reasons})
