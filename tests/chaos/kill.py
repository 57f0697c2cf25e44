"""Kill the worker at random moments of erasures, start it again, and count what was lost, doubled or stuck.

    python tests/chaos/kill.py --kills 200 --json kill.json

writes ``kills``, ``lost``, ``doubled`` and ``stuck`` (each of the last three has to be 0), and where the kills fell.
The worker is a real process with a tiny base, killed by SIGKILL: in turn from outside at a random moment, and
exactly at a boundary of a task, those first where fewest died so far. Now and then two workers run at once.

The counting asks the ledger, MLflow and the file system, never the worker: *lost* is a request that is gone from
the ledger or ended without a whole adapter; *doubled* one whose erasure has more than one version in MLflow, or
that reached ``candidate`` more than once; *stuck* one that is in no final state when a worker that nobody
kills has emptied the queue.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)

from fade.files import read_json, sha256_file, write_json
from fade.requests.ledger import Ledger
from fade.requests.messages import make_message
from fade.requests.records import utc_now
from fade.requests.states import State
from tests.chaos.worker import BOUNDARIES, Nursery, kill, make_project, prefect_server
from tests.servers import free_port
from tests.tiny import PROJECT

OBJECTS = ("cat", "horse", "rocket", "coffee", "coins", "flower", "temple", "retina", "motorcycle")
DUE = [State.SCHEDULED, State.RUNNING]
LEASE_SECONDS = 3.0
PACE = {"LEASE_SECONDS": LEASE_SECONDS, "ATTEMPTS": 100_000, "RETRY_SECONDS": 0.5, "RUNNING": 2}


def submit(ledger: Ledger, draw: random.Random, number: int) -> str:
    """A request for a pair of concept and surrogate that was not asked for before, as long as there are any."""
    name = str(uuid.UUID(int=draw.getrandbits(128), version=4))
    concept = OBJECTS[number % len(OBJECTS)]
    surrogate = OBJECTS[(number + 1 + number // len(OBJECTS)) % len(OBJECTS)]
    if surrogate == concept:
        surrogate = "nothing"
    ledger.submit(make_message(id=name, kind="object", concept=concept, surrogate=surrogate), PROJECT, actor="chaos")
    return name


def step_now(ledger: Ledger, process: BaseProcess) -> str | None:
    """What a worker is at by the ledger's word; None if it holds no request."""
    mine = (one for one in ledger.find(states=[State.RUNNING]) if f":{process.pid}:" in str(one.worker))
    return next((str(one.step or "request") for one in mine), None)


def wait_for_a_lease(ledger: Ledger) -> None:
    """Until something is due that no dead worker holds any more."""
    while True:
        found = ledger.find(states=DUE)
        times = [one.lease_until if one.state is State.RUNNING else one.not_before for one in found]
        if not found or any(time is None or time <= utc_now() for time in times):
            return
        time.sleep(0.1)


def random_moment(ledger: Ledger, draw: random.Random, workers: list[BaseProcess], longest: float) -> list[str]:
    """Kill from outside, some time after the first worker has a request; gives the steps the kills fell into."""
    while workers[0].is_alive() and step_now(ledger, workers[0]) is None:
        time.sleep(0.03)
    workers[0].join(draw.uniform(0, longest))
    fell = []
    for worker in workers:
        step = step_now(ledger, worker) or "between requests"
        if worker.is_alive():
            kill(worker)
            fell.append(f"in {step}")
        worker.join()
    return fell


def at_boundary(where: Counter[str], nursery: Nursery) -> list[str]:
    """A worker that dies at the first boundary it comes to of those where fewest died; gives where."""
    least = min(where[one] for one in BOUNDARIES)
    worker = nursery.worker(frozenset(one for one in BOUNDARIES if where[one] == least))
    worker.join()
    if worker.exitcode != -signal.SIGKILL:
        return []
    (mark,) = nursery.folder.glob("died-*")
    mark.unlink()
    return [mark.name.removeprefix("died-")]


def run(kills: int, seed: int, folder: Path, *, at_once: int, longest: float, minutes: float) -> dict[str, Any]:
    """Kill ``kills`` times, or for so many minutes, let the rest finish, count."""
    make_project(folder)
    os.environ |= {f"FADE_DRAIN_{name}": str(value) for name, value in PACE.items()}
    draw, begun = random.Random(seed), time.monotonic()
    names: list[str] = []
    where: Counter[str] = Counter()
    port = free_port()
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
    nursery = Nursery(folder)
    with Ledger() as ledger, prefect_server(folder, port):
        while where.total() < kills and time.monotonic() - begun < 60 * minutes:
            if not ledger.find(states=DUE):
                names += [submit(ledger, draw, len(names) + i) for i in range(at_once)]
            wait_for_a_lease(ledger)
            if draw.random() < 0.5:
                where.update(at_boundary(where, nursery))
            else:
                workers = [nursery.worker() for _ in range(2 if draw.random() < 0.25 else 1)]
                where.update(random_moment(ledger, draw, workers, longest))
            print(f"{where.total()} kills, {len(names)} requests, {time.monotonic() - begun:.0f} s", flush=True)
        for _ in range(10 + 2 * len(names)):
            if not ledger.find(states=DUE):
                break
            wait_for_a_lease(ledger)
            nursery.worker().join()
        found = count(ledger, names, folder)
    return {"kills": where.total(), "requests": len(names), **found, "where": dict(sorted(where.items()))}


def count(ledger: Ledger, names: list[str], folder: Path) -> dict[str, Any]:
    """What the ledger, MLflow and the file system say of the requests."""
    ledger.verify()
    from mlflow import MlflowClient

    uri = f"sqlite:///{folder / '.fade/mlflow.db'}"
    client = MlflowClient(uri, uri)
    found = {record.id: record for record in ledger.find(limit=100_000)}
    lost, doubled, stuck = set(names) - set(found), set(), set()
    for name in set(names) & set(found):
        record = found[name]
        if record.state not in (State.CANDIDATE, State.REJECTED):
            print(f"stuck: {name} is {record.state}: {record.reason}")
            stuck.add(name)
            continue
        reached = [entry for entry in ledger.history(request_id=name, limit=100_000) if entry.after == record.state]
        adapter = folder / "data/erasures" / str(record.erasure_id) / "adapter"
        model = f"erasure-{record.erasure_id}"
        registered = [
            version.tags["adapter_sha256"]
            for version in client.search_model_versions(f"name = '{model}'")
            if "drift" in version.tags  # a version without figures is one whose registration was cut off: never shown
        ]
        if len(registered) > 1 or len(reached) > 1:
            print(f"doubled: {name} of {model} has {len(registered)} versions, and ended {len(reached)} times")
            doubled.add(name)
        card = read_json(adapter / "card.json")
        weights = sha256_file(adapter / "pytorch_lora_weights.safetensors")
        if set(registered) != {card["adapter_sha256"]} or weights not in registered:
            print(f"lost: {name} of {model} has {registered}, its folder {weights}")
            lost.add(name)
        if record.state is State.CANDIDATE and "candidate" not in client.get_registered_model(model).aliases:
            print(f"lost: {name} of {model} is not on offer")
            lost.add(name)
    return {"lost": len(lost), "doubled": len(doubled), "stuck": len(stuck)}


def main() -> None:
    """Kill, count, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=2, help="requests that are open at a time")
    parser.add_argument("--longest", type=float, default=15.0, help="seconds of running before a kill, at most")
    parser.add_argument("--minutes", type=float, default=600.0, help="stop killing after so long, then count")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    out = arguments.json.resolve() if arguments.json else None
    folder = Path(tempfile.mkdtemp(prefix="kill-"))
    try:
        found = run(
            arguments.kills,
            arguments.seed,
            folder / "project",
            at_once=arguments.at_once,
            longest=arguments.longest,
            minutes=arguments.minutes,
        )
    except BaseException:
        print(f"kept for a look: {folder}", file=sys.stderr)
        raise
    print(found)
    if out:
        write_json(out, found)
    os.chdir(ROOT)
    bad = found["lost"] + found["doubled"] + found["stuck"]
    if bad:
        print(f"kept for a look: {folder}")
    else:
        shutil.rmtree(folder)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
