"""Trial: one erasure from spec to figures in one process, for sweeps, benchmarks and calibration.

The steps are the pipeline's own (fade/pipeline.py); what is left out is what a product needs and an experiment does
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

from fade import pipeline
from fade.config import Settings
from fade.errors import FadeError
from fade.evaluation.measured import Evaluation
from fade.evaluation.records import load
from fade.files import read_json, sha256_file, write_json, writing
from fade.hardware import peak_mib
from fade.lineage import library_versions, module_closure
from fade.methods.registry import method_code
from fade.pipeline import TIMINGS, Step
from fade.spec import Spec, load_spec, save_spec
from fade.steps.attacks import attack_figures, run

TRIALS = Path("data/trials")
JUDGED_BY = "judged_by.json"


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
    steps = steps_of_trial(spec)
    folder = emptied_if_other(root / spec.id, made_by(steps, spec.method))
    save_spec(spec, folder)
    take_shared(spec, folder, root, say)
    run_steps(folder, steps, say)
    for kind in dict.fromkeys(attacks):
        timed(folder, f"attack-{kind}", [folder / "attacks" / f"{kind}.json"], partial(_run_attack, folder, kind), say)
    return figures(folder)


def run_steps(folder: Path, steps: Iterable[Step], say: Callable[[str], None] | None) -> None:
    """Run those of the pipeline's steps whose outputs are not all there."""
    for step in steps:
        outputs = [folder / name for name in step.outputs]
        timed(folder, step.name, outputs, partial(_run_through, pipeline.run(step, folder)), say)


def steps_of_trial(spec: Spec) -> list[Step]:
    """The pipeline's steps that an experiment needs, in order."""
    return [step for step in pipeline.steps_of(spec) if step.in_trials]


def made_by(steps: Sequence[Step], method: str) -> str:
    """Hash of all code that these steps run, of the method's where one of them runs it, and of the libraries."""
    code = {*module_closure("fade.studies.trial", *(step.module for step in steps))}
    if any(step.by_method for step in steps):
        code |= {*method_code(method)}
    return _hash_of(code)


def judged_by(module: str) -> str:
    """Hash of all code that judging runs, from its module on, and of the libraries."""
    return _hash_of(module_closure(module))


def _hash_of(code: Iterable[Path]) -> str:
    digest = hashlib.sha256(str(library_versions()).encode())
    for path in sorted(code):
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


def kept_row(folder: Path, name: str, code: str) -> dict[str, Any] | None:
    """The row of an erasure, if judging code of this hash wrote it: ``keep_row`` marks which did."""
    row, mark = folder / name, folder / JUDGED_BY
    if row.is_file() and mark.is_file() and read_json(mark) == {"code": code}:
        return read_json(row)
    return None


def keep_row(folder: Path, name: str, code: str, row: dict[str, Any]) -> None:
    """Write an erasure's row, and which code judged it."""
    (folder / JUDGED_BY).unlink(missing_ok=True)  # stopped between both, the row counts for nothing
    write_json(folder / name, row)
    write_json(folder / JUDGED_BY, {"code": code})


def take_shared(spec: Spec, folder: Path, root: Path, say: Callable[[str], None] | None) -> None:
    """Splits and saliency read few settings: trials that differ in others alone share what such steps made."""
    steps = [step for step in steps_of_trial(spec) if step.shared]
    wanted = [name for step in steps for name in step.outputs if not (folder / name).exists()]
    if not wanted:
        return
    common = _only_what_is_read(spec, steps)
    source = emptied_if_other(root / "shared" / common.id, made_by(steps, spec.method))
    save_spec(common, source)
    run_steps(source, steps, say)
    write_json(folder / TIMINGS, {**read_json(source / TIMINGS), **_timings(folder)})
    for name in wanted:
        with writing(folder / name) as temporary:
            if (source / name).is_dir():
                shutil.copytree(source / name, temporary, copy_function=os.link)
            else:
                os.link(source / name, temporary)


def _only_what_is_read(spec: Spec, steps: Iterable[Step]) -> Spec:
    """The spec with every setting that none of these steps reads at its default."""
    read = {name for step in steps for name in step.parameters}
    changes: dict[str, Any] = {"by_kind": ()}
    for name, default in Settings():
        if name in read:
            continue
        parts = {part for group, _, part in (one.partition(".") for one in read) if group == name}
        kept = {part: getattr(getattr(spec, name), part) for part in parts}
        changes[name] = default.model_copy(update=kept) if kept else default
    return spec.model_copy(update=changes)


def timed(
    folder: Path, name: str, results: Iterable[Path], work: Callable[[], object], say: Callable[[str], None] | None
) -> None:
    """Do a step unless its results are there; note its seconds, and the process' peak memory when it ended.

    ``cpu_seconds`` are those of the processor, all threads together: they count nobody who shares the machine.
    """
    if all(path.exists() for path in results):
        return
    if say is not None:
        say(name)
    begun, used = time.perf_counter(), time.process_time()
    work()
    spent = {
        "seconds": round(time.perf_counter() - begun, 3),
        "cpu_seconds": round(time.process_time() - used, 3),
        "peak_mib": round(peak_mib(), 1),
    }
    write_json(folder / TIMINGS, {**_timings(folder), name: spent})


def _timings(folder: Path) -> dict[str, dict[str, float]]:
    return read_json(folder / TIMINGS) if (folder / TIMINGS).is_file() else {}


def _run_attack(folder: Path, kind: str) -> None:
    _run_through(run(folder, kind))


def _run_through(steps: Iterable[object]) -> None:
    for _ in steps:
        pass


def figures(folder: Path) -> dict[str, Any]:
    """What is known of a finished erasure, flat and JSON-ready; rates are fractions of 1.

    Keys: concept, kind (``person`` for people), surrogate; ua, ira, cra by the report judge with ``_low``,
    ``_high`` (95 %, Wilson) and ``_count``, base_ua, base_ira, base_cra; drift; samples; passed (the gate); steps;
    surrogate_share, mush, base_mush, reachable_ua, reachable_surrogate, reachable_mush, neighbours and base_neighbours
    likewise (``JudgeFigures.overwriting``), as far as they were judged; tries (settings looked at before one was kept);
    method_seconds (all that made the adapter), peak_mib (of the process by then); adapter_bytes, adapter_sha256; of
    each attack that was run, its name with bounds and with ``base_`` before it.
    """
    spec = load_spec(folder)
    metrics = load(Evaluation, folder / "evaluation" / "metrics.json")
    card = read_json(folder / "adapter" / "card.json")
    timings = _timings(folder)
    making = [step.name for step in pipeline.steps_of(spec) if step.makes_adapter]
    before, after = metrics.report.before, metrics.report.after
    row: dict[str, Any] = {
        "concept": ", ".join(pair.concept for pair in spec.pairs),
        "kind": "person" if spec.person else spec.kind,
        "surrogate": ", ".join(pair.surrogate for pair in spec.pairs),
    }
    for name, found in after.rates.items():
        row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high, f"{name}_count": found.count}
    row |= {f"base_{name}": found.value for name, found in before.rates.items()}
    row |= {
        "drift": metrics.drift,
        "samples": metrics.samples,
        "passed": metrics.gate.passed,
        "steps": card["steps"],
        "method_seconds": round(sum(timings[name]["seconds"] for name in making), 2),
        "distill_seconds": timings[pipeline.maker_of(spec).name]["seconds"],
        "peak_mib": max(timings[name]["peak_mib"] for name in making),
        # A difference of whole weights needs no positions: the smaller of both ways to store it.
        "adapter_bytes": min(metrics.adapter_bytes, card.get("dense_bytes", metrics.adapter_bytes)),
        "adapter_sha256": metrics.adapter_sha256,
    }
    row |= metrics.distances()
    for name, found in metrics.report.overwriting().items():
        row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high, f"{name}_count": found.count}
    row["tries"] = card.get("tries", 1)
    return row | attack_figures(folder).flat()


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
