"""An erasure of the wide benchmark: make the adapter as a trial does, and judge it by the wide protocol.

As a program: ``python -m fade.studies.wide FOLDER``, where ``spec.yaml`` lies; it writes ``wide.json`` there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from fade.adapters.card import load_card
from fade.adapters.store import activate, apply_adapter, restore_base
from fade.concepts import CAPTION_TEMPLATE, Concept
from fade.data.catalog import load_concepts, load_templates
from fade.data.splits import find_pairs
from fade.errors import ConfigError, FadeError
from fade.evaluation.judges import Judge, load_judge
from fade.evaluation.neighbours import find_neighbours
from fade.evaluation.wide import PARTS, wide_figures, wide_protocol
from fade.files import read_json
from fade.methods.fade.sparse_lora import computed_whole
from fade.models.base import Base
from fade.models.family import load_base
from fade.pipeline import TIMINGS
from fade.spec import Spec, load_spec, save_spec
from fade.steps.drawn import base_pictures, domains, ended, named_by, pictures_now
from fade.studies.trial import (
    emptied_if_other,
    judged_by,
    keep_row,
    kept_row,
    made_by,
    report_progress,
    run_steps,
    steps_of_trial,
    take_shared,
)

FIGURES = "wide.json"
MOST_NEIGHBOURS = 8
JUDGE = "report"


def run_wide(spec: Spec, *, root: Path, say: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Make what is not there yet of an erasure, judge it, and give its row (``fade.evaluation.wide.wide_figures``).

    Args:
        root: a folder per erasure, named by the spec's id.
        say: told the name of each step before it begins.

    Raises:
        ConfigError: it erases several concepts at once.
    """
    if len(spec.pairs) != 1:
        raise ConfigError(f"The wide benchmark erases one concept at a time: got {len(spec.pairs)}.")
    steps = [step for step in steps_of_trial(spec) if step.name not in ("attack", "evaluate")]
    folder = emptied_if_other(root / spec.id, made_by(steps, spec.method))
    code = judged_by("fade.studies.wide")
    if (kept := kept_row(folder, FIGURES, code)) is not None:
        return kept
    save_spec(spec, folder)
    take_shared(spec, folder, root, say)
    run_steps(folder, steps, say)
    if say is not None:
        say("judge")
    row = {**_judged(spec, folder), **cost(folder, [step.name for step in steps if step.makes_adapter])}
    keep_row(folder, FIGURES, code, row)
    return row


def _judged(spec: Spec, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(spec.threads)
    concepts = load_concepts(Path(spec.catalog))
    ((concept, surrogate),) = find_pairs(concepts, spec.pairs)
    concept = replace(concept, group=concepts[concept.name].group)
    base = load_base(spec.base, expected_sha256=spec.base_sha256, weights=spec.weights)
    near = find_neighbours(base, concept, surrogate, concepts.values(), count=MOST_NEIGHBOURS if concept.group else 3)
    template = (load_templates(Path(spec.catalog)) or (CAPTION_TEMPLATE,))[0]
    names = domains(concepts)
    protocol = wide_protocol(concept, surrogate, near, names, spec.evaluate.seeds, template=template)
    # Of the rest the base's pictures are the same for every concept: they are drawn once, whole, and cut here.
    nobody = Concept("nobody", concept.kind)
    everyone = wide_protocol(nobody, None, (), names, spec.evaluate.seeds, template=template)["rest"]
    kept = everyone[(everyone["object"] != concept.name) & (everyone["style"] != concept.name)]
    was = {name: _drawn(base, spec, protocol[name]) for name in ("concept", "surrogate", "neighbours")}
    was["rest"] = _drawn(base, spec, everyone)[kept.index.to_numpy()]
    apply_adapter(base, folder / "adapter", name="candidate")
    activate(base, {"candidate": 1.0})
    with computed_whole(base.network):
        now = {
            name: ended(pictures_now(base, spec, protocol[name], done=0)) if len(protocol[name]) else was[name]
            for name in ("concept", "neighbours", "rest")
        }
    restore_base(base)
    judge = load_judge(Path(spec.judges), JUDGE, called=[*names[0], *names[1]])
    before, after = (_seen(judge, protocol, pictures) for pictures in (was, {**now, "surrogate": was["surrogate"]}))
    row = {"concept": concept.name, "kind": concept.kind, "surrogate": spec.pairs[0].surrogate}
    row |= wide_figures(before, after, (was["rest"], now["rest"]), concept, surrogate)
    return row | {"samples": sum(len(protocol[name]) for name in PARTS)}


def _seen(
    judge: Judge, protocol: Mapping[str, pd.DataFrame], pictures: Mapping[str, np.ndarray]
) -> dict[str, pd.DataFrame]:
    return {
        name: named_by(judge, pictures[name], part) if len(part) else part.assign(seen_object=[], seen_style=[])
        for name, part in protocol.items()
    }


def _drawn(base: Base, spec: Spec, samples: pd.DataFrame) -> Any:
    if samples.empty:
        return np.zeros((0, 1, 1, 3), dtype=np.uint8)
    return ended(base_pictures(base, spec, samples))


def cost(folder: Path, making: list[str]) -> dict[str, Any]:
    """What a trial's adapter cost: steps, points tried, seconds and peak memory (MiB) of what made it; bytes.

    ``cpu_seconds`` are the processor's, where all that made it noted them.
    """
    card, timings = load_card(folder / "adapter"), read_json(folder / TIMINGS)
    spent = [timings[name].get("cpu_seconds") for name in making]
    size = sum(path.stat().st_size for path in (folder / "adapter").glob("*.safetensors"))
    return {
        "steps": card["steps"],
        "tries": card.get("tries", 1),
        "method_seconds": round(sum(timings[name]["seconds"] for name in making), 2),
        **({"cpu_seconds": round(sum(spent), 2)} if None not in spent else {}),
        "peak_mib": max(timings[name]["peak_mib"] for name in making),
        "adapter_bytes": min(size, card.get("dense_bytes", size)),
        "adapter_sha256": card["adapter_sha256"],
        "erasure": folder.name,
    }


def main() -> None:
    """Run the erasure whose ``spec.yaml`` lies in a folder; prints each step's name as it begins."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    try:
        run_wide(load_spec(folder), root=folder.parent, say=report_progress)
    except FadeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
