"""Another point: an erasure by settings that a former one tried and did not take; nothing is trained anew."""

from __future__ import annotations

import shutil
from pathlib import Path

from fade.errors import ConfigError
from fade.evaluation.points import POINTS_NAME, Points
from fade.evaluation.records import load
from fade.files import read_json, write_json, writing
from fade.pipeline import TIMINGS, steps_of
from fade.spec import POINTS, Spec
from flows.erasing.erase import prepare_folder
from flows.settings import ERASURES
from tasks.dvc import versioning


def other_point(spec: Spec, point: int) -> Spec:
    """The spec of the same request with another of its points; its folder has what was made before the choice.

    A person takes it after the gate has spoken of another, perhaps of several: so that a bad one passes no more often
    than stated however many of the points are put before the gate, its error rate is divided by their number.

    Raises:
        ConfigError: the request was not run with settings that it found, or tried no such point.
    """
    if spec.why_fixed:
        raise ConfigError(f"There are no points to choose of: {spec.why_fixed}. Leave --point out.")
    origin = ERASURES / spec.id
    if not (origin / POINTS / POINTS_NAME).is_file():
        raise ConfigError(
            f"The same request without --point has not been run on this machine (no {origin / POINTS}): there are no "
            "points yet. Run it first."
        )
    tried = load(Points, origin / POINTS / POINTS_NAME).tried
    if point >= len(tried):
        raise ConfigError(f"No point {point} was tried: there are 0 to {len(tried) - 1}. See {origin}/evaluation.")
    gate = spec.gate
    if gate.sure is not None:
        rate = gate.sure.error_rate / len(tried)
        gate = gate.model_copy(update={"sure": gate.sure.model_copy(update={"error_rate": rate})})
    chosen = spec.model_copy(update={"tune": spec.tune.model_copy(update={"point": point}), "gate": gate})
    _lay(origin, prepare_folder(chosen), chosen)
    return chosen


def _lay(origin: Path, folder: Path, spec: Spec) -> None:
    """What the steps before the choice made, recorded as theirs: they read nothing in which the two differ."""
    timings = read_json(origin / TIMINGS)
    kept = read_json(folder / TIMINGS) if (folder / TIMINGS).is_file() else {}
    for step in steps_of(spec):
        if step.name == "choose":
            return
        for name in step.outputs:
            _copy(origin / name, folder / name)
        for name in step.unrecorded:
            if (origin / name).exists():
                _copy(origin / name, folder / name)
        write_json(folder / TIMINGS, kept := {**kept, **{n: timings[n] for n in [step.name] if n in timings}})
        versioning.record(folder, step.name)


def _copy(source: Path, target: Path) -> None:
    if target.exists():
        return
    with writing(target) as temporary:
        if source.is_dir():
            shutil.copytree(source, temporary)
        else:
            shutil.copyfile(source, temporary)
