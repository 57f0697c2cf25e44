"""What each small command imports: how many modules, and the seconds until they are (`python -X importtime`).

    python benchmarks/imports.py --json imports.json

In a project of its own, with one small erasure (benchmarks/hand.py); without a service that would do the commands.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.hand import project, small_erasure, surroundings
from fade.files import write_json
from fade.lineage import ROOT, made_on
from fade.project import load_project
from fade.steps.catalog import ensure_catalog

LINE = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s*([\w.]+)")
HEAVY = ("torch", "transformers", "diffusers", "pandas", "mlflow", "prefect", "dvc", "great_expectations")


def imports_of(folder: Path, words: list[str]) -> dict[str, Any]:
    """Modules of one command and their seconds; which of the heavy ones are among them."""
    command = [sys.executable, "-X", "importtime", "-m", "flows.cli.app", *words]
    done = subprocess.run(command, cwd=folder, env=surroundings(folder), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"fade {' '.join(words)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr[-2000:]}")
    found = LINE.findall(done.stderr)
    names = {name for _, name in found}
    return {
        "modules": len(names),
        "seconds": sum(int(spent) for spent, _ in found) / 1e6,
        "heavy": [name for name in HEAVY if name in names],
    }


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="imports-") as place:
        catalog = Path(place) / "catalog"
        ensure_catalog(load_project(ROOT).at(catalog=str(catalog)))
        with project(1, catalog) as folder:
            erasure = small_erasure(folder)
            asked = {
                "--help": ["--help"],
                **{name: [name] for name in ("list", "status", "live", "release")},
                **{name: [name, erasure] for name in ("show", "approve", "rollback")},
                "generate": ["generate", "--prompt", "a cat image in neon style.", "-o", str(folder / "out.png")],
            }
            found = {name: imports_of(folder, words) for name, words in asked.items()}
    for name, one in found.items():
        print(
            f"{name:<9} {one['modules']:>5} modules, {one['seconds']:.2f} s, {', '.join(one['heavy']) or 'none heavy'}"
        )
    if given.json is not None:
        write_json(given.json, {"commands": found, "made_on": made_on()})


if __name__ == "__main__":
    main()
