"""What swap.py, tamper.py and audits.py have in common: their arguments, and a folder that is gone afterwards."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fade.files import write_json
from fade.lineage import made_on


def run_and_write(description: str | None, option: str, default: int, run: Callable[[int, int, Path], Any]) -> Any:
    """Run ``run(number, seed, folder)`` with ``--OPTION``, ``--seed`` and, as ``--json`` says, keep what it found."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if (number := getattr(arguments, option)) < 1:
        parser.error(f"--{option} must be at least 1: got {number}")
    begun, load = time.perf_counter(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix=f"{option}-") as folder:
        found = run(number, arguments.seed, Path(folder))
    # The machine's load, because it decides the seconds.
    found |= {"seconds": round(time.perf_counter() - begun, 1), "load": [load, os.getloadavg()[0]]}
    found |= {"seed": arguments.seed, "made_on": made_on()}
    if arguments.json:
        write_json(arguments.json, found)
    return found
