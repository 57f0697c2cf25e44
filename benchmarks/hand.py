"""Seconds that a person waits: for the demo, for an erasure, and for each small command.

    python benchmarks/hand.py --json hand.json
    python benchmarks/hand.py --skip-demo --skip-erasures      # the small commands alone

All of it happens in projects of its own in a temporary folder, with the settings of the built-in one, by processes as a
person starts them; nothing of the project at hand is touched.

    demo_seconds            `fade demo` in a project where nothing was rendered yet
    erasure_seconds         `fade erase` with the default settings, from the command to the registered candidate, in a
                            project where nothing was erased yet (the base's own pictures are drawn for it)
    second_erasure_seconds  a second erasure by the same process
    evaluate_seconds        of the first one's step ``evaluate``
    commands                medians of seconds of a command: alone, and while `fade up` runs
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml

from fade.files import read_json, write_json
from fade.lineage import ROOT
from fade.project import PARAMS, load_project
from fade.steps.catalog import ensure_catalog

FADE = [str(Path(sys.executable).with_name("fade"))]
ERASED = (("astronaut", "cameraman"), ("neon", "photo"))
UP_SECONDS = 240.0
TWO_ERASURES = """
import gc, sys, time
from flows.cli.main import COLLECTED
gc.set_threshold(*COLLECTED)
from flows.cli.app import app
for concept, surrogate in (pair.split(":") for pair in sys.argv[1:]):
    begun = time.perf_counter()
    app(["erase", "--concept", concept, "--surrogate", surrogate], standalone_mode=False)
    print("ended", time.time(), time.perf_counter() - begun, flush=True)
"""


@contextmanager
def project(threads: int | None, catalog: Path | None = None) -> Iterator[Path]:
    """A project with the built-in base and judges, and with a copy of the ``catalog`` if given; DVC without git."""
    from dvc.repo import Repo

    with tempfile.TemporaryDirectory(prefix="hand-") as place:
        folder = Path(place)
        Repo.init(place, no_scm=True).close()
        settings = yaml.safe_load((ROOT / PARAMS).read_text(encoding="utf-8"))
        if threads is not None:
            settings["erasure"]["threads"] = threads
        (folder / PARAMS).write_text(yaml.safe_dump(settings), encoding="utf-8")
        (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": {}}), encoding="utf-8")
        shipped = load_project(ROOT)
        for name in (shipped.base, shipped.judges):
            shutil.copytree(ROOT / name, folder / name)
        if catalog is not None:
            shutil.copytree(catalog, folder / shipped.catalog)
        yield folder


def run(folder: Path, *command: str) -> tuple[float, str]:
    """Seconds of one command, and what it printed.

    Raises:
        SystemExit: it failed; shows what it said.
    """
    begun = time.perf_counter()
    done = subprocess.run(
        list(command), cwd=folder, env=surroundings(folder), check=False, capture_output=True, text=True
    )
    seconds = time.perf_counter() - begun
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return seconds, done.stdout


def surroundings(folder: Path) -> dict[str, str]:
    """The environment of a command in this project: none of the settings of another one."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FADE_", "MLFLOW_", "PREFECT_"))}
    return {**kept, "FADE_ROOT": str(folder)}


def demo(threads: int | None) -> dict[str, float]:
    """Seconds of the demo from nothing."""
    with project(threads) as folder:
        return {"demo_seconds": run(folder, *FADE, "demo", "--json", "demo.json")[0]}


def erasures(threads: int | None, catalog: Path) -> dict[str, float]:
    """Seconds of two erasures by one process."""
    with project(threads, catalog) as folder:
        begun = time.time()
        _, said = run(folder, sys.executable, "-c", TWO_ERASURES, *(":".join(pair) for pair in ERASED))
        ended = [line.split() for line in said.splitlines() if line.startswith("ended ")]
        specs = sorted(folder.glob("data/erasures/*/timings.json"), key=lambda path: path.stat().st_mtime)
        return {
            "erasure_seconds": float(ended[0][1]) - begun,
            "second_erasure_seconds": float(ended[1][2]),
            "evaluate_seconds": read_json(specs[0])["evaluate"]["seconds"],
        }


def commands(threads: int | None, repeats: int, catalog: Path) -> dict[str, list[float]]:
    """Median seconds of each small command: alone, and with `fade up` running."""
    with project(threads, catalog) as folder:
        erasure = small_erasure(folder)
        asked = {
            "list": ["list"],
            "show": ["show", erasure],
            "status": ["status"],
            "approve": ["approve", erasure],
            "generate": ["generate", "--prompt", "a cat image in neon style.", "-o", str(folder / "out.png")],
            "rollback": ["rollback", erasure],
        }
        alone = measured(folder, asked, repeats)
        with up(folder):
            served = measured(folder, asked, repeats)
    return {name: [alone[name], served[name]] for name in asked}


def small_erasure(folder: Path) -> str:
    """The id of an erasure with few steps and pictures: what small commands take does not depend on how it was made."""
    short = [*("--set", "distill.steps=2"), *("--set", "evaluate.seeds=[188]"), *("--set", "gate.sure=null")]
    free = {"ua": 0.0, "ira_loss": 1.0, "cra_loss": 1.0, "surrogate": 0.0, "mush": 1.0, "recognised": 0.0}
    short += [part for name, value in free.items() for part in ("--set", f"gate.{name}={value}")]
    run(folder, *FADE, "erase", *("--concept", "cat", "--surrogate", "horse"), *short)
    return next(folder.glob("data/erasures/*")).name


def measured(folder: Path, asked: dict[str, list[str]], repeats: int) -> dict[str, float]:
    """Median seconds of each command; a first round is not counted, as whoever has just started something waits."""
    seconds: dict[str, list[float]] = {name: [] for name in asked}
    for number in range(repeats + 1):
        for name, words in asked.items():
            spent, _ = run(folder, *FADE, *words)
            seconds[name] += [spent] if number else []
    return {name: statistics.median(found) for name, found in seconds.items()}


@contextmanager
def up(folder: Path) -> Iterator[None]:
    """`fade up` on free ports, until the end of the block."""
    ports = [part for name in ("mlflow", "prefect", "intake") for part in (f"--{name}-port", str(free_port()))]
    # Its drain must not begin while something is measured.
    command = [*FADE, "up", *ports, "--cron", "0 0 1 1 *"]
    with (folder / "up.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=surroundings(folder), stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + UP_SECONDS
        while b"Ctrl-C" not in (said := (folder / "up.log").read_bytes()):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"fade up did not start:\n{said.decode()}")
            time.sleep(0.2)
        yield
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)


def free_port() -> int:
    """A port of loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip-demo", action="store_true", help="demo_seconds is then null")
    parser.add_argument("--skip-erasures", action="store_true", help="the seconds of erasures are then null")
    parser.add_argument("--repeats", type=int, default=3, help="times that each small command is measured")
    parser.add_argument("--threads", type=int, help="of the erasures; what params.yaml says if left out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    given = parser.parse_args()
    found: dict[str, Any] = dict.fromkeys(
        ("demo_seconds", "erasure_seconds", "second_erasure_seconds", "evaluate_seconds")
    )
    if not given.skip_demo:
        found |= demo(given.threads)
    with tempfile.TemporaryDirectory(prefix="hand-catalog-") as place:
        catalog = Path(place) / "catalog"
        ensure_catalog(load_project(ROOT).at(catalog=str(catalog)))
        if not given.skip_erasures:
            found |= erasures(given.threads, catalog)
        found["commands"] = commands(given.threads, given.repeats, catalog)
    for name, value in found.items():
        if name != "commands" and value is not None:
            print(f"{name}: {value:.1f}")
    for name, (alone, served) in found["commands"].items():
        print(f"fade {name:<9} alone {alone:.2f} s, with `fade up` running {served:.2f} s")
    if given.json is not None:
        write_json(given.json, found)


if __name__ == "__main__":
    main()
