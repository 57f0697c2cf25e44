"""Flow ``erase``: from a request to a registered, reversible adapter."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from prefect import flow

from fade.asking.checks import check_disk, gate_without_power
from fade.asking.prepare import Wanted, asked_again
from fade.config import DistillSettings
from fade.errors import ConfigError, RegistryError, ResourceError, listing, nearest
from fade.models.source import base_sha256
from fade.pipeline import steps_of
from fade.requests import leases
from fade.requests.ledger import Ledger
from fade.spec import Spec, load_spec, save_spec
from flows.prefect_beside import beside_is_up
from flows.settings import ERASURES
from tasks import erasure
from tasks.dvc.versioning import write_pipeline
from tasks.mlflow import registration, tracking
from tasks.mlflow.tracking import AdapterVersion

WAIT_SECONDS = 600.0
"""How long an erasure waits for another process that is at work on the same one."""
MOST_BATCHES = 4
"""Batches of one erasure that a step of an adapter for several concepts has at most."""
logger = logging.getLogger(__name__)


def prepare_folder(spec: Spec) -> Path:
    """The erasure's folder with its spec and pipeline; one that is there is kept as it is."""
    folder = ERASURES / spec.id
    if (folder / "spec.yaml").is_file() and load_spec(folder) != spec:
        raise ConfigError(f"{folder} holds another spec under the same id. Remove that folder.")
    save_spec(spec, folder)
    write_pipeline(folder, spec)
    return folder


def find_folder(name: str) -> Path:
    """The folder of a finished erasure by its id.

    Raises:
        ConfigError: there is none, or it has not been judged yet.
    """
    folder = ERASURES / name.removeprefix(tracking.MODEL_PREFIX)
    if not (folder / "spec.yaml").is_file():
        known = [path.parent.name for path in ERASURES.glob("*/spec.yaml")]
        raise ConfigError(f"No erasure {name!r} on this machine. {nearest(name, known)}")
    if not (folder / "evaluation" / "metrics.json").is_file():
        raise ConfigError(f"The erasure {name} has not ended: {folder}/evaluation is missing. Run it again.")
    return folder


def for_several(settings: DistillSettings, concepts: int, *, steps: int | None = None) -> DistillSettings:
    """How several concepts are distilled into one adapter   (ours).

    The batch grows with their number, up to fourfold (that of ``deep`` is large already), so that each step sees most
    of them; the steps, where none are given, as the root of their number.
    """
    count = steps if steps is not None else math.ceil(settings.in_force.steps * math.sqrt(concepts))
    return settings.with_steps(count).model_copy(update={"batch": settings.batch * min(concepts, MOST_BATCHES)})


def asked_together(specs: Sequence[Spec]) -> tuple[list[Wanted], bool]:
    """All that several erasures asked, for one adapter: each concept with its names and pictures, and ``data_free``.

    Where no pictures of one are left the base draws them for all: an adapter learns from one kind of pictures.

    Raises:
        ConfigError: they differ in base, catalog or judges; or pictures are named of one and none are left of another.
    """
    for name in ("base", "base_sha256", "catalog", "judges"):
        if len({getattr(spec, name) for spec in specs}) > 1:
            raise ConfigError(f"These erasures differ in {name}: one adapter holds for one base, and is judged once.")
    pairs = [pair for spec in specs for pair in spec.pairs]
    data_free = any(spec.data_free for spec in specs)
    if data_free and any(pair.image_ids or pair.subjects or pair.overwrite for pair in pairs):
        raise ConfigError(
            "Of one of these erasures pictures are named, of another none are left (data-free): they cannot be learnt "
            "together. Keep them apart, or ask for both anew."
        )
    return [asked_again(pair) for pair in pairs], data_free


def erase(
    erasure_id: str, request_id: str | None = None, fence: int = 0, *, requests: Mapping[str, int] | None = None
) -> AdapterVersion:
    """Run the steps of a prepared erasure in order; those that DVC calls current are not run again.

    Args:
        request_id: the request it is run for, under the lease ``fence``: no step begins, and nothing is
            registered, once the request was withdrawn or is another worker's.
        requests: further ones, each with its fence, where it is run for several.

    Raises:
        FadeError: with the reason, before any training where it can be known before.
        LeaseLostError: the request is not this worker's any more; what is done is kept.
        ResourceError: another process has been at work on this erasure for ten minutes.
    """
    beside_is_up()
    try:
        return erase_flow(erasure_id, request_id, fence, dict(requests or {}))
    except erasure.KeptBackError as error:
        raise error.origin from None


@flow(name="erase", flow_run_name="erase-{erasure_id}")
def erase_flow(
    erasure_id: str, request_id: str | None = None, fence: int = 0, requests: dict[str, int] | None = None
) -> AdapterVersion:
    """The flow itself, as Prefect sees it: it is told of errors by their kind alone."""
    folder = ERASURES / erasure_id
    spec = load_spec(folder)
    if (found := base_sha256(Path(spec.base))) != spec.base_sha256:
        raise ConfigError(
            f"The base in {spec.base} is not the one this erasure was asked for: its hash is {found[:12]}, "
            f"expected {spec.base_sha256[:12]}. Restore that base, or make a new request."
        )
    check_disk(Path())
    registration.check_request(folder)
    for said in gate_without_power(spec):
        logger.warning("the gate of %s has no power: %s", erasure_id, said)
    wanted = {**({} if request_id is None else {request_id: fence}), **(requests or {})}
    with _alone(erasure_id):
        for step in steps_of(spec):
            _check_wanted(wanted)
            erasure.run_step(folder, step)
        _check_wanted(wanted)
        return erasure.register(folder)


@contextmanager
def _alone(erasure_id: str) -> Iterator[None]:
    """One process at a time in an erasure's folder: a worker that is late must not meet the one that took over."""
    try:
        with FileLock(f".fade/erase-{erasure_id}.lock", timeout=WAIT_SECONDS):
            yield
    except Timeout:
        raise ResourceError(
            f"Another process is at work on the erasure {erasure_id} and has not ended within {WAIT_SECONDS:.0f} s. "
            "Wait for it, or end it, and try again."
        ) from None


def _check_wanted(wanted: Mapping[str, int]) -> None:
    if not wanted:
        return
    try:
        with Ledger() as ledger:
            for request_id, fence in wanted.items():
                leases.check(ledger, request_id, fence)
    except RegistryError as error:
        # A ledger that is down does not say that a request was withdrawn: the outcome will be refused if so.
        which = listing(sorted(wanted))
        logger.warning("whether request %s is still wanted is not known: %s", which, error)
