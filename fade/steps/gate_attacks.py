"""Step ``gate_attacks``: the attacks whose bounds the gate asks for, before it judges. Their figures: attacked.json."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from fade.config import ATTACKED, load_spec
from fade.files import write_json
from fade.steps.attacks import attack_figures, run


def gate_attacks(folder: Path) -> Iterator[str]:
    """Run them on a finished adapter; yields the kind of attack that is at work, as it goes."""
    kinds = load_spec(folder).gate.attack_kinds
    for kind in kinds:
        for _ in run(folder, kind):
            yield kind
    write_json(folder / ATTACKED, attack_figures(folder, kinds))


def main() -> None:
    """Run the step for one erasure's folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    with tqdm(desc="attacks") as bar:
        for kind in gate_attacks(parser.parse_args().folder):
            bar.set_postfix_str(kind)
            bar.update()


if __name__ == "__main__":
    main()
