"""Flow ``drain``: runs what is due, one lease at a time, and writes each outcome into the ledger."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from filelock import FileLock
from prefect import flow, serve
from prefect.runtime import deployment
from prefect.schedules import Cron
from prefect.types.entrypoint import EntrypointType

from fade import logs
from fade.asking.further import forget_too
from fade.asking.prepare import AUTO, prepare_spec
from fade.concepts import Concept
from fade.config import load_settings
from fade.data.catalog import load_concepts
from fade.environment import environment
from fade.errors import (
    ConfigError,
    DataError,
    FadeError,
    LeaseLostError,
    LineageError,
    RegistryError,
    ResourceError,
    nameless,
)
from fade.evaluation.measured import Evaluation
from fade.evaluation.records import load
from fade.files import read_yaml
from fade.pipeline import steps_of
from fade.project import Project, Projects, load_projects
from fade.requests import leases
from fade.requests.in_force import erased_among, settled_by, take_to_base, wanted_by_erasure
from fade.requests.leases import Lease
from fade.requests.ledger import Ledger
from fade.requests.records import Record
from fade.requests.states import State
from fade.spec import Spec, load_spec
from fade.steps.catalog import ensure_catalog
from fade.words import domain_of, vocabulary
from flows.erasing import by_name
from flows.erasing.erase import erase, prepare_folder
from flows.queue.deadlines import deadlines
from flows.queue.schedules import checked_cron, checked_zone, drop_missed
from flows.settings import ERASURES, STATE, quiet
from tasks.mlflow import tracking

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment

logger = logging.getLogger(__name__)
LOST = "lost"
"""What became of a run whose request was withdrawn, or taken over, before it ended."""
_PASSING = (RegistryError, ResourceError, LineageError)
"""Refusals that may pass: a service that is down, a full disk, a lock."""


@dataclass(frozen=True, slots=True)
class DrainSettings:
    """How requests are run; `drain_settings` reads it from FADE_DRAIN_* in the environment.

    Attributes:
        lease_seconds: without a sign of life for so long, a worker counts as dead.
        attempts: after so many a request is ``failed``.
        retry_seconds: before the second attempt; twice as long before each further one, an hour at most.
        running: erasures at once, over all workers.
    """

    lease_seconds: float = 120.0
    attempts: int = 5
    retry_seconds: float = 60.0
    running: int = 1


def drain_settings() -> DrainSettings:
    """The pace in force: defaults, unless a variable says otherwise."""
    found = environment()
    return DrainSettings(
        found.drain_lease_seconds, found.drain_attempts, found.drain_retry_seconds, found.drain_running
    )


@flow(name="drain")
def drain(limit: int | None = None, projects: list[Path] | None = None, together: bool = False) -> dict[str, int]:
    """Run due requests until none is left or ``limit`` have run; gives how many ended in each state.

    Args:
        projects: params.yaml of each project that is served; those of FADE_PROJECT if None. Requests for others wait.
        together: first all that are due become one adapter a project (``flows.queue.together``); what cannot is then
            run alone.

    Several drains may run at once: a lease makes a request one worker's. One that dies is taken over when its
    lease ends, and its erasure goes on from the last finished step.
    """
    logs.set_up("drain")  # a schedule runs this in a process of its own
    quiet()
    drop_missed()
    ended: dict[str, int] = {}
    worker = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:6]}"
    settings, served = drain_settings(), load_projects(projects or environment().projects)
    with Ledger() as ledger:
        withdraw_cancelled(ledger)
        if together:
            from flows.queue.together import drain_together

            ended = drain_together(ledger, worker, served, settings, limit=limit)
        while limit is None or sum(ended.values()) < limit:
            lease = leases.take(
                ledger,
                worker,
                seconds=settings.lease_seconds,
                projects=served.names,
                running_limit=settings.running,
                attempts_limit=settings.attempts,
            )
            if lease is None:
                break
            state = run_one(ledger, lease, served, settings)
            ended[state] = ended.get(state, 0) + 1
            if state == LOST:
                withdraw_cancelled(ledger)
    if ended and deployment.id is not None and environment().log_format == "plain":
        # Of a schedule nobody else says it.
        sys.stdout.write(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC: {counted(ended)}\n")
    return ended


def counted(ended: Mapping[str, int]) -> str:
    """How many requests ended in each state, in words."""
    return ", ".join(f"{count} {state}" for state, count in sorted(ended.items()))


def serve_schedule(cron: str, timezone: str = "UTC", *, projects: Sequence[Path], together: bool = False) -> None:
    """Serve the drain on a schedule, and the flow ``deadlines`` every hour, until the program is ended.

    Args:
        projects: params.yaml of each project that is served.
        together: as ``drain`` takes it.
        cron: when the drain runs, as the clocks of ``timezone`` show it, also across changes of summer time.

    Prefect's own limit on a deployment is not used: what a killed run held of it would stay taken. Two
    drains at once are correct, and the ledger counts what runs.

    Raises:
        ConfigError: it is no cron line, or no time zone.
    """
    schedule = Cron(checked_cron(cron), timezone=checked_zone(timezone))
    parameters: dict[str, Any] = {"projects": [str(path) for path in projects], "together": together}
    by_module: Any = {"entrypoint_type": EntrypointType.MODULE_PATH}
    # Outside of an event loop both are deployments, never coroutines.
    serve(
        cast(
            "RunnerDeployment", drain.to_deployment(name="drain", schedule=schedule, parameters=parameters, **by_module)
        ),
        cast("RunnerDeployment", deadlines.to_deployment(name="deadlines", cron="0 * * * *", **by_module)),
        limit=3,
        print_starting_message=False,  # it names commands of Prefect's that nobody needs here
    )


def withdraw_cancelled(ledger: Ledger) -> list[str]:
    """Take off offer what was made for cancelled requests alone; gives the erasures.

    It asks MLflow what is on offer and not the log what was done, so it holds whenever the request was
    withdrawn and whichever worker died meanwhile. An MLflow that is down is asked by the next drain.
    """
    try:
        offered = {version.erasure: version for version in tracking.versions() if version.offered}
        wanted = wanted_by_erasure(ledger, list(offered))
        gone = [version for erasure, version in offered.items() if wanted.get(erasure) is False]
        for version in gone:
            tracking.withdraw(version, "every request for it was cancelled")
            ledger.append("withdrawn", actor="drain", erasure_id=version.erasure, details={"version": version.version})
    except RegistryError as error:
        logger.warning("what cancelled requests left on offer was not looked for: %s", error)
        return []
    return [version.erasure for version in gone]


def run_one(ledger: Ledger, lease: Lease, projects: Projects, settings: DrainSettings) -> str:
    """One request to its outcome; gives the state it is in, or ``lost`` if it is no longer this worker's."""
    place: list[Path] = []

    def sign() -> None:
        step, name = (step_of(place[0]), place[0].name) if place else ("request", None)
        leases.renew(ledger, lease, seconds=settings.lease_seconds, step=step, erasure_id=name)

    with logs.about(lease.request.id), alive(sign, settings.lease_seconds):
        try:
            outcome = _erase(ledger, lease, projects.chosen(lease.request.project), place, sign)
        except LeaseLostError as error:
            logger.warning("%s", error)
            return LOST
        except Exception as error:  # the process boundary of an erasure: the ledger keeps what it was
            outcome = failure(lease.request, error, settings)
    return finish(ledger, lease, outcome, settings)


def forgotten(ledger: Ledger, record: Record, concepts: Mapping[str, Concept]) -> list[str]:
    """Which of a catalog's concepts others' requests have erased, or made a candidate of, on the same base.

    None of them may be what another concept gives way to: two adapters would be trained against each other, and
    the surrogate's own erasure would come undone once both are live.
    """
    called = {name: one.name for one in concepts.values() for name in (one.name, *one.aliases)}
    return sorted({called[name] for name in erased_among(ledger, called, record.base, besides=record.id)})


def settle(record: Record, other: Record) -> dict[str, Any]:
    """What is left of a request whose concept another one's erasure keeps erased: its own pictures join those."""
    if record.pictures or record.subject:
        subjects = [record.subject] if record.subject else []
        count = forget_too(ERASURES / str(other.erasure_id), image_ids=record.pictures, subjects=subjects)
        said = f"; {count} of its own pictures were added to those of that erasure, and leave with its next purge"
    else:
        count, said = 0, ""
    return {
        "after": State.LIVE,
        "reason": f"erased by the erasure of request {other.id}, which is in force{said}",
        "erasure_id": other.erasure_id,
        "details": {"pictures": count},
    }


def _erase(
    ledger: Ledger, lease: Lease, project: Project, place: list[Path], sign: Callable[[], None]
) -> dict[str, Any]:
    record = lease.request
    concept = record.concept
    if concept is None:
        raise DataError("The request names no concept. Give one: fade request release ID --concept NAME.")
    if record.base != project.base:
        record = take_to_base(ledger, record, project.base, actor=lease.worker)
    if (other := settled_by(ledger, record)) is not None:
        return settle(record, other)
    spec = _asked(ledger, record, project, concept)
    place.append(prepare_folder(spec))
    sign()  # from here on the ledger knows what is made for the request
    version = erase(spec.id, record.id, lease.fence)
    gate = load(Evaluation, place[0] / "evaluation" / "metrics.json").gate
    said = {
        "passed": "the gate passed",
        "borderline": "the gate is borderline: ",
        "unjudged": "the erasure is unjudged: ",
    }.get(version.gate, "the gate failed: ")
    return {
        # What is borderline or unjudged waits for a person, who approves it with a reason or leaves it out.
        "after": State.REJECTED if version.gate == "failed" else State.CANDIDATE,
        "reason": said + "; ".join(gate.reasons),
        "logged": said.removesuffix(": "),  # the gate's reasons may name neighbours
        "erasure_id": spec.id,
        "details": {"adapter_sha256": version.adapter_sha256, "version": version.version},
    }


def _asked(ledger: Ledger, record: Record, project: Project, concept: str) -> Spec:
    """What a request asks of its project; where there is a CLIP and no catalog, by the concept's name alone.

    Raises:
        ConfigError, DataError: what a person has to put right.
    """
    surrogate, kind = record.surrogate or AUTO, None if record.kind == "pictures" else record.kind
    if project.by_name:
        if record.pictures or record.subject:
            raise DataError(
                f"The request names pictures or whose they are, and the project {project.name} has none: it erases by "
                "name alone. Build a catalog for it, or send the request without them."
            )
        words = {word.name: Concept(word.name, domain_of(word.kind), aliases=word.variants) for word in vocabulary()}
        spared = forgotten(ledger, record, words)
        return by_name.prepare(
            concept,
            project=project,
            changes={},
            surrogate=surrogate,
            kind=kind,
            aliases=record.aliases,
            protected=spared,
        ).spec
    with FileLock(STATE / "catalog.lock", timeout=600):  # two drains at their first use: one renders, the other waits
        ensure_catalog(project)
    return prepare_spec(
        concept,
        surrogate,
        project=project,
        settings=load_settings(project.params),
        protected=forgotten(ledger, record, load_concepts(Path(project.catalog))),
        aliases=record.aliases,
        kind=kind,
        image_ids=record.pictures,
        subjects=[record.subject] if record.subject else [],
    )


def failure(record: Record, error: Exception, settings: DrainSettings) -> dict[str, Any]:
    """Ask a person about what is wrong with the request; repeat what may pass; give up in the end."""
    said = str(error) if isinstance(error, FadeError) else f"{type(error).__name__}: {error}"
    # The log has the kind alone: an error's words suggest other names, and quote what was sent.
    outcome = {"reason": said[:1000], "logged": nameless(error)}
    if isinstance(error, ConfigError | DataError):
        return {"after": State.NEEDS_INPUT, **outcome}
    if isinstance(error, FadeError) and not isinstance(error, _PASSING):
        return {"after": State.FAILED, **outcome}
    if record.attempts >= settings.attempts:
        given_up = f"given up after {record.attempts} attempts: "
        return {"after": State.FAILED, **{name: given_up + words for name, words in outcome.items()}}
    wait = min(settings.retry_seconds * 2 ** (record.attempts - 1), 3600)
    return {"after": State.SCHEDULED, **outcome, "retry_seconds": wait}


def finish(ledger: Ledger, lease: Lease, outcome: dict[str, Any], settings: DrainSettings) -> str:
    """Write the outcome; a ledger that is down is waited for, as long as the lease lasts."""
    deadline = time.monotonic() + settings.lease_seconds
    while True:
        try:
            leases.finish(ledger, lease, **outcome)
            return str(outcome["after"])
        except LeaseLostError as error:
            logger.warning("%s", error)
            return LOST
        except RegistryError:
            if time.monotonic() > deadline:
                raise  # whoever takes over finds the work done
            time.sleep(1)


@contextmanager
def alive(sign: Callable[[], None], seconds: float) -> Iterator[None]:
    """Renew a lease of so many seconds in the background, by ``sign``, until the block ends."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(seconds / 4):
            try:
                sign()
            except LeaseLostError:
                return  # the next step does not begin, and the outcome is refused
            except RegistryError as error:
                logger.warning("the lease was not renewed: %s", error)

    thread = threading.Thread(target=beat, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def step_of(folder: Path) -> str:
    """The step an erasure is at: the first that DVC has not recorded; ``register`` after the last."""
    try:
        recorded = read_yaml(folder / "dvc.lock").get("stages") if (folder / "dvc.lock").is_file() else None
    except ConfigError:
        recorded = None  # a DVC that somebody runs by hand is just writing it, or was killed as it did
    return next((step.name for step in steps_of(load_spec(folder)) if step.name not in (recorded or {})), "register")
