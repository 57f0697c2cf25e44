"""Audits long after: adapters made by three commits of different age, each made again from a fresh clone.

    python tests/chaos/audits.py --adapters 3 --json audits.json

writes ``adapters``, ``compared`` and ``different`` hashes (the second has to be 0), and ``newest_differs``: that the
oldest adapter's code is no longer the newest, so that the audit must have gone back. A clone of this
repository gets a tiny base and catalog; every commit draws its random numbers in another way.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import yaml

from fade.data.canvas import OBJECTS
from fade.files import read_json, sha256_file
from fade.steps.catalog import build_catalog
from tests.chaos.arguments import run_and_write
from tests.tiny import SETTINGS, save_tiny_base


def run(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Make an adapter by each of ``count`` commits, then audit them all from the newest."""
    project = folder / "project"

    def call(*command: str) -> None:
        kept = {name: value for name, value in os.environ.items() if name not in ("FADE_ROOT", "MLFLOW_TRACKING_URI")}
        environment = {**kept, "PYTHONPATH": str(project), "OMP_NUM_THREADS": "1", "DVC_NO_ANALYTICS": "1"}
        done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")

    def fade(*arguments: str) -> None:
        call(sys.executable, "-m", "flows.cli.app", *arguments)

    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(project)], check=True)
    settings = yaml.safe_load((project / "params.yaml").read_text())
    changes = {**SETTINGS, "threads": 1, "evaluate": {"seeds": [seed], "steps": 1, "batch": 60, "precision": "fp32"}}
    for step, changed in changes.items():
        known = settings["erasure"].get(step)
        settings["erasure"][step] = {**known, **changed} if isinstance(known, dict) else changed
    (project / "params.yaml").write_text(yaml.safe_dump(settings))
    build_catalog(project / "data/catalog/canvas", params={"seed": 3, "train_per_pair": 3, "holdout_per_pair": 1})
    save_tiny_base(project / "data/base/canvas")
    made, objects = {}, list(OBJECTS)
    seeding = project / "fade/seeding.py"
    plain = seeding.read_text()
    for age in range(count):
        # The same request draws other numbers than before: only the right commit makes the same bytes.
        text = plain.replace("for part in (seed, *purpose)", f"for part in ({age}, seed, *purpose)")
        if text == plain:
            raise RuntimeError("fade/seeding.py no longer looks as this program expects: see derive_seed")
        seeding.write_text(text)
        call("git", "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "-qam", f"age {age}")
        figures = folder / f"{age}.json"
        fade("erase", "--concept", objects[3 + age], "--surrogate", objects[-1], "--json", str(figures))
        made[age] = Path(json.loads(figures.read_text())["folder"]).name
    reports = []
    for age, erasure in made.items():
        report = folder / f"audit{age}.json"
        fade("audit", erasure, "--json", str(report))
        reports.append(read_json(report))
    code = {row["path"]: row["recorded"] for row in reports[0]["rows"]}
    return {
        "adapters": count,
        "commits": len({report["commit"] for report in reports}),
        "compared": sum(report["compared"] for report in reports),
        "different": sum(report["different"] for report in reports),
        "newest_differs": code["fade/seeding.py"] != _md5(seeding),
        "adapter_sha256": [sha256_file(path) for path in sorted(project.glob("data/erasures/*/adapter/*.safetensors"))],
    }


def _md5(path: Path) -> str:
    from tasks.dvc.objects import md5_of

    return md5_of(path)


def main() -> None:
    """Make, audit, write what was seen."""
    found = run_and_write(__doc__, "adapters", 3, run)
    print(found)
    sys.exit(0 if found["different"] == 0 and found["commits"] == found["adapters"] and found["newest_differs"] else 1)


if __name__ == "__main__":
    main()
