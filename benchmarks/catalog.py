"""Catalogs at size: pictures taken in a second, validation by rows, near-duplicates, and memory.

    python benchmarks/catalog.py --json catalog.json

Each figure is measured in a process of its own, whose peak memory it says. Tables of many rows have made-up
hashes and no pictures, so their validation leaves out what reads files.
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
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from fade.data.canvas import OBJECTS, photograph
from fade.data.catalog import SCHEMA, count_rows, load_catalog
from fade.data.duplicates import as_bits, conflicting, leaked, near_pairs
from fade.data.intake import build
from fade.data.loaders.folder import folder as image_folder
from fade.data.sets import Item, PictureSet

BAR_SECONDS = 120.0
DONE_AT = datetime(2026, 1, 2, tzinfo=UTC)


def taken_in(count: int, place: Path) -> dict[str, float]:
    """JPEGs of 256 x 256 from class folders, cut to 64 x 64, one process a core."""
    names = list(OBJECTS)
    for i in range(count):
        name = names[i % len(names)]
        path = place / "set" / name / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        turned = photograph(name).rotate(i % 360)
        turned.crop((64, 64, 320, 320)).save(path, quality=90)
    begun = time.perf_counter()
    for _ in build(place / "catalog", image_folder(place / "set"), size=64, added_at=DONE_AT):
        pass
    seconds = time.perf_counter() - begun
    return {"pictures": count, "seconds": seconds, "pictures_per_second": count / seconds, "cores": os.cpu_count() or 1}


def drawn(count: int, place: Path) -> dict[str, float]:
    """Small drawn pictures in one process: how memory grows with rows."""

    def items() -> Iterator[Item]:
        generator = np.random.default_rng(1)
        for i in range(count):
            yield Item(f"{i}", f"{i}", generator.integers(0, 256, (16, 16, 3), dtype=np.uint8), f"thing {i % 100}")

    begun = time.perf_counter()
    for _ in build(place / "catalog", PictureSet(items(), "drawn"), workers=1):
        pass
    return {"rows": count, "seconds": time.perf_counter() - begun}


def made_up(count: int, place: Path) -> Path:
    """A catalog's table of ``count`` rows, a tenth of them deleted; no pictures."""
    generator = np.random.default_rng(2)
    place.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(place / "catalog.parquet", SCHEMA) as writer:
        for start in range(0, count, 50_000):
            rows = min(50_000, count - start)
            ids = [f"{start + i:08d}" for i in range(rows)]
            columns = {
                "image_id": ids,
                "path": [f"pictures/{one}.png" for one in ids],
                "sha256": [generator.bytes(32).hex() for _ in ids],
                "source_sha256": [generator.bytes(32).hex() for _ in ids],
                "phash": [generator.bytes(8).hex() for _ in ids],
                "object": [f"thing {i % 100}" for i in range(rows)],
                "caption": [f"a photo of thing {i % 100}" for i in range(rows)],
                "split": ["holdout" if i % 5 == 1 else "train" for i in range(rows)],
                "deleted_at": [DONE_AT if i % 10 == 0 else None for i in range(rows)],
            }
            for name in ("width", "height", "source_width", "source_height"):
                columns[name] = [64] * rows
            given = {"mode": "RGB", "style": "photo", "person": False, "source": "s", "licence": "l"}
            given |= {"domain": "object", "attributes": [], "subject": None, "uri": "u", "source_mode": "RGB"}
            columns |= {name: [value] * rows for name, value in given.items()}
            writer.write_table(pa.table({n: columns.get(n, [None] * rows) for n in SCHEMA.names}, schema=SCHEMA))
    return place


def validated(count: int, place: Path) -> dict[str, float]:
    """Great Expectations over a catalog of made-up rows."""
    from tasks.expectations.validation import validate_catalog

    folder = made_up(count, place / "catalog")
    begun = time.perf_counter()
    validate_catalog(folder, files=False)
    return {"rows": count, "seconds": time.perf_counter() - begun}


def loaded(count: int, place: Path) -> dict[str, float]:
    """The live rows as a table in memory, as a split needs them."""
    folder = made_up(count, place / "catalog")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    begun = time.perf_counter()
    table = load_catalog(folder, further=("phash", "subject"))
    seconds = time.perf_counter() - begun
    mib = float(table.memory_usage(deep=True).sum()) / 2**20
    return {"rows": count, "live": len(table), "seconds": seconds, "table_mib": mib, "peak_mib_before": before}


def counted(count: int, place: Path) -> dict[str, float]:
    """The whole table streamed, as `fade catalog show` does."""
    folder = made_up(count, place / "catalog")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    begun = time.perf_counter()
    count_rows(folder)
    return {"rows": count, "seconds": time.perf_counter() - begun, "peak_mib_before": before}


def near(count: int, place: Path) -> dict[str, float]:
    """Near-duplicates among ``count`` pictures, a hundred of which are copies with two bits changed."""
    generator = np.random.default_rng(3)
    bits = generator.integers(0, 2**64, count, dtype=np.uint64)
    bits[-100:] = bits[:100] ^ np.uint64(0b1001)
    begun = time.perf_counter()
    pairs = near_pairs(bits, bits)
    seconds = time.perf_counter() - begun
    among = int((pairs[:, 0] < pairs[:, 1]).sum())
    Image.new("RGB", (64, 64)).save(place / "one.png")
    hashes = [f"{value:016x}" for value in bits.tolist()]
    table = pd.DataFrame({"phash": hashes, "path": "one.png", "image_id": hashes, "object": "thing"})
    begun = time.perf_counter()
    conflicting(table.drop_duplicates("image_id"), pictures=place)
    whole = time.perf_counter() - begun
    begun = time.perf_counter()
    found = leaked(table.head(1000), table.iloc[1000:], pictures=place, kinds={"object"})
    forget = time.perf_counter() - begun
    assert among >= 100
    assert len(found) >= 100
    assert len(as_bits(hashes)) == count
    return {
        **{"pictures": count, "seconds": seconds, "pairs": among, "catalog_check_seconds": whole},
        **{"forget_1000_seconds": forget, "bar_seconds": BAR_SECONDS},
    }


MEASURES: dict[str, Callable[[int, Path], dict[str, float]]] = {
    "taken_in": taken_in,
    "drawn": drawn,
    "validated": validated,
    "loaded": loaded,
    "counted": counted,
    "near": near,
}
PLAN = (
    *(("taken_in", 3000), ("near", 100_000), ("drawn", 2000), ("drawn", 20_000)),
    *(("validated", 1000), ("validated", 50_000), ("validated", 1_000_000)),
    *(("loaded", 1_000_000), ("counted", 1_000_000)),
)


def one(name: str, count: int) -> dict[str, float]:
    """A measure with the peak memory of this process."""
    with tempfile.TemporaryDirectory() as place:
        found = MEASURES[name](count, Path(place))
    return {**found, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def main() -> None:
    """Run every measure, or the one that is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", metavar="NAME:COUNT", help="a single measure in this process")
    arguments = parser.parse_args()
    if arguments.one:
        name, _, count = arguments.one.partition(":")
        print(json.dumps(one(name, int(count))))
        return
    results: dict[str, dict[str, float]] = {}
    for name, number in PLAN:
        ran = subprocess.run(
            [sys.executable, __file__, "--one", f"{name}:{number}"], capture_output=True, text=True, check=True
        )
        results[f"{name} {number}"] = json.loads(ran.stdout.splitlines()[-1])
        print(name, number, {key: round(value, 2) for key, value in results[f"{name} {number}"].items()}, flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
