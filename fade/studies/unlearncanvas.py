"""Step ``unlearncanvas``: the published benchmark on a user's checkpoint, in shards that resume.

OUT/pictures/<Style>_<Object>_seed<seed>.jpg     drawn, in the published layout; one that is there is not drawn again
OUT/samples.parquet, OUT/metrics.json            what the classifiers said; UA, IRA, CRA, FID

``python -m fade.studies.unlearncanvas draw OUT --base B --shard 0 --shards 4`` draws a share; ``judge`` ends it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from fade.adapters.store import activate, apply_adapter
from fade.errors import ConfigError, DataError, FadeError, listing
from fade.evaluation.classifiers import Classifier, classify, load_classifiers
from fade.evaluation.clip_score import load_clip, mean_scores
from fade.evaluation.distances import fid, kid, scaled
from fade.evaluation.extractors import Extractor, load_extractor
from fade.evaluation.measured import ClipScores, FeatureDistances
from fade.evaluation.records import dump, load
from fade.evaluation.unlearncanvas import (
    GUIDANCE,
    STEPS,
    MadeWith,
    UnlearnCanvas,
    kind_of_target,
    unlearncanvas_figures,
    unlearncanvas_protocol,
)
from fade.files import read_json, writing
from fade.models.family import load_base
from fade.models.generate import generate_batch
from fade.models.source import base_sha256

MADE_WITH = "made_with.json"
STYLE_FEATURES = "style_classifier"
REAL_EACH = 5
"""Real pictures of each pair that the published FID compares with: 1.jpg to 5.jpg."""


def begin(
    out: Path, *, base: str, target: str, adapter: Path | None = None, steps: int = STEPS, guidance: float = GUIDANCE
) -> MadeWith:
    """Write (or check) what a folder's pictures are made with, so that two checkpoints never share one.

    Raises:
        ConfigError: the folder holds another run's pictures, or there is no such target.
    """
    kind_of_target(target)
    asked = MadeWith(
        base_sha256=base_sha256(base),
        adapter=None if adapter is None else read_json(adapter / "card.json")["adapter_sha256"],
        target=target,
        steps=steps,
        guidance=guidance,
    )
    if (out / MADE_WITH).is_file():
        if (found := load(MadeWith, out / MADE_WITH)) != asked:
            other = [f"{key} {value!r}" for key, value in dict(found).items() if value != getattr(asked, key)]
            raise ConfigError(f"{out} holds the pictures of another run ({listing(other)}). Give another folder.")
    else:
        dump(asked, out / MADE_WITH)
    return asked


def draw(
    out: Path,
    *,
    base: str,
    adapter: Path | None = None,
    shard: int = 0,
    shards: int = 1,
    batch: int = 1,
    precision: str = "fp32",
    styles: tuple[str, ...] | None = None,
    objects: tuple[str, ...] | None = None,
) -> Iterator[tuple[int, int]]:
    """Draw one shard's pictures that are not there yet; yields (there, of all in the shard).

    Args:
        styles, objects: only these of the benchmark's, for a look at a part.

    Raises:
        ConfigError: no such shard, or ``begin`` was not called for the folder.
    """
    if not 0 <= shard < shards:
        raise ConfigError(f"Shard {shard} of {shards} does not exist: expected 0 to {shards - 1}.")
    settings = load(MadeWith, out / MADE_WITH)
    table = _part(styles, objects).iloc[shard::shards]
    missing = table[[not (out / "pictures" / file).is_file() for file in table["file"]]]
    done = len(table) - len(missing)
    yield done, len(table)
    if missing.empty:
        return
    sd = load_base(base, expected_sha256=settings.base_sha256)
    if adapter is not None:
        apply_adapter(sd, adapter, name="erasure")
        activate(sd, {"erasure": 1.0})
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    for start in range(0, len(missing), batch):
        rows = missing.iloc[start : start + batch]
        pictures = generate_batch(
            sd,
            rows["prompt"].tolist(),
            rows["seed"].tolist(),
            steps=settings.steps,
            guidance=settings.guidance,
            solver="ddim",
            precision=precision,
        )
        for file, picture in zip(rows["file"], pictures, strict=True):
            with writing(out / "pictures" / file) as temporary:
                Image.fromarray(picture).save(temporary, format="JPEG")
        done += len(rows)
        yield done, len(table)


def _part(styles: tuple[str, ...] | None, objects: tuple[str, ...] | None) -> pd.DataFrame:
    table = unlearncanvas_protocol()
    for column, chosen in (("style", styles), ("object", objects)):
        if chosen is not None:
            if unknown := sorted(set(chosen) - set(table[column])):
                raise ConfigError(f"UnlearnCanvas has no {column} {listing(unknown)}.")
            table = table[table[column].isin(chosen)]
    return table.reset_index(drop=True)


def judge(
    out: Path,
    classifiers: Path,
    *,
    seed_images: bool = True,
    real: Path | None = None,
    features: Path | None = None,
    clip: Path | None = None,
    styles: tuple[str, ...] | None = None,
    objects: tuple[str, ...] | None = None,
) -> UnlearnCanvas:
    """Classify what was drawn; write ``samples.parquet`` and ``metrics.json``, and give the latter.

    Args:
        real: the data set, ``<Style>/<Object>/<number>.jpg``: adds FID and KID of the retained pictures against its
            own, in the features of ``features``, an extractor (the published FID is of Inception's), or else of the
            *style classifier*, as their names say.
        clip: folder of a CLIP; adds the mean score of the retained prompts' pictures and of the target's.

    Raises:
        ConfigError: an extractor is given, and nothing to compare with.
        DataError: pictures are missing (how many), or a classifier is.
    """
    if features is not None and real is None:
        raise ConfigError("Features are of FID and KID, which compare with real pictures: give --real too.")
    settings, table = load(MadeWith, out / MADE_WITH), _part(styles, objects)
    if missing := [file for file in table["file"] if not (out / "pictures" / file).is_file()]:
        raise DataError(f"{len(missing)} of {len(table)} pictures are not drawn yet ({listing(missing, 2)}).")
    loaded = load_classifiers(classifiers)
    pictures = [_read(out / "pictures" / file) for file in table["file"]]
    seen: dict[str, NDArray[np.float64]] = {}
    for domain, classifier in loaded.items():
        table[f"seen_{domain}"], seen[domain] = classify(classifier, pictures)
    named = (table[kind_of_target(settings.target)] == settings.target).to_numpy()
    distances, count = None, None
    if real is not None:
        if features is None:
            extractor, ours = _style_features(loaded["style"]), seen["style"][~named]
        else:
            extractor = load_extractor(features)
            ours = extractor.features([picture for picture, erased in zip(pictures, named, strict=True) if not erased])
        distances, count = _against_real(table[~named], ours, real, extractor)
    scores = None
    if clip is not None:
        asked = load_clip(clip)
        retained, erased = mean_scores(asked, pictures, table["prompt"].tolist(), named)
        scores = ClipScores(name=asked.name, retained=retained, erased=erased)
    metrics = UnlearnCanvas(
        **dict(unlearncanvas_figures(table, settings.target, seed_images=seed_images)),
        made_with=settings,
        features=distances,
        real_pictures=count,
        clip=scores,
    )
    with writing(out / "samples.parquet") as temporary:
        table.to_parquet(temporary, index=False)
    dump(metrics, out / "metrics.json")
    return metrics


def _style_features(classifier: Classifier) -> Extractor:
    return Extractor(STYLE_FEATURES, lambda pictures: classify(classifier, pictures)[1])


def _against_real(
    retained: pd.DataFrame, ours: NDArray[np.float64], real: Path, extractor: Extractor
) -> tuple[FeatureDistances, int]:
    """Distances of the pictures whose prompts do not name the target to real ones, and how many these are.

    The photographs' theme is in and the features are taken as they are, as published; the classifier's are scaled
    for KID.
    """
    shown = []
    for style, thing in retained[["style", "object"]].drop_duplicates().itertuples(index=False):
        for number in range(1, REAL_EACH + 1):
            path = real / style / thing / f"{number}.jpg"
            if not path.is_file():
                raise DataError(f"{path} is missing: expected <Style>/<Object>/1.jpg to {REAL_EACH}.jpg, as published.")
            shown.append(_read(path))
    theirs = extractor.features(shown)
    sets = scaled(theirs, ours) if extractor.name == STYLE_FEATURES else (theirs, ours)
    return FeatureDistances(name=extractor.name, fid=fid(theirs, ours), kid=kid(*sets)), len(shown)


def _read(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def main() -> None:
    """Draw a shard, or judge what was drawn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["draw", "judge"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--base")
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--shard", type=int, default=0)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--styles", type=lambda text: tuple(text.split(",")))
    parser.add_argument("--objects", type=lambda text: tuple(text.split(",")))
    parser.add_argument("--classifiers", type=Path)
    parser.add_argument("--real", type=Path)
    parser.add_argument("--features", type=Path)
    parser.add_argument("--clip", type=Path)
    parser.add_argument("--without-seed-images", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    part = {"styles": given.styles, "objects": given.objects}
    try:
        if given.what == "judge":
            judge(
                given.out, given.classifiers, seed_images=not given.without_seed_images, real=given.real,
                features=given.features, clip=given.clip, **part,
            )  # fmt: skip
            return
        with tqdm(desc=f"shard {given.shard}", disable=None) as bar:
            for done, total in draw(
                given.out, base=given.base, adapter=given.adapter, shard=given.shard, shards=given.shards,
                batch=given.batch, precision=given.precision, **part,
            ):  # fmt: skip
                bar.total = total
                bar.update(done - bar.n)
    except FadeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
