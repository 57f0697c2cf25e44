"""How fast requests come in, what the drain adds to each, and how long `fade status` takes with very many.

    python benchmarks/intake.py --json benchmarks/results/requests.json

On SQLite and on the PostgreSQL of FADE_TEST_POSTGRESQL, each in a database of its own that is removed. Every
figure is wall time and, beside it, this process' processor time: on a busy machine the two differ, and with
PostgreSQL the server's own work is in the first alone. `intake` is the whole way of a message: a file of the
folder queue is read, checked, committed (200 a transaction), acknowledged. `drain` is what surrounds one
erasure that takes no time: lease, sign of life, check, outcome; Prefect's own cost of a flow is not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import sqlalchemy as sa

from fade.files import write_json
from fade.lineage import git_state, library_versions
from fade.project import Projects, load_project
from fade.requests import leases, tables
from fade.requests.intake import Folder, take_in
from fade.requests.ledger import Ledger
from fade.requests.messages import make_message
from fade.requests.overview import overview
from fade.requests.records import deadline, utc_now
from fade.requests.states import State
from tests.databases import database

BATCH = 200
PROJECT = load_project()


def timed(work: Callable[[], Any]) -> dict[str, float]:
    """Wall and processor seconds of a call."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return {"seconds": time.perf_counter() - wall, "processor_seconds": time.process_time() - processor}


def per_second(count: int, spent: dict[str, float]) -> dict[str, float]:
    """Rates of so many."""
    return {
        "requests": count,
        "per_second": round(count / spent["seconds"], 1),
        "per_processor_second": round(count / spent["processor_seconds"], 1),
    }


def intake(ledger: Ledger, folder: Path, count: int) -> dict[str, float]:
    """Messages from a folder into the ledger."""
    queue = Folder(folder / "queue")
    for i in range(count):
        body = {"id": str(uuid.uuid4()), "kind": "object", "concept": f"concept {i}", "aliases": ["one", "two"]}
        (queue.folder / f"{i:08d}.json").write_text(json.dumps(body))

    def work() -> None:
        while take_in(ledger, queue, Projects((PROJECT,)), limit=BATCH, seconds=0).total:
            pass

    return per_second(count, timed(work))


def drained(ledger: Ledger, count: int) -> dict[str, float]:
    """What the drain does around an erasure, in milliseconds a request."""

    def work() -> None:
        for _ in range(count):
            lease = leases.take(ledger, "benchmark", seconds=60)
            assert lease is not None
            leases.renew(ledger, lease, seconds=60, step="mask", erasure_id="e0")
            leases.check(ledger, lease.request.id, lease.fence)
            leases.finish(ledger, lease, State.CANDIDATE, reason="the gate passed", erasure_id="e0")

    spent = timed(work)
    return {f"{name.replace('seconds', 'ms')}_each": round(1000 * s / count, 2) for name, s in spent.items()}


def fill(ledger: Ledger, count: int) -> None:
    """Rows as years of use leave them: one in ten open; without their log, which status does not read."""
    now = utc_now()
    with ledger.writing() as connection:
        for start in range(0, count, 5000):
            rows = []
            for i in range(start, min(start + 5000, count)):
                message = make_message(id=str(uuid.uuid4()), kind="object", concept=f"concept {i}")
                received = now - timedelta(minutes=i % 40_000)
                rows.append(
                    {
                        **message.model_dump(mode="json", exclude={"version", "received_at"}),
                        "project": PROJECT.name,
                        "base": PROJECT.base,
                        "body_sha256": "0" * 64,
                        "concept_key": f"{i:064d}",
                        "received_at": received,
                        "due_at": deadline(received, message.regulation),
                        "extended": False,
                        "state": State.SCHEDULED if i % 10 == 0 else State.LIVE,
                        "state_at": now,
                        "attempts": 0,
                        "fence": 0,
                    }
                )
            connection.execute(sa.insert(tables.requests), rows)


def status(ledger: Ledger, url: str, count: int) -> dict[str, Any]:
    """The query alone, best and worst of five, and the whole command with its start."""
    fill(ledger, count)
    looks = [timed(lambda: overview(ledger, limit=20)) for _ in range(5)]
    command = [sys.executable, "-m", "flows.cli.app", "status"]
    environment = {**os.environ, "FADE_LEDGER_URL": url, "FADE_ROOT": str(ROOT), "PYTHONPATH": str(ROOT)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    whole = timed(lambda: subprocess.run(command, env=environment, check=True, capture_output=True))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "requests": count,
        "query_seconds": {name: round(call(one["seconds"] for one in looks), 4) for name, call in _ENDS.items()},
        "query_processor_seconds": round(min(one["processor_seconds"] for one in looks), 4),
        "command_seconds": round(whole["seconds"], 2),
        "command_processor_seconds": round(spent, 2),
    }


_ENDS: dict[str, Any] = {"best": min, "worst": max}


def main() -> None:
    """Measure both databases, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5000, help="messages of the intake")
    parser.add_argument("--drained", type=int, default=200, help="requests of the drain")
    parser.add_argument("--status", type=int, default=100_000, help="requests in the ledger that status looks at")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    for kind in ("sqlite", "postgresql"):
        with tempfile.TemporaryDirectory() as place, database(kind, Path(place)) as url, Ledger(url) as ledger:
            load = os.getloadavg()[0]
            found[kind] = {
                "intake": intake(ledger, Path(place), arguments.requests),
                "drain": drained(ledger, arguments.drained),
                "status": status(ledger, url, arguments.status),
                "load_average": [round(load, 1), round(os.getloadavg()[0], 1)],
            }
        print(kind, json.dumps(found[kind], indent=2))
    busiest = max(load for one in found.values() for load in one["load_average"])
    found["remark"] = (
        f"Load average up to {busiest} on {os.cpu_count()} cores: "
        + ("other programs took most of the processor, so wall times say little of the program itself."
           if busiest > 2 * (os.cpu_count() or 1) else "the machine was at this program's service.")
    )  # fmt: skip
    if arguments.json:
        made_on = {"git": git_state(), "libraries": library_versions(), "cores": os.cpu_count()}
        write_json(arguments.json, {**found, "batch": BATCH, "made_on": made_on})


if __name__ == "__main__":
    main()
