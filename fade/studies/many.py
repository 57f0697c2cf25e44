"""An erasure of many concepts at once, for the wide benchmark: made as a trial is, and judged by the protocol of many.

As a program: ``python -m fade.studies.many FOLDER``, where ``spec.yaml`` lies; it writes ``many.json`` there. Where a
folder ``alone`` lies beside it, with a folder for each concept, each is erased by an adapter of its own, and all are
judged live together: stacked, as erasures that are asked for one after the other are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr

from fade.adapters.store import activate, apply_adapter, restore_base
from fade.asking.interference import interference
from fade.concepts import CAPTION_TEMPLATE, Concept
from fade.data.catalog import load_concepts, load_templates
from fade.data.splits import find_pairs
from fade.errors import FadeError
from fade.evaluation.judges import load_judge
from fade.evaluation.many import Pair, Pictures, many_figures, many_protocol
from fade.evaluation.neighbours import find_neighbours
from fade.methods.fade.sparse_lora import computed_whole
from fade.models.base import Base
from fade.models.family import load_base
from fade.pipeline import Step
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
from fade.studies.wide import JUDGE, cost

FIGURES, ALONE = "many.json", "alone"
FEW = 50
"""From so many concepts on one seed is drawn of every prompt; two where there are fewer."""


def run_many(spec: Spec, *, root: Path, say: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Make what is not there yet of an erasure, judge it, and give its row (``fade.evaluation.many.many_figures``).

    Args:
        root: a folder per erasure, named by the spec's id.
        say: told the name of each step before it begins.
    """
    steps = _steps(spec)
    folder = emptied_if_other(root / spec.id, made_by(steps, spec.method))
    code = judged_by("fade.studies.many")
    if (kept := kept_row(folder, FIGURES, code)) is not None:
        return kept
    costs = _made(spec, folder, steps, root, say)
    if say is not None:
        say("judge")
    seconds = costs.pop("method_seconds")
    row = {"at_once": len(spec.pairs), **judged(spec, folder / "adapter"), **costs, "seconds": seconds}
    keep_row(folder, FIGURES, code, row)
    return row


def run_stacked(folder: Path, *, say: Callable[[str], None] | None = None) -> dict[str, Any]:
    """The row of a spec's concepts, each erased by the adapter of a spec in ``alone``, all live together.

    Seconds, the processor's seconds and bytes are the sums over the adapters.
    """
    spec, root = load_spec(folder), folder / ALONE
    made = []
    for place in sorted(root.iterdir()):
        single = load_spec(place)
        steps = _steps(single)
        emptied_if_other(place, made_by(steps, single.method))
        if say is not None:
            say(single.concept)
        made.append(_made(single, place, steps, folder.parent, None))
    code = f"{judged_by('fade.studies.many')}:{','.join(one['adapter_sha256'] for one in made)}"
    if (kept := kept_row(folder, FIGURES, code)) is not None:
        return kept
    if say is not None:
        say("judge")
    row = {
        "at_once": len(spec.pairs),
        **judged(spec, *(root / one["erasure"] / "adapter" for one in made)),
        "seconds": round(sum(one["method_seconds"] for one in made), 2),
        "cpu_seconds": round(sum(one["cpu_seconds"] for one in made), 2),
        "adapter_bytes": sum(one["adapter_bytes"] for one in made),
        "adapters": len(made),
        "erasure": folder.name,
    }
    keep_row(folder, FIGURES, code, row)
    return row


def _steps(spec: Spec) -> list[Step]:
    return [step for step in steps_of_trial(spec) if step.name not in ("attack", "evaluate")]


def _made(
    spec: Spec, folder: Path, steps: Sequence[Step], root: Path, say: Callable[[str], None] | None
) -> dict[str, Any]:
    """Make what is not there yet of an adapter; gives what it cost."""
    save_spec(spec, folder)
    take_shared(spec, folder, root, say)
    run_steps(folder, steps, say)
    return cost(folder, [step.name for step in steps if step.makes_adapter])


def judged(spec: Spec, *adapters: Path) -> dict[str, Any]:
    """The figures of adapters that are live together, of all that the spec erases; see ``many_figures``."""
    torch.set_num_threads(spec.threads)
    concepts = load_concepts(Path(spec.catalog))
    pairs = [(replace(one, group=concepts[one.name].group), other) for one, other in find_pairs(concepts, spec.pairs)]
    base = load_base(spec.base, expected_sha256=spec.base_sha256, weights=spec.weights)
    seeds = spec.evaluate.seeds[: 1 if len(pairs) >= FEW else 2]
    template = (load_templates(Path(spec.catalog)) or (CAPTION_TEMPLATE,))[0]
    names = domains(concepts)
    near = near_erased(base, pairs, concepts.values())
    protocol = many_protocol(pairs, names, seeds, neighbours=near, template=template)
    was = _drawn_by_base(base, spec, {name: protocol[name] for name in ("instead", "kept")})
    for number, adapter in enumerate(adapters):
        apply_adapter(base, adapter, name=f"candidate{number}")
    activate(base, {f"candidate{number}": 1.0 for number in range(len(adapters))})
    with computed_whole(base.network):
        now: dict[str, Pictures] = {
            name: ended(pictures_now(base, spec, protocol[name], done=0)) for name in ("erased", "kept")
        }
    restore_base(base)
    judge = load_judge(Path(spec.judges), JUDGE, called=[*names[0], *names[1]])
    before = {
        name: named_by(judge, was[name], protocol[name])
        if len(was[name])
        else protocol[name].assign(seen_object=[], seen_style=[])
        for name in was
    }
    after = {name: named_by(judge, now[name], protocol[name]) for name in now}
    row = many_figures(before, after, (was["kept"], now["kept"]), pairs)
    return {
        **row,
        **_foretold(base, pairs, concepts, row["moved"], spec),
        "samples": len(protocol["erased"]) + len(protocol["kept"]),
        "seeds": list(seeds),
    }


def near_erased(base: Base, pairs: Sequence[Pair], concepts: Iterable[Concept]) -> frozenset[str]:
    """Concepts that are neighbours of an erased one (``find_neighbours``) and are not erased themselves."""
    known = list(concepts)
    found = {name for concept, _ in pairs for name in find_neighbours(base, concept, None, known)}
    return frozenset(found - {concept.name for concept, _ in pairs})


def _foretold(
    base: Base, pairs: Sequence[Pair], concepts: Mapping[str, Concept], moved: Mapping[str, float], spec: Spec
) -> dict[str, Any]:
    """What was to be expected of each kept concept, and its rank correlation (Spearman) with what was drawn."""
    beside = [one for one in concepts.values() if one.name in moved or one.kind not in {a.kind for a, _ in pairs}]
    kept = [concepts[name] for name in moved]
    templates = load_templates(Path(spec.catalog)) or (CAPTION_TEMPLATE,)
    found = interference(base, pairs, kept, beside, templates=templates)
    names = list(moved)
    rank = spearmanr([found[name] for name in names], [moved[name] for name in names]).statistic
    return {"foretold": found, "rank_correlation": None if np.isnan(rank) else float(rank)}


def _drawn_by_base(base: Base, spec: Spec, parts: dict[str, pd.DataFrame]) -> dict[str, Pictures]:
    """The base's pictures of each part: a prompt that stands in several rows is drawn once."""
    key = ["object", "style", "seed", "prompt"]
    asked = pd.concat([part[key] for part in parts.values()]).drop_duplicates(ignore_index=True)
    drawn = ended(base_pictures(base, spec, asked))
    return {
        name: drawn[part[key].merge(asked.reset_index(), on=key)["index"].to_numpy()] for name, part in parts.items()
    }


def main() -> None:
    """Run the erasure whose ``spec.yaml`` lies in a folder; prints each step's name as it begins."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    try:
        if (folder / ALONE).is_dir():
            run_stacked(folder, say=report_progress)
        else:
            run_many(load_spec(folder), root=folder.parent, say=report_progress)
    except FadeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
