"""Commands that follow an erasure: approve, rollback, release, live, serve; rebase."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from fade.errors import ConfigError
from flows.account import this_user
from flows.cli.console import (
    BaseOption,
    JsonOption,
    ProjectOption,
    chosen,
    console,
    guarded,
    rated,
    styled,
    write_figures,
)

if TYPE_CHECKING:
    from flows.releasing.release import Change
    from tasks.mlflow.tracking import AdapterVersion

app = typer.Typer()


@app.command()
@guarded
def approve(
    name: Annotated[str, typer.Argument(help="Erasure id, or id:version.")],
    because: Annotated[
        str | None,
        typer.Option(help="Why one passes whose gate does not decide; kept in the log and on its page. Name nobody."),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Make a candidate live: sets the alias 'approved', as a reviewer does in the MLflow page, and releases."""
    from flows.erasing import together
    from flows.releasing import approval, release
    from flows.releasing.released import live_versions
    from tasks.mlflow import tracking

    version = named(name)
    version = approval.approve(version.model, version.version, because=because or "")
    changes = release.reconcile()
    version = tracking.find_version(version.model, version.version)
    live = version.version in live_versions(version.model)
    _print_changes(changes)
    if live:
        console.print(styled(f"{version.model} version {version.version} is ", ("live", "bold green"), "."))
    write_figures(json_file, asdict(version))
    together.wait_for_consolidations()
    if not live:
        raise typer.Exit(1)


@app.command()
@guarded
def rollback(
    name: Annotated[str, typer.Argument(help="Erasure id.")],
    to: Annotated[int | None, typer.Option(help="Go back to this version instead of to none.")] = None,
    only: Annotated[
        str | None, typer.Option(metavar="CONCEPT", help="Of an adapter for several: this one; the others stay erased.")
    ] = None,
    because: Annotated[
        str, typer.Option(help="With --only: why the adapter of the others goes live where its gate does not decide.")
    ] = "",
    json_file: JsonOption = None,
) -> None:
    """Take an approved adapter back: its concept is drawn again."""
    from flows.erasing import together
    from flows.releasing import approval, manifests, release
    from flows.releasing.released import live_versions
    from tasks.mlflow import tracking

    model = tracking.MODEL_PREFIX + name.removeprefix(tracking.MODEL_PREFIX)
    known = [one for one in tracking.versions() if one.model == model]
    if only is not None:
        if to is not None:
            raise ConfigError("--to goes back to another version, --only takes one concept out: give one of them.")
        from flows.prefect_beside import prefect_beside

        prefect_beside()
        from flows.releasing.part import roll_back_one

        left = roll_back_one(name, only, because=because)
        known = [left]
        _print_changes(release.reconcile())
        console.print(f"The others are erased by {left.model} version {left.version}.", highlight=False)
    elif live_versions(model) and not any(one.live for one in known):
        # MLflow no longer knows what is live, so that no alias can be taken back there.
        console.print(f"Out, though MLflow has no alias of it: {', '.join(manifests.take_out(model))}.")
    else:
        known = [approval.rollback(name, to)]
        _print_changes(release.reconcile())
    live = live_versions(model)
    console.print(f"{model} {f'version {live[0]} is live' if live else 'is no longer live'}.")
    write_figures(json_file, {**(asdict(known[-1]) if known else {}), "model": model, "live_versions": live})
    together.wait_for_consolidations()


@app.command()
@guarded
def release(
    watch: Annotated[bool, typer.Option("--watch", help="Go on until Ctrl-C: look every second.")] = False,
    valid_minutes: Annotated[
        float,
        typer.Option(min=0, help="With --watch: runtimes stop when no newer manifest comes for so long; 0 never."),
    ] = 15.0,
    webhook_port: Annotated[
        int,
        typer.Option(help="With --watch: port for MLflow's webhooks (secret: FADE_MLFLOW_WEBHOOK_SECRET); 0 for none."),
    ] = 0,
    host: Annotated[str, typer.Option(help="Address the webhooks come in at.")] = "127.0.0.1",
    open_base: Annotated[
        str | None,
        typer.Option(
            "--open", metavar="BASE", help="First sign, where there is no release of it, that nothing is erased."
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Bring the releases to what is approved in MLflow: publish, refuse, take out."""
    from flows.erasing import together
    from flows.releasing import manifests
    from flows.releasing.release import reconcile

    if open_base is not None:
        from fade.models.family import load_base

        manifests.open_release(open_base, load_base(open_base).sha256, valid_seconds=round(60 * valid_minutes) * watch)
    if not watch:
        changes = reconcile()
        _print_changes(changes)
        if not changes:
            console.print("Nothing is approved and nothing is live. Approve a candidate: fade approve ID")
        together.wait_for_consolidations()
        write_figures(json_file, {"releases": [{**asdict(one), "folder": str(one.folder)} for one in changes]})
        if any(one.refused for one in changes):
            raise typer.Exit(1)
        return
    _watch(round(60 * valid_minutes), webhook_port, host)


@app.command("step-back")
@guarded
def step_back(
    base: Annotated[str, typer.Argument(help="The base's hash or its beginning, as `fade live` shows it.")],
    seen: Annotated[int, typer.Option(help="Highest counter that was in force; a runtime that refuses says it.")],
    because: Annotated[str, typer.Option(help="Why; kept in the ledger's log and the permission. Name nobody.")],
) -> None:
    """After a restore: let runtimes take over the release as it is now, once, though they saw a higher counter."""
    from flows.releasing.manifests import permit_step_back

    permission = permit_step_back(base, seen=seen, reason=because, actor=this_user())
    console.print(
        f"Runtimes that saw up to {permission.from_counter} may go back to release {permission.to_counter}; what lies "
        "between is abandoned."
    )


def _watch(valid_seconds: int, port: int, host: str) -> None:
    import signal
    from contextlib import nullcontext

    from fade.environment import environment
    from flows.releasing.watch import Watch, serving, webhook_app

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    watcher = Watch(valid_seconds=valid_seconds)
    given = environment().mlflow_webhook_secret
    secret = given.get_secret_value() if given else ""
    try:
        with serving(webhook_app(watcher, secret), host=host, port=port) if port else nullcontext():
            console.print("Watching the registry. Ctrl-C stops.")
            for changes in watcher.run():
                _print_changes(changes)
    except KeyboardInterrupt:
        console.print("Stopped.")


@app.command()
@guarded
def live(json_file: JsonOption = None) -> None:
    """Show what is live by the signed manifests, and what is approved but stays out."""
    from flows.releasing.released import released
    from tasks.mlflow import tracking

    manifests = released()
    table = Table("base", "release", "issued", "holds until", "adapter", "SHA-256")
    for manifest in manifests.values():
        until = manifest.expires.isoformat() if manifest.expires else "for ever"
        head = (manifest.base_sha256[:12], str(manifest.counter), manifest.issued, until)
        rows = [(one.name, one.adapter_sha256[:12]) for one in manifest.adapters] or [("none: the base alone", "")]
        for i, row in enumerate(rows):
            table.add_row(*(head if i == 0 else ("", "", "", "")), *row)
    console.print(table if manifests else "Nothing was released yet. Approve a candidate: fade approve ID")
    names = {one.name for manifest in manifests.values() for one in manifest.adapters}
    out = [one for one in tracking.versions() if one.live and f"{one.model}/{one.version}" not in names]
    for version in out:
        said = "not looked at yet: fade release" if version.release in ("", "live") else version.release
        name = f" {version.model} version {version.version}"
        console.print(styled(("Approved, not live", "bold red"), f"{name}: {said}"), soft_wrap=True)
    write_figures(
        json_file,
        {
            "releases": [{**asdict(one), "folder": str(folder)} for folder, one in manifests.items()],
            "stays_out": [asdict(one) for one in out],
        },
    )


@app.command()
@guarded
def serve(
    project: ProjectOption = None,
    base: BaseOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8080,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Also serve the base's own pictures: whoever may ask undoes every erasure."),
    ] = False,
    release_folder: Annotated[
        Path | None,
        typer.Option(
            "--release",
            help="Release folder, or the folder of all; this project's own release of the base if not given.",
        ),
    ] = None,
    public_key: Annotated[Path | None, typer.Option(help="PEM file of the key that signs; this project's own.")] = None,
    commands: Annotated[
        bool, typer.Option(help="Also do small commands for the command line here, in a process beside it (600 MB).")
    ] = True,
) -> None:
    """Serve pictures with everything that is live: token in FADE_SERVICE_TOKEN, page at /; small commands are quick."""
    from contextlib import nullcontext

    import uvicorn

    from fade.adapters.runtime import Runtime
    from fade.models.family import load_base
    from fade.signing import key_id, verifying_key
    from fade.signing import public_key as load_key
    from flows.releasing import released
    from flows.releasing.manifests import open_release
    from flows.releasing.released import KEYS
    from flows.services.commands import answering
    from flows.services.runtime_http import make_app, service_token

    token = service_token()
    place = chosen(project).at(base=base).base
    loaded = load_base(place)
    folder = release_folder or open_release(place, loaded.sha256)
    if release_folder and (own := release_folder / released.release_folder(loaded.sha256).name).is_dir():
        folder = own
    key = load_key(public_key) if public_key else verifying_key(KEYS)
    app_ = make_app(Runtime(loaded, folder, public_key=key), token=token, compare=compare)
    console.print(
        styled(
            f"http://{host}:{port}/  release {folder}, key {key_id(key)}",
            ("  with the base's pictures" * compare, "bold"),
        )
    )
    with answering() if commands else nullcontext():
        uvicorn.run(app_, host=host, port=port, log_config=None, access_log=False)


@app.command()
@guarded
def rebase(
    base: Annotated[str, typer.Argument(help="The new base model.")],
    project: ProjectOption = None,
    json_file: JsonOption = None,
) -> None:
    """Make every live erasure of a project again on a new base; lists what fails its gate there, approves nothing."""
    from flows.prefect_beside import prefect_beside

    prefect_beside()
    from flows.erasing.rebase import rebase as run_again

    found = run_again(chosen(project), base, console.print)
    table = Table("live", "on the new base", "gate", "UA", "IRA", "CRA")
    for one in found:
        if one.new is None:
            table.add_row(one.old, styled((one.reason, "red")), "", "", "", "")
        else:
            rates = [rated(value) for value in (one.new.ua, one.new.ira, one.new.cra)]
            table.add_row(one.old, f"{one.new.model}/{one.new.version}", one.new.gate, *rates)
    console.print(table)
    failed = [one.old for one in found if not one.passed]
    write_figures(json_file, {"rebased": [{**asdict(one), "passed": one.passed} for one in found], "failed": failed})
    if failed:
        console.print(styled(("Do not switch yet", "bold red"), f": {len(failed)} of {len(found)} did not pass."))
        raise typer.Exit(1)


def named(name: str) -> AdapterVersion:
    """The adapter ``id`` or ``id:version``."""
    from tasks.mlflow import tracking

    model, _, number = name.partition(":")
    if number and not number.isdigit():
        raise ConfigError(f"{name!r} is no adapter: expected an id, or id:version with a number.")
    return tracking.find_version(model, int(number) if number else None)


def _print_changes(changes: list[Change]) -> None:
    for one in changes:
        table = [
            *(("live", "green", name, "") for name in one.added),
            *(("out", "", name, "") for name in one.removed),
            *(("refused", "red", name, reason) for name, reason in one.refused.items()),
            *(("waiting", "yellow", name, reason) for name, reason in one.waiting.items()),
            *(("live all the same", "yellow", name, reason) for name, reason in one.kept.items()),
        ]
        for what, style, name, reason in table:
            console.print(styled((what, style), f" {name}", f": {reason}" if reason else ""), soft_wrap=True)
        if not one.counter:
            continue
        console.print(
            f"Release {one.counter} of base {one.base_sha256[:12]}: {', '.join(one.live) or 'the base alone'}"
        )
