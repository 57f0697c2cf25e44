"""Take a service away in the middle of an erasure: what state it leaves, and that the erasure goes on when it is back.

    python tests/chaos/outages.py --json outages.json

One request, and on its way: the disk under data/erasures full (a tmpfs; needs root), PostgreSQL (the ledger; a
private one) restarted, the Prefect server killed, MLflow away at the registration. After each, the request's
state and reason as the ledger has them; in the end it must be a candidate, once, and the chain must hold.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)

from fade.errors import RegistryError
from fade.files import write_json
from fade.requests.ledger import Ledger
from fade.requests.messages import make_message
from fade.requests.records import Record
from fade.requests.states import State
from tests.chaos.worker import STEPS, Nursery, make_project, prefect_server, wait_for
from tests.databases import Cluster, cluster
from tests.servers import free_port
from tests.tiny import PROJECT

PACE = {"LEASE_SECONDS": 20.0, "ATTEMPTS": 1000, "RETRY_SECONDS": 1.0}
PATIENCE = 900.0
ON_ITS_WAY = ("request", *STEPS, "register")


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of 128 KiB there."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[None]:
    """An MLflow server that answers, with the project's store."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / '.fade/mlflow.db'}", "--no-serve-artifacts"]
    command += ["--default-artifact-root", (folder / ".fade/mlartifacts").as_uri()]
    from flows.services.local import stop

    with (folder / ".fade/mlflow.log").open("ab") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, PATIENCE)
        yield
    finally:
        stop(server)


def look(ledger: Ledger, name: str) -> Record | None:
    """The request; None while the ledger is away."""
    try:
        return ledger.get(name)
    except RegistryError:
        return None


def until_step(ledger: Ledger, name: str, worker: BaseProcess, step: str) -> str:
    """Wait until the erasure has come to a step; gives the one it is at."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and worker.is_alive():
        record = look(ledger, name)
        if record and record.step and ON_ITS_WAY.index(record.step) >= ON_ITS_WAY.index(step):
            return record.step
        time.sleep(0.1)
    sys.exit(f"the worker did not come to {step}: {look(ledger, name)}")


def after(ledger: Ledger, name: str, worker: BaseProcess) -> dict[str, Any]:
    """What an outage left, once its worker is gone."""
    worker.join(PATIENCE)
    record = ledger.get(name)
    found = {"state": str(record.state), "reason": record.reason, "worker_exit": worker.exitcode}
    print(found, flush=True)
    return found


def wait_for_turn(ledger: Ledger, name: str) -> None:
    """Until the request may be taken: its retry is due, or its dead worker's lease has ended."""
    record = ledger.get(name)
    turn = record.lease_until if record.state is State.RUNNING else record.not_before
    if turn is not None:
        time.sleep(max(0.0, turn.timestamp() - time.time()) + 0.1)


def run(folder: Path) -> dict[str, Any]:
    """All outages on one erasure's way."""
    make_project(folder)
    os.environ |= {f"FADE_DRAIN_{name}": str(value) for name, value in PACE.items()}
    prefect, mlflow, found = free_port(), free_port(), {}
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{prefect}/api"
    os.environ["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{mlflow}"
    with ExitStack() as stack:
        database: Cluster = stack.enter_context(cluster(free_port()))
        os.environ["FADE_LEDGER_URL"] = database.url
        ledger = stack.enter_context(Ledger())
        name = str(uuid.uuid4())
        ledger.submit(make_message(id=name, kind="object", concept="cat", surrogate="horse"), PROJECT, actor="chaos")
        nursery = Nursery(folder)
        with prefect_server(folder, prefect):
            with small_disk(folder / "data/erasures"):
                found["disk"] = after(ledger, name, nursery.worker())
            wait_for_turn(ledger, name)
            worker = nursery.worker()
            at = until_step(ledger, name, worker, "split")
            database.stop()
            time.sleep(3)
            database.start()
            found["postgresql"] = {"at": at, "then_at": until_step(ledger, name, worker, "saliency")}
            at = until_step(ledger, name, worker, "mask")
        found["prefect"] = {"at": at, **after(ledger, name, worker)}  # its server is gone with the block
        with prefect_server(folder, prefect):
            wait_for_turn(ledger, name)
            found["mlflow"] = after(ledger, name, nursery.worker())
            with mlflow_server(folder, mlflow):
                wait_for_turn(ledger, name)
                found["end"] = after(ledger, name, nursery.worker())
                found["end"] |= registered(ledger.get(name))
        ledger.verify()
    return found


def registered(record: Record) -> dict[str, Any]:
    """What MLflow has of the request's erasure."""
    from tasks.mlflow import tracking

    versions = [one for one in tracking.versions() if one.erasure == record.erasure_id]
    return {"versions": len(versions), "on_offer": sum(one.offered for one in versions)}


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    out = arguments.json.resolve() if arguments.json else None
    folder = Path(tempfile.mkdtemp(prefix="outages-"))
    print(f"in {folder}", flush=True)
    found = run(folder / "project")
    if out:
        write_json(out, found)
    end = found["end"]
    sys.exit(0 if (end["state"], end["versions"], end["on_offer"]) == ("candidate", 1, 1) else 1)


if __name__ == "__main__":
    main()
