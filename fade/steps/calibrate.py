"""Step ``calibrate``: the CLIP of an erasure by name as its judges, asked first whether it can tell it   (ours).

The base's own pictures (``generated/``) are what it learns its levels from and is asked about. What it does not find in
them is left out of what is judged: names that it cannot tell have nothing to lose. The concept, its surrogate and what
of its neighbours it knows stay; what it says of these is written down with intervals, and the gate asks the same anew
of other pictures of the base.

Several such erasures that shall be live at once are judged together by one judge of all their names: the same CLIP,
calibrated on the pictures of all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from fade.data.catalog import load_catalog, load_pictures, read_concepts_file
from fade.data.splits import NOTHING
from fade.evaluation.clip_score import Clip, embedded_pictures, load_clip
from fade.evaluation.detectors import DETECTORS, AllCalibrated, calibrate_detector
from fade.evaluation.distances import shuffled_patches
from fade.evaluation.figures import Rate, rate
from fade.evaluation.records import Record, dump
from fade.evaluation.zero_shot import NOBODY, SENTENCES, Classes, calibrated, class_texts, save_zero_shot
from fade.files import write_json, writing
from fade.spec import CALIBRATED, GENERATED, Spec, load_spec
from fade.steps.given import load_given

FIGURES = "calibration.json"
LEAST = 0.5
"""Of what a name is asked for in: it is judged if it is called by its name in more than this share."""


class Calibration(Record):
    """How well the CLIP knows what the base draws.

    Attributes:
        concept: share of the concept's pictures that it calls by its name.
        in_neighbours: share of its neighbours' pictures that it calls so too.
        recognised: over every name that is judged.
        left_out: names that it cannot tell; they are kept in training, and not judged.
    """

    concept: Rate | None = None
    in_neighbours: Rate | None = None
    recognised: Rate | None = None
    left_out: tuple[str, ...] = ()


def calibrate(folder: Path) -> None:
    """Write ``judges/``: both judges, what they can tell as a catalog without pictures, and ``calibration.json``."""
    spec = load_spec(folder)
    content = read_concepts_file(Path(spec.catalog))
    with writing(folder / CALIBRATED) as temporary:
        temporary.mkdir(parents=True)
        _write_judges([folder], [spec], temporary, content)
        if spec.detectors:
            dump(_detectors(spec, folder, content), temporary / DETECTORS)


def _detectors(spec: Spec, folder: Path, content: Mapping[str, Any]) -> AllCalibrated:
    """The further judges, each told by the base's own pictures, and by those that were given."""
    table = load_catalog(folder / GENERATED)
    mine = (table[spec.kind] == spec.concept).to_numpy()
    pictures = load_pictures(folder / GENERATED, table)
    own, others = list(pictures[mine]), list(pictures[~mine])
    given = list(load_given(content["given"], size=pictures.shape[1])) if "given" in content else []
    return AllCalibrated(judges=tuple(calibrate_detector(one, own, others, given=given) for one in spec.detectors))


def calibrate_together(folders: Sequence[Path], specs: Sequence[Spec], out: Path) -> None:
    """Write into ``out`` the judges of several erasures by name, and the concepts of all of them as one catalog.

    What an erasure's own calibration left out stays out. The figures are of the first erasure's concept.
    """
    out.mkdir(parents=True)
    contents = [read_concepts_file(folder / CALIBRATED) for folder in folders]
    erased = {pair.concept for spec in specs for pair in spec.pairs}
    # A concept that is erased here may be one of those that are kept there: what its own erasure says of it counts.
    own = [one for content in contents for one in content["concepts"] if one["name"] in erased and one["aliases"]]
    entries = {one["name"]: one for content in contents for one in content["concepts"]}
    concepts = [*{**entries, **{one["name"]: one for one in own}}.values()]
    neighbours = [name for content in contents for name in content["neighbours"]]
    _write_judges(folders, specs, out, {**contents[0], "concepts": concepts, "neighbours": neighbours})


def _write_judges(folders: Sequence[Path], specs: Sequence[Spec], out: Path, content: Mapping[str, Any]) -> None:
    names = {kind: [c["name"] for c in content["concepts"] if c["kind"] == kind] for kind in ("object", "style")}
    if specs[0].judges == NOBODY:
        nothing = torch.zeros(1, 1)
        blind = {kind: Classes(tuple(names[kind]), nothing, nothing[0], 1.0) for kind in names}
        for name in ("development", "report"):
            save_zero_shot(out, name, clip=NOBODY, classes=blind)
        dump(Calibration(), out / FIGURES)
    else:
        names = _judging(specs, folders, out, names, content["neighbours"])
    kept = [c for c in content["concepts"] if c["name"] in names[c["kind"]]]
    write_json(out / "concepts.json", {**content, "concepts": kept})


def _drawn(folder: Path, names: Mapping[str, Sequence[str]]) -> tuple[pd.DataFrame, NDArray[np.uint8]]:
    """What the base drew for an erasure, of these names alone."""
    table = load_catalog(folder / GENERATED)
    table = table[table["object"].isin(names["object"]) & table["style"].isin(names["style"])].reset_index(drop=True)
    return table, load_pictures(folder / GENERATED, table)


def _judging(
    specs: Sequence[Spec], folders: Sequence[Path], out: Path, names: dict[str, list[str]], neighbours: Sequence[str]
) -> dict[str, list[str]]:
    """Write both judges and the figures; gives the names that are judged."""
    spec = specs[0]
    clip = load_clip(spec.judges)
    tables, parts = zip(*(_drawn(folder, names) for folder in folders), strict=True)
    table, pictures = pd.concat(tables, ignore_index=True), np.concatenate(parts)
    seen = embedded_pictures(clip, list(pictures))
    shuffled = embedded_pictures(clip, list(shuffled_patches(pictures, seed=spec.split.seed)))
    always = {name for one in specs for pair in one.pairs for name in (pair.concept, pair.surrogate)} - {NOTHING}
    for name, sentences in (("development", 1), ("report", len(SENTENCES["object"]))):
        classes = {
            kind: _classes(
                clip, kind, known, seen=seen, shown=table[kind].tolist(), shuffled=shuffled, sentences=sentences
            )
            for kind, known in names.items()
        }
        if name == "development":  # one set of names for both judges
            names = {kind: _known(one, seen, table[kind], always) for kind, one in classes.items()}
            classes = {
                kind: _classes(
                    clip, kind, known, seen=seen, shown=table[kind].tolist(), shuffled=shuffled, sentences=sentences
                )
                for kind, known in names.items()
            }
        save_zero_shot(out, name, clip=spec.judges, classes=classes)
    dump(_figures(classes, seen, table, spec, neighbours), out / FIGURES)
    return names


def _classes(
    clip: Clip, kind: str, names: Sequence[str], *, seen: Tensor, shown: Sequence[str], shuffled: Tensor, sentences: int
) -> Classes:
    return calibrated(names, class_texts(clip, kind, names, sentences=sentences), seen, shown, shuffled)


def _known(classes: Classes, seen: Tensor, shown: pd.Series, always: set[str]) -> list[str]:
    """The names that it finds in more than half of what was asked for by them, and ``always`` those."""
    called = np.asarray(classes.called(seen), dtype=object)
    right = pd.Series(called == shown.to_numpy()).groupby(shown.to_numpy()).mean()
    found = [name for name in classes.names if name in always or right.get(name, 0.0) > LEAST]
    # Where it can tell nothing beside the concept all stay, and the gate finds that it recognises none.
    return found if set(found) - always else list(classes.names)


def _figures(
    classes: Mapping[str, Classes], seen: Tensor, table: pd.DataFrame, spec: Spec, neighbours: Sequence[str]
) -> Calibration:
    pair = spec.pairs[0]
    called = {kind: np.asarray(one.called(seen), dtype=object) for kind, one in classes.items()}
    shown, mine = table[pair.kind].to_numpy(), called[pair.kind]

    def share(rows: Any, name: Any) -> Rate | None:
        return rate(int((mine[rows] == name).sum()), int(rows.sum())) if rows.any() else None

    judged = np.isin(shown, classes[pair.kind].names)
    known = {name for one in classes.values() for name in one.names}
    everything = {*table["object"], *table["style"]}
    return Calibration(
        concept=share(shown == pair.concept, pair.concept),
        in_neighbours=share(np.isin(shown, neighbours), pair.concept),
        recognised=share(judged, shown[judged]),
        left_out=tuple(sorted(everything - known)),
    )
