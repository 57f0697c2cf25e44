"""What swap.py and tamper.py have in common: their arguments, and a folder that is gone afterwards."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fade.files import write_json


def run_and_write(description: str | None, option: str, default: int, run: Callable[[int, int, Path], Any]) -> Any:
    """Run ``run(number, seed, folder)`` with ``--OPTION``, ``--seed`` and, as ``--json`` says, keep what it found."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if (number := getattr(arguments, option)) < 1:
        parser.error(f"--{option} must be at least 1: got {number}")
    with tempfile.TemporaryDirectory(prefix=f"{option}-") as folder:
        found = run(number, arguments.seed, Path(folder))
    if arguments.json:
        write_json(arguments.json, found)
    return found
