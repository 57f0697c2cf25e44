"""Step ``gate_attacks``: the attacks whose bounds the gate asks for, before it judges. Their figures: attacked.json."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fade.evaluation.records import dump
from fade.spec import ATTACKED, load_spec
from fade.steps.attacks import attack_figures, run


def gate_attacks(folder: Path) -> Iterator[tuple[int, int]]:
    """Run them on a finished adapter; yields (kinds of attack done, of all), as it goes."""
    kinds = load_spec(folder).gate.attack_kinds
    for done, kind in enumerate(kinds):
        for _ in run(folder, kind):
            yield done, len(kinds)
    dump(attack_figures(folder, kinds), folder / ATTACKED)
