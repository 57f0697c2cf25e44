"""Swapping under load: adapters go live and are taken back in random order while requests are in flight.

    python tests/chaos/swap.py --adapters 100 --json swap.json

writes ``adapters``, ``releases``, ``pictures``, ``mixed`` (sets of adapters that gave more than one picture: has
to be 0), ``shared`` (different sets that gave the same picture: has to be 0), ``base_restored`` (whether pictures
and weights are the base's after the last roll-back) and the seconds of a swap. The base is a tiny one.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fade.adapters.manifest import publish
from fade.adapters.runtime import Runtime
from fade.files import write_json
from fade.models.family import load_base
from fade.models.generate import generate_batch
from fade.models.sd import weights_sha256
from tests.test_adapters import _adapter
from tests.tiny import save_tiny_base

PROMPTS = ["a cat image in neon style."]


def run(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Bring ``count`` adapters live one by one and take them back, both in random order, under load."""
    torch.set_num_threads(1)
    draw, key, base = random.Random(seed), Ed25519PrivateKey.generate(), folder / "base"
    save_tiny_base(base)
    pool = [_adapter(base, folder / "pool" / str(i), seed=i) for i in range(count)]
    plain = generate_batch(load_base(base), PROMPTS, [1], steps=2, guidance=2.0, solver="ddim").tobytes()
    sd, release = load_base(base), folder / "release"
    bits = weights_sha256(sd.unet)
    publish(release, [], base=base, key=key)
    runtime = Runtime(sd, release, public_key=key.public_key(), state=folder / "state.json")
    drawn: list[tuple[frozenset[str], bytes]] = []
    swaps: dict[int, float] = {}
    ended = threading.Event()

    def work() -> None:
        while not ended.is_set():
            pictures, manifest = runtime.generate(PROMPTS, [1], steps=2, guidance=2.0)
            drawn.append((frozenset(manifest.names), pictures.tobytes()))

    # Sorted, so that a set has one order and rounds in one way.
    live: set[int] = set()
    steps = [(i, True) for i in draw.sample(range(count), count)] + [
        (i, False) for i in draw.sample(range(count), count)
    ]
    with ThreadPoolExecutor(3) as threads:
        jobs = [threads.submit(work) for _ in range(3)]
        for i, on in steps:
            (live.add if on else live.remove)(i)
            named = [(f"erasure-{j}/1", pool[j], 1.0 / count) for j in sorted(live)]
            manifest = publish(release, named, base=None, key=key)
            swaps[manifest.counter] = runtime.refresh().swap_seconds
            before = len(drawn)
            while len(drawn) == before and not any(job.done() for job in jobs):
                ended.wait(0.005)
        before = len(drawn)
        while len(drawn) < before + 6 and not any(job.done() for job in jobs):
            ended.wait(0.005)
        ended.set()
        for job in jobs:
            job.result()
    by_set: dict[frozenset[str], set[bytes]] = {}
    for names, pixels in drawn:
        by_set.setdefault(names, set()).add(pixels)
    last = runtime.generate(PROMPTS, [1], steps=2, guidance=2.0)[0].tobytes()
    runtime.close()
    return {
        "adapters": count,
        "releases": len(steps),
        "pictures": len(drawn),
        "sets_seen": len(by_set),
        "mixed": sum(len(pictures) > 1 for pictures in by_set.values()),
        "shared": len(by_set) - len({pixels for pictures in by_set.values() for pixels in pictures}),
        "base_restored": last == plain and weights_sha256(sd.unet) == bits,
        "swap_seconds": {"median": statistics.median(swaps.values()), "worst": max(swaps.values())},
    }


def main() -> None:
    """Swap, and write what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="swap-"))
    try:
        found = run(arguments.adapters, arguments.seed, folder)
    finally:
        shutil.rmtree(folder)
    print(found)
    if arguments.json:
        write_json(arguments.json, found)
    sys.exit(0 if found["base_restored"] and not found["mixed"] else 1)


if __name__ == "__main__":
    main()
