"""Flow ``erase``: from a request to a registered, reversible adapter."""

from __future__ import annotations

import logging
import math
from pathlib import Path

from prefect import flow

from fade.config import Request, load_request, save_request
from fade.errors import ConfigError, nearest
from fade.models.source import base_sha256
from fade.steps.request import check_disk
from tasks import _tracking, erasure
from tasks._tracking import AdapterVersion
from tasks._versioning import write_pipeline

ERASURES = Path("data/erasures")
logger = logging.getLogger(__name__)


def prepare_folder(request: Request) -> Path:
    """The erasure's folder with its request and pipeline; one that is there is kept as it is."""
    folder = ERASURES / request.id
    if (folder / "request.yaml").is_file() and load_request(folder) != request:
        raise ConfigError(f"{folder} holds another request under the same id. Remove that folder.")
    save_request(request, folder)
    places = {"catalog": request.catalog, "base": request.base, "judges": request.judges}
    write_pipeline(folder, places, foreign=request.imported is not None, data_free=request.data_free)
    return folder


def find_folder(name: str) -> Path:
    """The folder of a finished erasure by its id.

    Raises:
        ConfigError: there is none, or it has not been judged yet.
    """
    folder = ERASURES / name.removeprefix(_tracking.MODEL_PREFIX)
    if not (folder / "request.yaml").is_file():
        known = [path.parent.name for path in ERASURES.glob("*/request.yaml")]
        raise ConfigError(f"No erasure {name!r} on this machine. {nearest(name, known)}")
    if not (folder / "evaluation" / "metrics.json").is_file():
        raise ConfigError(f"The erasure {name} has not ended: {folder}/evaluation is missing. Run it again.")
    return folder


def steps_for(concepts: int, steps: int) -> int:
    """Distillation steps for several concepts in one adapter: as the root of their number   (ours)."""
    return math.ceil(steps * math.sqrt(concepts))


@flow(name="erase", flow_run_name="erase-{erasure_id}")
def erase(erasure_id: str) -> AdapterVersion:
    """Run the steps of a prepared erasure in order; those that DVC calls current are not run again.

    Raises:
        FadeError: with the reason, before any training where it can be known before.
    """
    folder = ERASURES / erasure_id
    request = load_request(folder)
    if (found := base_sha256(Path(request.base))) != request.base_sha256:
        raise ConfigError(
            f"The base in {request.base} is not the one this erasure was asked for: its hash is {found[:12]}, "
            f"expected {request.base_sha256[:12]}. Restore that base, or make a new request."
        )
    check_disk(Path())
    if request.data_free:
        erasure.generate(folder)
    erasure.split(folder)
    erasure.validate(folder)
    if request.imported is None:
        erasure.saliency(folder)
        erasure.mask(folder)
        erasure.distill(folder)
    else:
        erasure.foreign(folder)
    erasure.evaluate(folder)
    return erasure.register(folder)
