"""The steps of an erasure, once: what runs on what, when it applies, and where personal data lies in what it leaves.

Whoever goes through the steps reads this table: the flow, the DVC file, trials, the queue, MLflow's run, the purge. A
step is one row here and one function; no other file names it.

The function takes the erasure's folder, reads there ``spec.yaml`` and what earlier steps wrote, and writes its own
outputs. Where it takes long it is a generator: it yields pairs ``(done, total)``, or one object for each step of a
training, whose number the row knows (``length``). The table names functions as ``module:function``, so that reading
it loads none of them.

As a program it runs one of them, as DVC does: ``python -m fade.pipeline MODULE:FUNCTION FOLDER``.
"""

from __future__ import annotations

import argparse
import pkgutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fade.config import DRAWN_BY, OUR_METHOD, Settings, TuneSettings
from fade.spec import ATTACKED, CALIBRATED, GENERATED, POINTS, Spec, load_spec

LOSSES = "curve.csv"
"""Of a step that trains: its losses, a row a step of the training."""
TIMINGS = "timings.json"
"""In an erasure's folder: seconds and peak memory of each step that ran, by its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of an erasure.

    Attributes:
        name: what it is called in DVC, Prefect, MLflow, timings and the ledger.
        function: ``module:function``.
        inputs: what it reads: names in the erasure's folder, and paths under ``{catalog}``, ``{pictures}`` (the catalog
            that the splits are made of), ``{base}``, ``{judges}``, ``{clip}`` (of an erasure by name). What another
            step makes counts where that applies.
        outputs: what it writes in the erasure's folder; DVC records it.
        parameters: the fields of the spec that it reads, or parts of them (``distill.stop_at``).
        personal: what holds personal data, and so goes with a purge: an output, a file or folder of one
            (``evaluation/sheet.png``), or one of ``unrecorded``. Empty only if nothing does.
        unrecorded: what lies in the erasure's folder for it, or from it, beside what DVC records.
        logged: files and folders that are shown with the erasure's run in MLflow.
        applies: whether an erasure has this step.
        makes_adapter: whether its time is part of the method's, in comparisons.
        by_method: whether the code of the erasure's method is part of its own.
        in_trials: whether an experiment needs it, not the product alone.
        shared: whether trials that differ in nothing that it reads share what it made.
        length: how many objects its function yields, where it yields no pairs.
    """

    name: str
    function: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: tuple[str, ...]
    personal: tuple[str, ...]
    unrecorded: tuple[str, ...] = ()
    logged: tuple[str, ...] = ()
    applies: Callable[[Spec], bool] = lambda _: True
    makes_adapter: bool = False
    by_method: bool = False
    in_trials: bool = True
    shared: bool = False
    length: Callable[[Spec], int] = lambda _: 0

    @property
    def module(self) -> str:
        """The module whose imports are the code of the step."""
        return self.function.partition(":")[0]


def _made_here(spec: Spec) -> bool:
    return spec.imported is None


CATALOG_TABLE = "{pictures}/catalog.parquet"
"""Who reads it depends on more of a catalog than on an erasure's own pictures."""


def _masked(spec: Spec) -> bool:
    if spec.method == OUR_METHOD or not _made_here(spec):  # to look a method up loads torch
        return _made_here(spec)
    from fade.methods.registry import find_method

    return find_method(spec.method).masked


def _found(spec: Spec) -> bool:
    return _made_here(spec) and not spec.why_fixed


def _steps_of_method(spec: Spec) -> int:
    from fade.methods.registry import find_method

    return find_method(spec.method).steps(spec)


_WHAT = ("concept", "kind", "surrogate", "aliases", "also", "catalog")
_WHOSE = ("image_ids", "subjects", "overwrite", "neighbours", "data_free")
_JUDGED_BY = ("by_name", "clip_sha256")
"""In the specs of erasures by name alone."""
_BASE = ("base", "base_sha256", "threads", "weights")

STEPS = (
    # The base draws the pictures where none are left.
    Step(
        name="generate",
        function="fade.steps.generate:generate_catalog",
        inputs=("{catalog}/concepts.json", "{base}"),
        outputs=(GENERATED,),
        parameters=(
            *_BASE,
            *_WHAT,
            "neighbours",
            "data_free",
            "by_name",
            "split",
            *(f"evaluate.{name}" for name in DRAWN_BY),
        ),
        personal=(GENERATED,),
        applies=lambda spec: spec.data_free,
        shared=True,
    ),
    # A CLIP that was never trained on what it judges is asked first whether it can tell it.
    Step(
        name="calibrate",
        function="fade.steps.calibrate:calibrate",
        inputs=(GENERATED, "{catalog}/concepts.json", "{clip}"),
        outputs=(CALIBRATED,),
        parameters=(*_WHAT, *_JUDGED_BY, "judges", "detectors", "split.seed"),
        personal=(),
        applies=lambda spec: spec.by_name,
    ),
    Step(
        name="split",
        function="fade.steps.split:split",
        inputs=(CATALOG_TABLE, "{pictures}/concepts.json", "{pictures}/pictures"),
        outputs=("splits",),
        parameters=(*_WHAT, *_WHOSE, "split"),
        personal=("splits",),
        shared=True,
    ),
    Step(
        name="validate",
        function="tasks.expectations.validation:validate",
        inputs=("splits", CATALOG_TABLE, "{pictures}/pictures"),
        outputs=("validation.json",),
        parameters=(*_WHAT, *_WHOSE, "split", "distill.stop_at"),
        personal=("validation.json", "docs"),
        unrecorded=("docs",),
        logged=("validation.json",),
        in_trials=False,
    ),
    # How the adapter is made: of the steps that write "adapter" one applies to a spec. A method may have none of the
    # two that come before it (fade/methods/registry.py).
    Step(
        name="saliency",
        function="fade.steps.saliency:saliency",
        inputs=("splits", "validation.json", "{pictures}/pictures", "{base}"),
        outputs=("saliency.safetensors",),
        parameters=(
            *_BASE,
            "data_free",
            "saliency",
            "mask.granularity",
            "distill.timestep_power",
            "distill.precision",
        ),
        personal=("saliency.safetensors",),
        applies=_masked,
        makes_adapter=True,
        shared=True,
    ),
    Step(
        name="mask",
        function="fade.steps.mask:mask",
        inputs=("saliency.safetensors",),
        outputs=("mask",),
        parameters=("mask",),
        personal=(),
        logged=("mask/mask.json",),
        applies=_masked,
        makes_adapter=True,
    ),
    Step(
        name="distill",
        function="fade.steps.adapter:make_adapter",
        inputs=("splits", "mask", "{pictures}/pictures", "{base}"),
        outputs=("adapter", LOSSES),
        parameters=(*_BASE, "data_free", "method", "distill", "saliency.gradient_checkpointing"),
        personal=(),
        applies=lambda spec: _made_here(spec) and spec.method == OUR_METHOD and bool(spec.why_fixed),
        makes_adapter=True,
        by_method=True,
        length=lambda spec: spec.distill.in_force.steps,
    ),
    # It finds its settings: points are tried, then one of them is taken. A person who takes another trains nothing.
    Step(
        name="tune",
        function="fade.steps.tune:tune",
        inputs=("splits", "mask", "{catalog}/concepts.json", "{pictures}/pictures", "{base}", "{judges}"),
        outputs=(POINTS, LOSSES),
        parameters=(
            *(*_BASE, *_WHAT, "data_free", "method", "settings", "distill", *(f"evaluate.{name}" for name in DRAWN_BY)),
            *(f"tune.{name}" for name in TuneSettings.model_fields if name != "point"),
        ),
        personal=(),
        logged=(f"{POINTS}/points.json", f"{POINTS}/points.png"),
        applies=_found,
        makes_adapter=True,
        by_method=True,
        length=lambda spec: max(spec.tune.steps, default=1),
    ),
    Step(
        name="choose",
        function="fade.steps.choose:choose",
        inputs=(POINTS,),
        outputs=("adapter",),
        parameters=("tune.point", "surrogate_why"),
        personal=(),
        applies=_found,
        makes_adapter=True,
    ),
    # Any other method.
    Step(
        name="adapter",
        function="fade.steps.adapter:make_adapter",
        inputs=("splits", "mask", "{pictures}/pictures", "{base}"),
        outputs=("adapter", LOSSES),
        parameters=(
            *(*_BASE, "data_free", "method", "methods", "distill.precision", "distill.seed"),
            "saliency.gradient_checkpointing",
        ),
        personal=(),
        applies=lambda spec: _made_here(spec) and spec.method != OUR_METHOD,
        makes_adapter=True,
        by_method=True,
        length=_steps_of_method,
    ),
    # The adapter is another tool's: its files were laid in the folder.
    Step(
        name="foreign",
        function="fade.steps.foreign:convert_foreign",
        inputs=("foreign", "{base}"),
        outputs=("adapter",),
        parameters=(*_BASE, "imported"),
        personal=("foreign",),
        unrecorded=("foreign",),
        applies=lambda spec: spec.imported is not None,
        makes_adapter=True,
    ),
    # Only the attacks whose bounds the gate asks for.
    Step(
        name="attack",
        function="fade.steps.gate_attacks:gate_attacks",
        inputs=("adapter", "splits", "{catalog}/concepts.json", "{pictures}/pictures", "{base}", "{judges}", "{clip}"),
        outputs=(ATTACKED,),
        parameters=(
            *_BASE,
            *_WHAT,
            "data_free",
            *_JUDGED_BY,
            "distill.precision",
            "evaluate",
            "inversion",
            "attacks",
            "gate",
        ),
        personal=("attacks",),
        unrecorded=("attacks",),
        applies=lambda spec: bool(spec.gate.attacks),
    ),
    Step(
        name="evaluate",
        function="fade.steps.evaluate:evaluate",
        inputs=("adapter", "{catalog}/concepts.json", "{base}", "{judges}", "{clip}", ATTACKED, POINTS),
        outputs=("evaluation",),
        parameters=(*_BASE, *_WHAT, *_JUDGED_BY, "evaluate", "gate"),
        personal=tuple(f"evaluation/{name}" for name in ("samples.parquet", "sheet.png", "report.html", "beside")),
        logged=tuple(f"evaluation/{name}" for name in ("report.html", "beside", "sheet.png", "metrics.json")),
    ),
)


def steps_of(spec: Spec) -> list[Step]:
    """The steps of one erasure, in order."""
    return [step for step in STEPS if step.applies(spec)]


def inputs_of(step: Step, spec: Spec) -> list[str]:
    """What a step reads for a spec: without what only steps make that do not apply."""
    made = {output for one in steps_of(spec) for output in one.outputs}
    never = {output for one in STEPS for output in one.outputs} - made
    return [name for name in step.inputs if name not in never]


def maker_of(spec: Spec) -> Step:
    """The step that makes the adapter: the one that trains, if there is one."""
    steps = steps_of(spec)
    trained = (step for step in steps if LOSSES in step.outputs)
    return next(trained, None) or next(step for step in steps if "adapter" in step.outputs)


def sections_of(spec: Spec) -> list[str]:
    """The groups of settings that decided something: those which a step of the erasure reads as a whole."""
    read = {name for step in steps_of(spec) for name in step.parameters}
    return [name for name in Settings.model_fields if name in read and hasattr(getattr(spec, name), "model_dump")]


def personal_data() -> dict[str, tuple[str, ...]]:
    """What steps leave of personal data in an erasure's folder, whichever it had.

    Returns:
        Name of a file or folder to those files and folders of it that are personal; none: all of it is.
    """
    found: dict[str, tuple[str, ...]] = {}
    for name in (name for step in STEPS for name in step.personal):
        whole, _, part = name.partition("/")
        found[whole] = (*found.get(whole, ()), part) if part else ()
    return found


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a step is: ``done`` of ``total``. ``said`` is what its function yielded: of a training, its figures."""

    done: int
    total: int
    said: Any


def run(step: Step, folder: Path) -> Iterator[Progress]:
    """Run a step to its end for one erasure's folder; yields how far it is, nothing if its function does not say."""
    found = pkgutil.resolve_name(step.function)(folder)
    if not isinstance(found, Iterator):
        return
    length = step.length(load_spec(folder))
    for number, said in enumerate(found, start=1):
        done, total = said if isinstance(said, tuple) else (number, length)
        yield Progress(done, total, said)


def main() -> None:
    """Run one step of an erasure, with a bar on a terminal."""
    parser = argparse.ArgumentParser(description="Run one step of an erasure.")
    parser.add_argument("function", choices=[step.function for step in STEPS], metavar="MODULE:FUNCTION")
    parser.add_argument("folder", type=Path, help="of the erasure, with its spec.yaml")
    given = parser.parse_args()
    step = next(step for step in STEPS if step.function == given.function)
    with tqdm(desc=step.name, disable=None, file=sys.stderr) as bar:
        for at in run(step, given.folder):
            bar.total = at.total
            bar.update(at.done - bar.n)


if __name__ == "__main__":
    main()
