"""Trial: one erasure from spec to figures in one process, for sweeps, benchmarks and calibration.

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
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fade.config import AttackSettings, DistillSettings, EvaluateSettings, Gate, InversionSettings
from fade.errors import FadeError
from fade.files import read_json, sha256_file, write_json
from fade.hardware import peak_mib
from fade.lineage import library_versions, module_closure
from fade.spec import ATTACKED, Spec, load_spec, save_spec
from fade.steps.attacks import attack_figures, run
from fade.steps.distill import distill_adapter
from fade.steps.evaluate import evaluate
from fade.steps.gate_attacks import gate_attacks
from fade.steps.mask import mask
from fade.steps.saliency import saliency
from fade.steps.split import split

TRIALS = Path("data/trials")
RATES = ("ua", "ira", "cra")
MAKING = ("saliency", "mask", "distill", "baseline")
"""The steps that make an adapter."""
EXTRA = ("perceptual_drift", "fid_", "kid_", "clip_score_")
"""What else is taken from the metrics: figures whose names begin so."""


def run_trial(
    spec: Spec,
    *,
    attacks: Sequence[str] = (),
    root: Path = TRIALS,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Run what is not there yet of a trial; give its figures.

    Args:
        attacks: attacks to run, by name (``fade.steps.attacks.KINDS``).
        root: a folder per trial, named by the spec's id.
        say: told the name of each step before it begins.
    """
    folder = emptied_if_other(root / spec.id, made_by())
    save_spec(spec, folder)
    if not (folder / "saliency.safetensors").is_file():
        _share_saliency(spec, folder, root, say)
    timed(folder, "mask", folder / "mask", lambda: mask(folder), say)
    timed(folder, "distill", folder / "curve.csv", lambda: _run_through(distill_adapter(folder)), say)
    return finish(folder, attacks=attacks, say=say)


def finish(folder: Path, *, attacks: Sequence[str], say: Callable[[str], None] | None) -> dict[str, Any]:
    """What follows once the adapter is there: attacks that its gate asks for, evaluation, attacks, figures."""
    if load_spec(folder).gate.attacks:
        timed(folder, "gate-attacks", folder / ATTACKED, lambda: _run_through(gate_attacks(folder)), say)
    timed(folder, "evaluate", folder / "evaluation", lambda: _run_through(evaluate(folder)), say)
    for kind in dict.fromkeys(attacks):
        name = "attack" if kind == "inversion" else f"attack-{kind}"
        timed(folder, name, folder / "attacks" / f"{kind}.json", partial(_run_attack, folder, kind), say)
    return figures(folder)


def made_by() -> str:
    """Hash of all code that a trial runs and of the libraries under it."""
    digest = hashlib.sha256(str(library_versions()).encode())
    for path in module_closure("fade.steps.trial"):
        digest.update(f"{path.name}:{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def emptied_if_other(folder: Path, code: str) -> Path:
    """The folder, emptied if code of another hash wrote it."""
    mark = folder / "made_by.json"
    if not mark.is_file() or read_json(mark) != {"code": code}:
        if folder.is_dir():
            shutil.rmtree(folder)
        write_json(mark, {"code": code})
    return folder


def _share_saliency(spec: Spec, folder: Path, root: Path, say: Callable[[str], None] | None) -> None:
    """Splits and saliency do not depend on density, distillation or evaluation: trials of a sweep share them."""
    origin = spec.model_copy(
        update={
            "mask": spec.mask.model_copy(update={"density": 1.0, "within": "all"}),
            "distill": DistillSettings(timestep_power=spec.distill.timestep_power),
            "evaluate": EvaluateSettings(),
            "inversion": InversionSettings(),
            "attacks": AttackSettings(),
            "gate": Gate(),
        }
    )
    source = emptied_if_other(root / "shared" / origin.id, made_by())
    save_spec(origin, source)
    timed(source, "split", source / "splits", lambda: split(source), say)
    timed(source, "saliency", source / "saliency.safetensors", lambda: saliency(source), say)
    shutil.copytree(source / "splits", folder / "splits", dirs_exist_ok=True)
    write_json(folder / "timings.json", read_json(source / "timings.json"))
    os.link(source / "saliency.safetensors", folder / "saliency.safetensors")


def timed(folder: Path, name: str, result: Path, work: Callable[[], object], say: Callable[[str], None] | None) -> None:
    """Do a step unless its result is there; note its seconds, and the process' peak memory when it ended."""
    if result.exists():
        return
    if say is not None:
        say(name)
    begun = time.perf_counter()
    work()
    spent = {"seconds": round(time.perf_counter() - begun, 3), "peak_mib": round(peak_mib(), 1)}
    timings = read_json(folder / "timings.json") if (folder / "timings.json").is_file() else {}
    write_json(folder / "timings.json", {**timings, name: spent})


def _run_attack(folder: Path, kind: str) -> None:
    _run_through(run(folder, kind))


def _run_through(steps: Iterable[object]) -> None:
    for _ in steps:
        pass


def figures(folder: Path) -> dict[str, Any]:
    """What is known of a finished erasure, flat and JSON-ready; rates are fractions of 1.

    Keys: concept, kind (``person`` for people), surrogate; ua, ira, cra by the report judge with ``_low``,
    ``_high`` (95 %, Wilson) and ``_count``, base_ua, base_ira, base_cra; drift; samples; passed (the gate); steps;
    method_seconds (all that made the adapter), peak_mib (of the process by then); adapter_bytes, adapter_sha256; of
    each attack that was run, its name with bounds and with ``base_`` before it.
    """
    spec = load_spec(folder)
    metrics = read_json(folder / "evaluation" / "metrics.json")
    card = read_json(folder / "adapter" / "card.json")
    timings = read_json(folder / "timings.json")
    before, after = (metrics["judges"]["report"][when] for when in ("before", "after"))
    row: dict[str, Any] = {
        "concept": ", ".join(pair.concept for pair in spec.pairs),
        "kind": "person" if spec.person else spec.kind,
        "surrogate": ", ".join(pair.surrogate for pair in spec.pairs),
    }
    for name in RATES:
        row[name] = after[name]["value"]
        row |= {f"{name}_{part}": after[name][part] for part in ("low", "high", "count")}
    row |= {f"base_{name}": before[name]["value"] for name in RATES}
    row |= {
        "drift": metrics["drift"],
        "samples": metrics["samples"],
        "passed": metrics["gate"]["passed"],
        "steps": card["steps"],
        "method_seconds": round(sum(timings[step]["seconds"] for step in MAKING if step in timings), 2),
        "distill_seconds": next(timings[step]["seconds"] for step in ("distill", "baseline") if step in timings),
        "peak_mib": max(timings[step]["peak_mib"] for step in MAKING if step in timings),
        # A difference of whole weights needs no positions: the smaller of both ways to store it.
        "adapter_bytes": min(metrics["adapter_bytes"], card.get("dense_bytes", metrics["adapter_bytes"])),
        "adapter_sha256": metrics["adapter_sha256"],
    }
    row |= {name: value for name, value in metrics.items() if name.startswith(EXTRA)}
    if "surrogate" in after:
        row["surrogate_rate"] = after["surrogate"]["value"]
    return row | attack_figures(folder)


def report_progress(step: str) -> None:
    """Print a step's name at once, for whoever reads the trial's output."""
    sys.stdout.write(f"{step}\n")
    sys.stdout.flush()


def main() -> None:
    """Run the trial whose ``spec.yaml`` lies in a folder; prints each step's name as it begins."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--attack", action="append", default=[], help="an attack to run, by name; may be repeated")
    arguments = parser.parse_args()
    spec = load_spec(arguments.folder)
    try:
        run_trial(spec, attacks=arguments.attack, root=arguments.folder.parent, say=report_progress)
    except FadeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
