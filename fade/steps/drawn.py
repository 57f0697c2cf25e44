"""Pictures of prompts and seeds by the base, with and without adapters, and what a judge calls them."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from fade.concepts import Concept
from fade.evaluation.judges import PictureJudge, judge_pictures
from fade.files import writing
from fade.lineage import content_hash
from fade.models.base import Base
from fade.models.generate import generate
from fade.seeding import derive_seed
from fade.spec import Spec

CACHE = Path(".fade/cache")
LOOK_SEEDS = 4
Pictures = NDArray[np.uint8]


def domains(concepts: dict[str, Concept]) -> tuple[list[str], list[str]]:
    """Names of the objects and of the styles."""
    return (
        [c.name for c in concepts.values() if c.kind == "object"],
        [c.name for c in concepts.values() if c.kind == "style"],
    )


def base_pictures(sd: Base, spec: Spec, samples: pd.DataFrame) -> Generator[tuple[int, int], None, NDArray[np.uint8]]:
    """The protocol's pictures by the base alone, kept by the hash of what makes them; yields progress."""
    kept = _cache_path(spec, samples)
    if kept.is_file():
        return load_file(kept)["pictures"].numpy()
    before = yield from pictures_now(sd, spec, samples, done=0)
    with writing(kept) as temporary:
        save_file({"pictures": torch.from_numpy(before)}, temporary)
    return before


def pictures_now(
    base: Base, spec: Spec, samples: pd.DataFrame, *, done: int
) -> Generator[tuple[int, int], None, NDArray[np.uint8]]:
    """The protocol's pictures with the adapters that are on; yields (pictures done, of before and after)."""
    settings = spec.evaluate
    parts: list[NDArray[np.uint8]] = []
    for batch in generate(
        base,
        samples["prompt"].tolist(),
        samples["seed"].tolist(),
        batch=settings.batch,
        steps=settings.steps,
        guidance=settings.guidance,
        solver=settings.solver,
        precision=settings.precision,
    ):
        parts.append(batch)
        yield done + sum(map(len, parts)), 2 * len(samples)
    return np.concatenate(parts)


def _cache_path(spec: Spec, samples: pd.DataFrame) -> Path:
    """Named by everything that decides the base's pictures: base, protocol, settings, threads and code."""
    made_by = {
        "base": spec.base_sha256,
        "weights": spec.weights,
        "prompts": samples["prompt"].tolist(),
        "seeds": samples["seed"].tolist(),
        "settings": spec.evaluate.drawing,
        "threads": spec.threads,
    }
    return CACHE / f"base-pictures-{content_hash(made_by, module='fade.models.generate')[:16]}.safetensors"


def named_by(judge: PictureJudge, pictures: NDArray[np.uint8], samples: pd.DataFrame) -> pd.DataFrame:
    """The samples with what a judge calls each picture: ``seen_object``, ``seen_style``."""
    named = judge_pictures(judge, pictures)
    return samples.assign(seen_object=named.objects, seen_style=named.styles)


def look_seeds(spec: Spec) -> tuple[int, ...]:
    """Seeds of pictures by which settings are found: far from those of an evaluation, which begin at a few hundred."""
    first = 2**30 + derive_seed(spec.distill.seed, "look") % 2**29
    return tuple(range(first, first + LOOK_SEEDS))


def ended(work: Generator[Any, None, Pictures]) -> Pictures:
    """What a generator that tells its progress returns at its end."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            found: Pictures = end.value
            return found
