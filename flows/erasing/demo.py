"""The main job: erase a person and a style, approve one, generate with it, roll it back, prove it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fade.asking.prepare import prepare_spec
from fade.concepts import caption
from fade.config import Settings, load_settings
from fade.evaluation.measured import Evaluation
from fade.evaluation.records import load
from fade.files import read_json, writing
from fade.models.denoiser import weights_sha256
from fade.pipeline import TIMINGS, maker_of
from fade.project import Project
from fade.sheets import labelled_sheet
from fade.spec import Spec
from fade.steps.catalog import ensure_catalog
from flows.erasing.erase import erase, prepare_folder
from flows.releasing.approval import approve, rollback
from flows.releasing.pictures import draw, live_adapters, load_with
from tasks.mlflow import registration, tracking

ERASED = (("astronaut", "cameraman"), ("neon", "photo"))
SHEET = Path("data/demo/rollback.png")


@dataclass(frozen=True, slots=True)
class Outcome:
    """One erasure of the demo, as its row of the table."""

    spec: Spec
    version: tracking.AdapterVersion
    row: dict[str, Any]


def erase_one(concept: str, surrogate: str, *, project: Project, settings: Settings) -> Outcome:
    """Spec, flow and figures of one erasure."""
    begun = time.perf_counter()
    spec = prepare_spec(concept, surrogate, project=project, settings=settings)
    folder = prepare_folder(spec)
    version = erase(spec.id)
    return Outcome(spec, version, figures_row(spec, folder, version, seconds=time.perf_counter() - begun))


def figures_row(spec: Spec, folder: Path, version: tracking.AdapterVersion, *, seconds: float) -> dict[str, Any]:
    """Figures of an erasure, rates as fractions of 1, judged by the report judge."""
    metrics = load(Evaluation, folder / "evaluation" / "metrics.json")
    before, after = metrics.report.before, metrics.report.after
    # Of a CLIP that cannot tell the concept a figure would mean nothing.
    unseen = spec.by_name and metrics.gate.verdict == "unjudged"
    return {
        "concept": ", ".join(pair.concept for pair in spec.pairs),
        "surrogate": ", ".join(pair.surrogate for pair in spec.pairs),
        "kind": registration.kind_of(spec),
        **{name: None if unseen else found.value for name, found in after.rates.items()},
        "base_ira": before.ira.value,
        "base_cra": before.cra.value,
        "intervals": {name: [found.low, found.high] for name, found in after.rates.items()},
        "neighbours": {name: found.value for name, found in after.neighbours.items()},
        "drift": metrics.drift,
        "samples": metrics.samples,
        "gate": version.gate,
        "distill_seconds": read_json(folder / TIMINGS).get(maker_of(spec).name, {"seconds": 0.0})["seconds"],
        "total_seconds": round(seconds, 2),
        "adapter_bytes": metrics.adapter_bytes,
        "adapter_sha256": version.adapter_sha256,
        "model_version": f"{version.model}/{version.version}",
        "folder": str(folder),
    }


def run_demo(project: Project, say: Callable[[str], None]) -> dict[str, Any]:
    """Both erasures, then approval and rollback of the first.

    Args:
        project: the canvas: its concepts are what is erased.
        say: called with a line for each thing that happens.

    Returns:
        ``erasures``, a row each, and ``rollback_bits_equal``: weights and picture are the base's again.
    """
    # Not by `dvc repro`: a clone's lock file stays as it is, also where another processor renders other last bits.
    settings = load_settings(project.params)
    if ensure_catalog(project):
        say("Rendered the canvas.")
    outcomes = []
    for concept, surrogate in ERASED:
        say(f"Erasing {concept} (its prompts shall give: {surrogate}) ...")
        outcomes.append(erase_one(concept, surrogate, project=project, settings=settings))
        say(f"  done in {outcomes[-1].row['total_seconds']:.0f} s, gate {outcomes[-1].version.gate}")
    return {
        "erasures": [outcome.row for outcome in outcomes],
        "rollback_bits_equal": prove_rollback(outcomes[0], say),
        "rollback_sheet": str(SHEET),
    }


def prove_rollback(outcome: Outcome, say: Callable[[str], None]) -> bool:
    """Base, approved, rolled back: the same prompts and seed; True if the last equals the first in every bit."""
    styles = ("photo", "sketch", "pop art", "thermal")
    prompts = [caption(outcome.spec.concept, style) for style in styles]
    base = load_with(Path(outcome.spec.base), [])
    untouched, first = weights_sha256(base.network), draw(base, prompts, seed=188)
    version = approve(outcome.version.model, outcome.version.version)
    say(f"Approved {version.model} version {version.version}: it is live.")
    live = live_adapters(outcome.spec.base_sha256)
    changed = draw(load_with(Path(outcome.spec.base), live), prompts, seed=188)
    rollback(version.model)
    say(f"Rolled back {version.model}.")
    remaining = [one for one in live_adapters(outcome.spec.base_sha256) if one.model == version.model]
    restored = load_with(Path(outcome.spec.base), remaining)
    last = draw(restored, prompts, seed=188)
    rows = [("base", list(first)), ("approved", list(changed)), ("rolled back", list(last))]
    with writing(SHEET) as temporary:
        labelled_sheet(rows, styles, title=f"{outcome.spec.concept}: approved, then rolled back").save(temporary)
    differs = not np.array_equal(first, changed)
    return differs and bool(np.array_equal(first, last)) and weights_sha256(restored.network) == untouched
