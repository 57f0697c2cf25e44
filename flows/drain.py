"""Flow ``drain``: runs what is due, one lease at a time, and writes each outcome into the ledger."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from prefect import flow

from fade import logs
from fade.config import load_settings
from fade.environment import environment
from fade.errors import ConfigError, DataError, FadeError, LeaseLostError, LineageError, RegistryError, ResourceError
from fade.files import read_json, read_yaml
from fade.requests import leases
from fade.requests.leases import Lease
from fade.requests.ledger import Ledger, Record, utc_now
from fade.requests.states import State
from fade.steps.catalog import ensure_catalog
from fade.steps.request import CATALOG, prepare_request
from flows.erase import erase, prepare_folder

logger = logging.getLogger(__name__)
STEPS = ("split", "validate", "saliency", "mask", "distill", "evaluate")
_PASSING = (RegistryError, ResourceError, LineageError)
"""Refusals that may pass: a service that is down, a full disk, a lock."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How requests are run; `pace` reads it from FADE_DRAIN_* in the environment.

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


def pace() -> Pace:
    """The pace in force: defaults, unless a variable says otherwise."""
    found = environment()
    return Pace(found.drain_lease_seconds, found.drain_attempts, found.drain_retry_seconds, found.drain_running)


@flow(name="drain")
def drain(limit: int | None = None) -> dict[str, int]:
    """Run due requests until none is left or ``limit`` have run; gives how many ended in each state.

    Several drains may run at once: a lease makes a request one worker's. One that dies is taken over when its
    lease ends, and its erasure goes on from the last finished step.
    """
    logs.set_up("drain")  # a schedule runs this in a process of its own
    ended: dict[str, int] = {}
    worker = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:6]}"
    steady = pace()
    with Ledger() as ledger:
        while limit is None or sum(ended.values()) < limit:
            lease = leases.take(
                ledger,
                worker,
                seconds=steady.lease_seconds,
                running_limit=steady.running,
                attempts_limit=steady.attempts,
            )
            if lease is None:
                break
            state = run_one(ledger, lease, steady)
            ended[state] = ended.get(state, 0) + 1
    return ended


def run_one(ledger: Ledger, lease: Lease, steady: Pace) -> str:
    """One request to its outcome; gives the state it is in, or ``lost`` if it is no longer this worker's."""
    place: list[Path] = []
    with (
        logs.about(lease.request.id),
        alive(ledger, lease, steady.lease_seconds, lambda: step_of(place[0]) if place else "request"),
    ):
        try:
            outcome = _erase(lease.request, place)
        except LeaseLostError:
            raise
        except Exception as error:  # the process boundary of an erasure: the ledger keeps what it was
            outcome = _failure(lease.request, error, steady)
    return _finish(ledger, lease, outcome, steady)


def _erase(record: Record, place: list[Path]) -> dict[str, Any]:
    if record.concept is None:
        raise DataError("The request names no concept. Give one: fade request release ID --concept NAME.")
    ensure_catalog(Path(CATALOG))
    request = prepare_request(
        record.concept,
        record.surrogate or "auto",
        settings=load_settings(Path("params.yaml")),
        base=record.base,
        image_ids=record.pictures,
        subjects=[record.subject] if record.subject else [],
    )
    place.append(prepare_folder(request))
    version = erase(request.id)
    metrics = read_json(place[0] / "evaluation" / "metrics.json")
    passed = version.gate == "passed"
    return {
        "after": State.CANDIDATE if passed else State.REJECTED,
        "reason": "the gate passed" if passed else "the gate failed: " + "; ".join(metrics["gate"]["reasons"]),
        "erasure_id": request.id,
        "details": {"adapter_sha256": version.adapter_sha256, "version": version.version},
    }


def _failure(record: Record, error: Exception, steady: Pace) -> dict[str, Any]:
    """Ask a person about what is wrong with the request; repeat what may pass; give up in the end."""
    said = str(error) if isinstance(error, FadeError) else f"{type(error).__name__}: {error}"
    said = said[:1000]
    if isinstance(error, ConfigError | DataError):
        return {"after": State.NEEDS_INPUT, "reason": said}
    if isinstance(error, FadeError) and not isinstance(error, _PASSING):
        return {"after": State.FAILED, "reason": said}
    if record.attempts >= steady.attempts:
        return {"after": State.FAILED, "reason": f"given up after {record.attempts} attempts: {said}"}
    wait = min(steady.retry_seconds * 2 ** (record.attempts - 1), 3600)
    return {"after": State.SCHEDULED, "reason": said, "retry_at": utc_now() + timedelta(seconds=wait)}


def _finish(ledger: Ledger, lease: Lease, outcome: dict[str, Any], steady: Pace) -> str:
    """Write the outcome; a ledger that is down is waited for, as long as the lease lasts."""
    deadline = time.monotonic() + steady.lease_seconds
    while True:
        try:
            leases.finish(ledger, lease, **outcome)
            return str(outcome["after"])
        except LeaseLostError as error:
            logger.warning("%s", error)
            return "lost"
        except RegistryError:
            if time.monotonic() > deadline:
                raise  # whoever takes over finds the work done
            time.sleep(1)


@contextmanager
def alive(ledger: Ledger, lease: Lease, seconds: float, step: Callable[[], str]) -> Iterator[None]:
    """Renew the lease in the background until the block ends."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(seconds / 4):
            try:
                leases.renew(ledger, lease, seconds=seconds, step=step())
            except LeaseLostError:
                return  # the outcome will be refused; the work itself is kept and is whoever's next
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
    """The step an erasure is at: the first that DVC has not recorded."""
    if not (folder / "dvc.lock").is_file():
        return STEPS[0]
    done = read_yaml(folder / "dvc.lock").get("stages", {})
    return next((name for name in STEPS if name not in done), "register")
