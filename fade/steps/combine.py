"""Step ``combine``: several finished erasures live at once, judged together.

Each adapter was trained against the base alone; whether they hold on top of each other is a question of
its own. ``python -m fade.steps.combine OUT FOLDER FOLDER ... [--adapter FOLDER --adapter FOLDER ...]``
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from fade.adapters.card import load_card
from fade.adapters.store import activate, apply_adapter
from fade.concepts import CAPTION_TEMPLATE, caption
from fade.data.catalog import load_concepts, load_templates
from fade.data.splits import find_pairs
from fade.evaluation.accuracy import canvas_protocol
from fade.evaluation.attacked import Attack, Attacks
from fade.evaluation.gate import strictest
from fade.evaluation.measured import Combination
from fade.evaluation.records import dump, load
from fade.evaluation.report import erasure_sheet
from fade.files import writing
from fade.models.family import load_base
from fade.spec import ATTACKED, CALIBRATED, Spec
from fade.steps.alike import check_alike
from fade.steps.calibrate import calibrate_together
from fade.steps.drawn import domains
from fade.steps.evaluate import measured, neighbours_of
from fade.words import spoken


def combine(folders: Sequence[Path], out: Path, *, adapters: Sequence[Path] | None = None) -> Iterator[tuple[int, int]]:
    """Write ``out``: metrics.json, samples.parquet and sheet.png, as of one erasure; yields (pictures done, of all).

    Args:
        folders: the erasures.
        adapters: the adapter of each; those in the erasures' folders if None.

    Raises:
        ConfigError: erasures of different bases, catalogs, judges or evaluation settings, or one twice.
        DataError: no erasure was given.
    """
    specs = check_alike(folders)
    torch.set_num_threads(specs[0].threads)
    with writing(out) as temporary:
        temporary.mkdir(parents=True)
        first = specs[0]
        if first.by_name:
            own = temporary / CALIBRATED
            calibrate_together(folders, specs, own)
            first = first.model_copy(update={"judges": str(own), "catalog": str(own)})
        yield from _combine(temporary, folders, specs, first, adapters)


def _combine(
    out: Path, folders: Sequence[Path], specs: Sequence[Spec], first: Spec, adapters: Sequence[Path] | None
) -> Iterator[tuple[int, int]]:
    """Fill ``out``; ``first`` says what all are judged by."""
    concepts = load_concepts(Path(first.catalog))
    pairs = find_pairs(concepts, [pair for spec in specs for pair in spec.pairs])
    base = load_base(first.base, expected_sha256=first.base_sha256, weights=first.weights)
    template = (load_templates(Path(first.catalog)) or (CAPTION_TEMPLATE,))[0]
    say = spoken if first.by_name else caption
    samples = canvas_protocol(*domains(concepts), first.evaluate.seeds, template=template, say=say)
    chosen = adapters if adapters is not None else [folder / "adapter" for folder in folders]
    cards = [load_card(adapter) for adapter in chosen]

    def switch_on() -> None:
        for i, adapter in enumerate(chosen):
            apply_adapter(base, adapter, name=f"erasure{i}")
        activate(base, {f"erasure{i}": 1.0 for i in range(len(chosen))})

    neighbours = neighbours_of(base, pairs, concepts)
    gate = strictest([spec.gate for spec in specs])
    samples, before, after, found = yield from measured(
        base,
        first,
        samples,
        switch_on,
        pairs=pairs,
        neighbours=neighbours,
        gate=gate,
        attacks=worst_attacks(folders, specs),
    )
    hashes = {spec.id: card["adapter_sha256"] for spec, card in zip(specs, cards, strict=True)}
    dump(Combination(**dict(found), adapters=hashes), out / "metrics.json")
    samples.to_parquet(out / "samples.parquet", index=False)
    sheet = erasure_sheet(samples, before, after, pairs, neighbours, seed=first.evaluate.seeds[0])
    sheet.save(out / "sheet.png")


def worst_attacks(folders: Sequence[Path], specs: Sequence[Spec]) -> Attacks:
    """Of each attack that a gate asks for, the figures with the highest bound among the erasures.

    An attack is of one concept and was run on its own adapter: it is asked of each, not anew of all of them at once.
    One that an erasure's gate asks for and that was not run is left out, so that the gate misses it.
    """
    worst: dict[str, Attack] = {}
    for name in {name for spec in specs for name in spec.gate.attacks or {}}:
        asked = [
            folder / ATTACKED for folder, one in zip(folders, specs, strict=True) if name in (one.gate.attacks or {})
        ]
        found = [load(Attacks, path).get(name) if path.is_file() else None for path in asked]
        run = [one for one in found if one is not None]
        if len(run) == len(found):
            worst[name] = max(run, key=lambda one: one.high)
    return Attacks(worst)


def main() -> None:
    """Combine finished erasures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--adapter", type=Path, action="append", help="of each erasure in turn, if not its own")
    arguments = parser.parse_args()
    with tqdm(desc="pictures") as bar:
        for done, total in combine(arguments.folders, arguments.out, adapters=arguments.adapter):
            bar.total = total
            bar.update(done - bar.n)


if __name__ == "__main__":
    main()
