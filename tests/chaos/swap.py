"""Swapping under load: adapters go live and are taken back in random order while requests are in flight.

    python tests/chaos/swap.py --adapters 100 --json swap.json

writes ``adapters``, ``releases``, ``pictures``, and four counts that have to be 0: ``mixed`` (sets of adapters that
gave more than one picture), ``shared`` (pictures that several sets gave), ``misnamed`` (pictures whose manifest
names other adapters than were published under its counter) and ``wrong`` (of ``compared`` sets, those whose
picture is not what a fresh runtime draws that knows this set alone); whether pictures and weights are the
base's after the last roll-back (``base_restored``), and the seconds of a swap. The base is a tiny one.
"""

from __future__ import annotations

import random
import statistics
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fade.adapters.manifest import publish
from fade.adapters.runtime import Runtime
from fade.models.denoiser import weights_sha256
from fade.models.family import load_base
from fade.models.generate import generate_batch
from tests.chaos.arguments import run_and_write
from tests.tiny import save_tiny_base
from tests.unit.adapters.test_adapters import _adapter, _delta_adapter

PROMPTS, OPTIONS = ["a cat image in neon style."], {"steps": 2, "guidance": 2.0, "solver": "ddim"}
ZERO = ("mixed", "shared", "misnamed", "wrong")
COMPARED = 10


def run(  # noqa: C901 - one story from the first release to the last picture
    count: int, seed: int, folder: Path
) -> dict[str, Any]:
    """Bring ``count`` adapters live one by one and take them back, both in random order, under load."""
    torch.set_num_threads(1)
    draw, key, base = random.Random(seed), Ed25519PrivateKey.generate(), folder / "base"
    save_tiny_base(base)
    # One of them is a sparse difference, which is joined in another way.
    pool = [_delta_adapter(base, folder / "pool/0")[0]]
    pool += [_adapter(base, folder / "pool" / str(i), seed=i) for i in range(1, count)]
    names = {f"erasure-{i}/1": adapter for i, adapter in enumerate(pool)}

    def release(where: Path, live: list[str], source: Path | None = None) -> int:
        # Sorted, so that a set has one order and rounds in one way; as strong together as one alone.
        entries = [(name, names[name], count**-0.5) for name in sorted(live)]
        return publish(where, entries, base=source, key=key).counter

    def runtime(where: Path) -> Runtime:
        return Runtime(load_base(base), where, public_key=key.public_key(), state=where.with_suffix(".json"))

    plain = generate_batch(load_base(base), PROMPTS, [1], precision="fp32", **OPTIONS).tobytes()
    published: dict[int, frozenset[str]] = {release(folder / "live", [], base): frozenset()}
    served = runtime(folder / "live")
    bits = weights_sha256(served.base.network)
    drawn: list[tuple[int, frozenset[str], bytes]] = []
    ended = threading.Event()

    def work() -> None:
        while not ended.is_set():
            pictures, manifest = served.generate(PROMPTS, [1], **OPTIONS)
            drawn.append((manifest.counter, frozenset(manifest.names), pictures.tobytes()))

    def wait_for(pictures: int, jobs: list[Any]) -> None:
        wanted = len(drawn) + pictures
        while len(drawn) < wanted and not any(job.done() for job in jobs):
            ended.wait(0.005)

    everyone = sorted(names)
    steps = [(name, True) for name in draw.sample(everyone, count)]
    steps += [(name, False) for name in draw.sample(everyone, count)]
    live: set[str] = set()
    swaps: list[float] = []
    with ThreadPoolExecutor(3) as threads:
        jobs = [threads.submit(work) for _ in range(3)]
        for name, on in steps:
            (live.add if on else live.remove)(name)
            published[max(published) + 1] = frozenset(live)  # before any request can see it
            release(folder / "live", sorted(live))
            swaps.append(served.refresh().swap_seconds)
            wait_for(1, jobs)
        wait_for(6, jobs)
        ended.set()
        for job in jobs:
            job.result()
    by_set: dict[frozenset[str], set[bytes]] = {}
    for _, live_then, pixels in drawn:
        by_set.setdefault(live_then, set()).add(pixels)
    sampled = draw.sample(sorted(by_set, key=sorted), min(COMPARED, len(by_set)))
    wrong = 0
    for number, one in enumerate(sampled):
        fresh = folder / f"fresh{number}"
        release(fresh, sorted(one), base)
        wrong += by_set[one] != {runtime(fresh).generate(PROMPTS, [1], **OPTIONS)[0].tobytes()}
    last = served.generate(PROMPTS, [1], **OPTIONS)[0].tobytes()
    served.close()
    return {
        "adapters": count,
        "releases": len(steps),
        "pictures": len(drawn),
        "sets_seen": len(by_set),
        "mixed": sum(len(pictures) > 1 for pictures in by_set.values()),
        "shared": len(by_set) - len({pixels for pictures in by_set.values() for pixels in pictures}),
        "misnamed": sum(published[counter] != live_then for counter, live_then, _ in drawn),
        "wrong": wrong,
        "compared": len(sampled),
        "base_restored": last == plain and weights_sha256(served.base.network) == bits,
        "swap_seconds": {"median": statistics.median(swaps), "worst": max(swaps)},
    }


def is_right(found: dict[str, Any]) -> bool:
    """Whether nothing was mixed up and the base's bits came back."""
    return bool(found["base_restored"]) and not any(found[name] for name in ZERO)


def main() -> None:
    """Swap, and write what was seen."""
    found = run_and_write(__doc__, "adapters", 100, run)
    print(found)
    sys.exit(0 if is_right(found) else 1)


if __name__ == "__main__":
    main()
