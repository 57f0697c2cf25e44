"""A base and judges of one's own: trained on any catalog as the built-in ones are on the canvas.

Networks, losses and settings are those of the stages ``base`` and ``judges``; the captions are the catalog's.
What is under way is kept beside the new folder, so that a training that was cut off goes on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from fade.concepts import CAPTION_TEMPLATE, PLAIN_PARAPHRASES, PLAIN_STYLE, STYLE_ONLY, Concept, caption
from fade.data.catalog import load_catalog, load_concepts, load_pictures, load_templates
from fade.errors import DataError
from fade.evaluation.accuracy import canvas_protocol
from fade.evaluation.figures import JudgeAccuracy, JudgesReport
from fade.evaluation.judges import JUDGES, load_judge, new_judge, save_judge, train_judge
from fade.evaluation.records import dump
from fade.files import writing
from fade.models.training import loop
from fade.steps.base_report import report_pictures
from fade.steps.judges import accuracy

Progress = tuple[str, int, int, float | None]
"""What is under way, how much of it is done, of how much, and a loss."""


def train_base(catalog: Path, out: Path, *, params: dict[str, Any]) -> Iterator[Progress]:
    """Train a base on a catalog's training pictures; write the folder ``out``.

    Args:
        params: as the section ``base`` of params.yaml; how many pictures there are, the catalog says.

    Raises:
        DataError: no pictures, of several sizes, or of one that the networks cannot halve.
        ConfigError: what is kept of an earlier training was made of other pictures or settings.
    """
    torch.set_num_threads(params["threads"])
    table = _rows(catalog, "train")
    captions = captions_of(table, load_concepts(catalog), load_templates(catalog))
    used = {name: value for name, value in params.items() if name != "pictures_per_pair"}
    for step in loop.train_base(load_pictures(catalog, table), captions, out, params=used):
        yield step.part, step.step, step.steps, step.loss


def captions_of(
    table: pd.DataFrame, concepts: dict[str, Concept], templates: Sequence[str] | None
) -> list[tuple[str, ...]]:
    """All captions each picture may carry in training, its canonical one first.

    By the catalog's sentences these are every name in every sentence, and the style alone; of the canvas
    exactly those its base learnt. A picture with a caption of its own also learns the sentence that judging uses.
    """
    if templates is None:
        rows = zip(table["caption"], table["object"], table["style"], strict=True)
        return [(own, caption(one, style, CAPTION_TEMPLATE)) for own, one, style in rows]
    found = {}
    for one, style in set(zip(table["object"], table["style"], strict=True)):
        styled = "{style}" in templates[0]
        sentences = [*templates, *(PLAIN_PARAPHRASES if styled and style == PLAIN_STYLE else ())]
        named = [caption(name, style, s) for name in (one, *concepts[one].aliases) for s in sentences]
        found[one, style] = (*named, *([STYLE_ONLY.format(style=style)] if styled else []))
    return [found[pair] for pair in zip(table["object"], table["style"], strict=True)]


def _rows(catalog: Path, split: str) -> pd.DataFrame:
    """Rows of a split in order of their ids.

    Raises:
        DataError: there are none.
    """
    table = load_catalog(catalog)
    rows = table[table["split"] == split].sort_values("image_id", ignore_index=True)
    if rows.empty:
        raise DataError(f"{catalog} holds no {split} pictures. Add some with `fade catalog add`.")
    return rows


def report_on(
    catalog: Path, built: Path, judges: Path | None, out: Path, *, params: dict[str, Any]
) -> Iterator[Progress]:
    """Draw every pair of the catalog; write ``sheet.png``, and with judges ``metrics.json``, into ``out``.

    Args:
        params: as the section ``base_report`` of params.yaml.
    """
    table = load_catalog(catalog)
    names = {kind: [c.name for c in load_concepts(catalog).values() if c.kind == kind] for kind in ("object", "style")}
    shown = set(zip(table["object"], table["style"], strict=True))
    template = (load_templates(catalog) or (CAPTION_TEMPLATE,))[0]
    samples = canvas_protocol(names["object"], names["style"], params["seeds"], template=template)
    samples = samples[[pair in shown for pair in zip(samples["object"], samples["style"], strict=True)]]
    for done, count in report_pictures(
        samples, names["object"], names["style"], out, base=built, judges=judges, params=params
    ):
        yield "pictures", done, count, None


def judges_identity(catalog: Path, params: dict[str, Any]) -> str:
    """Hash of what judges learn from: pictures, labels and settings.

    Raises:
        DataError: the catalog holds no training pictures.
    """
    train = _rows(catalog, "train")
    labels = list(zip(train["object"], train["style"], strict=True))
    return hashlib.sha256(json.dumps([train["sha256"].tolist(), labels, params]).encode()).hexdigest()[:16]


def train_judges(catalog: Path, out: Path, *, params: dict[str, Any]) -> Iterator[Progress]:
    """Train the judges ``development`` and ``report`` on a catalog; write them and ``metrics.json`` into ``out``.

    A judge that is done is kept beside ``out`` until both are.

    Args:
        params: as the section ``judges`` of params.yaml.

    Raises:
        DataError: the catalog holds no training or no holdout pictures, or they differ in size.
    """
    torch.set_num_threads(params["threads"])
    train, holdout = _rows(catalog, "train"), _rows(catalog, "holdout")
    pixels, unseen = load_pictures(catalog, train), load_pictures(catalog, holdout)
    names = {kind: [c.name for c in load_concepts(catalog).values() if c.kind == kind] for kind in ("object", "style")}
    kept = out.with_name(f".{out.name}.{judges_identity(catalog, params)}.partial")
    known: dict[str, JudgeAccuracy] = {}
    for name in JUDGES:
        settings = params[name]
        if not (kept / f"{name}.json").is_file():
            judge = new_judge(settings["architecture"], names["object"], names["style"], seed=settings["seed"])
            chosen = {n: settings[n] for n in ("steps", "batch", "learning_rate", "scrambled_share", "seed")}
            for step, loss in train_judge(judge, pixels, train["object"].tolist(), train["style"].tolist(), **chosen):
                yield f"judge {name}", step, settings["steps"], loss
            save_judge(kept, name, judge)
        shown = list(holdout.itertuples())
        known[name] = accuracy(load_judge(kept, name), unseen, shown, seed=settings["seed"])
    with writing(out) as temporary:
        shutil.copytree(kept, temporary)
        dump(JudgesReport(**known), temporary / "metrics.json")
    shutil.rmtree(kept)
