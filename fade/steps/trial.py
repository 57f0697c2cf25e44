"""Trial: one erasure from request to figures in one process, for sweeps, benchmarks and calibration.

The functions are the pipeline's own; what is left out is what a product needs and an experiment does
not (validation, lineage, registration). A trial that was finished by the same code is not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fade.config import DistillSettings, EvaluateSettings, Gate, InversionSettings, Request, load_request, save_request
from fade.errors import FadeError
from fade.files import read_json, sha256_file, write_json
from fade.lineage import library_versions, module_closure
from fade.steps.attack import attack
from fade.steps.distill import distill_adapter
from fade.steps.evaluate import evaluate
from fade.steps.mask import mask
from fade.steps.saliency import saliency
from fade.steps.split import split

TRIALS = Path("data/trials")
RATES = ("ua", "ira", "cra")


def run_trial(
    request: Request, *, attacked: bool = False, root: Path = TRIALS, say: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Run what is not there yet of a trial; give its figures.

    Args:
        attacked: also measure how easily inversion brings the concept back.
        root: a folder per trial, named by the request's id.
        say: told the name of each step before it begins.
    """
    folder = _fresh(root / request.id)
    save_request(request, folder)
    if not (folder / "saliency.safetensors").is_file():
        _share_saliency(request, folder, root, say)
    _timed(folder, "mask", folder / "mask", lambda: mask(folder), say)
    _timed(folder, "distill", folder / "curve.parquet", lambda: _run_through(distill_adapter(folder)), say)
    _timed(folder, "evaluate", folder / "evaluation", lambda: _run_through(evaluate(folder)), say)
    if attacked:
        _timed(folder, "attack", folder / "attacks", lambda: _run_through(attack(folder)), say)
    return figures(folder)


def made_by() -> str:
    """Hash of all code that a trial runs and of the libraries under it."""
    digest = hashlib.sha256(str(library_versions()).encode())
    for path in module_closure("fade.steps.trial"):
        digest.update(f"{path.name}:{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def _fresh(folder: Path) -> Path:
    """The folder, emptied if other code wrote it."""
    mark = folder / "made_by.json"
    code = {"code": made_by()}
    if not mark.is_file() or read_json(mark) != code:
        if folder.is_dir():
            shutil.rmtree(folder)
        write_json(mark, code)
    return folder


def _share_saliency(request: Request, folder: Path, root: Path, say: Callable[[str], None] | None) -> None:
    """Splits and saliency do not depend on density, distillation or evaluation: trials of a sweep share them."""
    origin = request.model_copy(
        update={
            "mask": request.mask.model_copy(update={"density": 1.0, "within": "all"}),
            "distill": DistillSettings(timestep_power=request.distill.timestep_power),
            "evaluate": EvaluateSettings(),
            "inversion": InversionSettings(),
            "gate": Gate(),
        }
    )
    source = _fresh(root / "shared" / origin.id)
    save_request(origin, source)
    _timed(source, "split", source / "splits", lambda: split(source), say)
    _timed(source, "saliency", source / "saliency.safetensors", lambda: saliency(source), say)
    shutil.copytree(source / "splits", folder / "splits", dirs_exist_ok=True)
    write_json(folder / "timings.json", read_json(source / "timings.json"))
    os.link(source / "saliency.safetensors", folder / "saliency.safetensors")


def _timed(
    folder: Path, name: str, result: Path, work: Callable[[], object], say: Callable[[str], None] | None
) -> None:
    if result.exists():
        return
    if say is not None:
        say(name)
    begun = time.perf_counter()
    work()
    timings = read_json(folder / "timings.json") if (folder / "timings.json").is_file() else {}
    write_json(folder / "timings.json", {**timings, name: {"seconds": round(time.perf_counter() - begun, 3)}})


def _run_through(steps: Iterable[object]) -> None:
    for _ in steps:
        pass


def figures(folder: Path) -> dict[str, Any]:
    """What is known of a finished erasure, flat and JSON-ready; rates are fractions of 1.

    Keys: concept, kind (``person`` for people), surrogate; ua, ira, cra by the report judge with ``_low``,
    ``_high`` (95 %, Wilson) and ``_count``, base_ira, base_cra; drift; samples; passed (the gate); steps taken;
    method_seconds (saliency, mask and distillation); adapter_bytes, adapter_sha256; inversion with bounds,
    and base_inversion, where the attack was run.
    """
    request = load_request(folder)
    metrics = read_json(folder / "evaluation" / "metrics.json")
    card = read_json(folder / "adapter" / "card.json")
    timings = read_json(folder / "timings.json")
    before, after = (metrics["judges"]["report"][when] for when in ("before", "after"))
    row: dict[str, Any] = {
        "concept": ", ".join(pair.concept for pair in request.pairs),
        "kind": "person" if request.person else request.kind,
        "surrogate": ", ".join(pair.surrogate for pair in request.pairs),
    }
    for name in RATES:
        row[name] = after[name]["value"]
        row |= {f"{name}_{part}": after[name][part] for part in ("low", "high", "count")}
    row |= {f"base_{name}": before[name]["value"] for name in ("ira", "cra")}
    row |= {
        "drift": metrics["drift"],
        "samples": metrics["samples"],
        "passed": metrics["gate"]["passed"],
        "steps": card["steps"],
        "method_seconds": round(sum(timings[step]["seconds"] for step in ("saliency", "mask", "distill")), 2),
        "distill_seconds": timings["distill"]["seconds"],
        "adapter_bytes": metrics["adapter_bytes"],
        "adapter_sha256": metrics["adapter_sha256"],
    }
    if (folder / "attacks" / "inversion.json").is_file():
        row |= inversion_figures(read_json(folder / "attacks" / "inversion.json"))
    return row


def inversion_figures(found: dict[str, Any]) -> dict[str, Any]:
    """The attack's success by the report judge, erased and base, with its interval."""
    erased, base = found["erased"]["report"], found["base"]["report"]
    return {
        "inversion": erased["value"],
        "inversion_low": erased["low"],
        "inversion_high": erased["high"],
        "base_inversion": base["value"],
    }


def main() -> None:
    """Run the trial whose ``request.yaml`` lies in a folder; prints each step's name as it begins."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--attack", action="store_true")
    arguments = parser.parse_args()
    request = load_request(arguments.folder)

    def say(step: str) -> None:
        sys.stdout.write(f"{step}\n")
        sys.stdout.flush()

    try:
        run_trial(request, attacked=arguments.attack, root=arguments.folder.parent, say=say)
    except FadeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
