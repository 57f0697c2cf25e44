"""What an erasure costs around the method: Prefect, Great Expectations, DVC and MLflow, each by itself.

    python benchmarks/overhead.py --json benchmarks/results/overhead.json

Erasures of the built-in base in a project of their own, with few steps and pictures: what is measured does not depend
on them. The clock stands with one part at a time, the innermost:

    imports      until the flow can be called
    request      the request, its folder and its DVC pipeline
    method       splits, saliency, mask, distillation, evaluation (few of each: not what an erasure takes)
    gx           suites, Data Docs
    dvc          what is current, hashes of what a stage read and wrote
    mlflow       the run with its curve and files, the version and its page
    prefect      the rest of the flow: engine, states, artifacts, the ledger

``first`` starts Prefect's server and makes MLflow's tables; ``further`` are medians of the next ones.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import GeneratorType, ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "600")

import yaml

from fade.files import write_json
from fade.lineage import ROOT

CONCEPTS = ("cat", "astronaut", "neon", "oil")
SHORT = {"distill.steps": 20, "evaluate.seeds": [188], "gate.sure": None}
AROUND = ("gx", "dvc", "mlflow", "prefect")


class Clock:
    """Seconds by part; the innermost part that is entered has them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside: list[str] = []
        self._since = time.perf_counter()

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """Inside, seconds go to this part."""
        self._turn()
        self._inside.append(part)
        try:
            yield
        finally:
            self._turn()
            self._inside.pop()

    def _turn(self) -> None:
        now = time.perf_counter()
        if self._inside:
            self.seconds[self._inside[-1]] += now - self._since
        self._since = now

    def count(self, module: ModuleType, name: str, part: str) -> None:
        """Seconds of a module's function go to a part; of a generator, those of its own turns."""
        original = getattr(module, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            with self.within(part):
                result = original(*arguments, **options)
            return self._turns(result, part) if isinstance(result, GeneratorType) else result

        setattr(module, name, counted)

    def _turns(self, generator: Iterator[Any], part: str) -> Iterator[Any]:
        while True:
            with self.within(part):
                try:
                    item = next(generator)
                except StopIteration:
                    return
            yield item

    def count_curve(self, module: Any) -> None:
        """The same of the curve that MLflow gets while it grows."""
        original: Callable[[str], Any] = module.live_curve

        @contextmanager
        def counted(erasure: str) -> Iterator[Callable[..., None]]:
            curve = original(erasure)
            with self.within("mlflow"):
                send = curve.__enter__()

            def sent(*given: Any) -> None:
                with self.within("mlflow"):
                    send(*given)

            try:
                yield sent
            finally:
                with self.within("mlflow"):
                    curve.__exit__(None, None, None)

        module.live_curve = counted


def project(folder: Path) -> None:
    """A project with the built-in catalog, base and judges; DVC without git."""
    from dvc.repo import Repo

    from fade.project import load_project
    from fade.steps.catalog import ensure_catalog

    folder.mkdir()
    Repo.init(str(folder), no_scm=True).close()
    shutil.copy(ROOT / "params.yaml", folder)
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": {}}))
    shipped = load_project(ROOT)
    for name in (shipped.base, shipped.judges):
        shutil.copytree(ROOT / name, folder / name)
    os.chdir(folder)
    ensure_catalog(load_project())


def measured(concepts: tuple[str, ...], threads: int) -> list[dict[str, float]]:
    """Seconds by part of one erasure after the other."""
    clock = Clock()
    with clock.within("imports"):
        from fade.asking.prepare import AUTO, prepare_spec
        from fade.config import load_settings
        from fade.pipeline import STEPS
        from fade.project import load_project
        from flows.erasing import erase
        from tasks.dvc import versioning
        from tasks.mlflow import runs, tracking, version_page

    for step in STEPS:
        _, _, name = step.function.partition(":")
        clock.count(importlib.import_module(step.module), name, "method" if step.in_trials else "gx")
    for name in ("is_current", "record", "lock_record"):
        clock.count(versioning, name, "dvc")
    clock.count(version_page, "refresh_page", "mlflow")
    for name in ("page_of", "file_address"):
        clock.count(tracking, name, "mlflow")
    clock.count(runs, "register", "mlflow")
    clock.count_curve(runs)
    found = []
    for concept in concepts:
        with clock.within("request"):
            settings = load_settings(Path("params.yaml"), changes={**SHORT, "threads": threads})
            spec = prepare_spec(concept, AUTO, project=load_project(), settings=settings)
            erase.prepare_folder(spec)
        with clock.within("prefect"):
            erase.erase(spec.id)
        found.append(dict(clock.seconds))
        clock.seconds.clear()
    return found


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    given = parser.parse_args()
    out = given.json.resolve() if given.json else None
    with tempfile.TemporaryDirectory(prefix="overhead-") as place:
        project(Path(place) / "project")
        os.environ["FADE_ROOT"] = str(Path(place) / "project")
        from flows.settings import configure

        configure()
        rows = measured(CONCEPTS, given.threads)
        os.chdir(ROOT)
    further = {part: statistics.median(row[part] for row in rows[1:]) for part in rows[1]}
    from fade.lineage import made_on

    found = {
        "first": rows[0],
        "further": further,
        "around_first": sum(rows[0][part] for part in AROUND),
        "around_further": statistics.median(sum(row[part] for part in AROUND) for row in rows[1:]),
        "threads": given.threads,
        "made_on": made_on(),
    }
    for name in ("first", "further"):
        print(f"{name}: " + ", ".join(f"{part} {seconds:.2f} s" for part, seconds in found[name].items()))
    print(f"around the method: {found['around_first']:.2f} s the first time, {found['around_further']:.2f} s after it")
    if out is not None:
        write_json(out, found)


if __name__ == "__main__":
    main()
