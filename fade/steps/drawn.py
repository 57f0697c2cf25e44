"""Pictures of prompts and seeds by the base, with and without adapters, and what a judge calls them."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from fade.concepts import Concept
from fade.config import DRAWN_BY
from fade.evaluation.judges import PictureJudge, judge_pictures
from fade.files import writing
from fade.lineage import content_hash
from fade.models.base import Base
from fade.models.generate import generate, together
from fade.seeding import derive_seed
from fade.spec import Spec

CACHE = Path(".fade/cache")
Pictures = NDArray[np.uint8]


def domains(concepts: dict[str, Concept]) -> tuple[list[str], list[str]]:
    """Names of the objects and of the styles."""
    return (
        [c.name for c in concepts.values() if c.kind == "object"],
        [c.name for c in concepts.values() if c.kind == "style"],
    )


def base_pictures(sd: Base, spec: Spec, samples: pd.DataFrame) -> Generator[tuple[int, int], None, NDArray[np.uint8]]:
    """Pictures of prompts and seeds by the base alone; yields progress.

    Each is drawn once for a project, whichever erasure asks first, and kept by the hash of what makes it. So they are
    drawn so many at a time (``together``), the last ones repeated to fill up: what is computed beside a picture changes
    no bit of it, how much is may.
    """
    count = together(sd.picture_size)
    folder = _kept_in(spec, count)
    places = [folder / f"{_key(prompt, seed)}.safetensors" for prompt, seed in samples[["prompt", "seed"]].to_numpy()]
    missing = [i for i in {place: i for i, place in enumerate(places)}.values() if not places[i].is_file()]
    filled = samples.iloc[missing + missing[-1:] * (-len(missing) % count)]
    done = 0
    for drawn in _drawn(sd, spec, filled, part=count):
        # Kept at once: whoever is stopped goes on from here. What fills up the last part is left.
        for i, picture in zip(missing[done:], drawn, strict=False):
            with writing(places[i]) as temporary:
                save_file({"picture": torch.from_numpy(picture)}, temporary)
        done += len(drawn)
        yield min(done, len(missing)), 2 * len(missing)
    return np.stack([load_file(place)["picture"].numpy() for place in places])


def pictures_now(
    base: Base, spec: Spec, samples: pd.DataFrame, *, done: int
) -> Generator[tuple[int, int], None, NDArray[np.uint8]]:
    """The protocol's pictures with the adapters that are on; yields (pictures done, of before and after)."""
    parts: list[NDArray[np.uint8]] = []
    for drawn in _drawn(base, spec, samples):
        parts.append(drawn)
        yield done + sum(map(len, parts)), 2 * len(samples)
    return np.concatenate(parts)


def _drawn(base: Base, spec: Spec, samples: pd.DataFrame, *, part: int | None = None) -> Iterator[NDArray[np.uint8]]:
    settings = spec.evaluate
    yield from generate(
        base,
        samples["prompt"].tolist(),
        samples["seed"].tolist(),
        batch=max(settings.batch, part or 1),
        part=part,
        steps=settings.steps,
        guidance=settings.guidance,
        solver=settings.solver,
        precision=settings.precision,
    )


def _kept_in(spec: Spec, count: int) -> Path:
    """Named by everything but prompt and seed that decides the base's pictures: base, settings, threads and code."""
    made_by = {
        "base": spec.base_sha256,
        "weights": spec.weights,
        "settings": spec.evaluate.model_dump(mode="json", include={*DRAWN_BY} - {"batch"}),
        "together": count,
        "threads": spec.threads,
    }
    return CACHE / f"base-pictures-{content_hash(made_by, module='fade.models.generate')[:16]}"


def _key(prompt: str, seed: int) -> str:
    return hashlib.sha256(f"{prompt}\0{seed}".encode()).hexdigest()[:32]


def named_by(judge: PictureJudge, pictures: NDArray[np.uint8], samples: pd.DataFrame) -> pd.DataFrame:
    """The samples with what a judge calls each picture: ``seen_object``, ``seen_style``."""
    named = judge_pictures(judge, pictures)
    return samples.assign(seen_object=named.objects, seen_style=named.styles)


def look_seeds(spec: Spec) -> tuple[int, ...]:
    """Seeds of pictures by which settings are found: far from those of an evaluation, which begin at a few hundred.

    Each picture of a part has its own: pictures of one seed succeed and fail together, so that few seeds say little.
    """
    first = 2**30 + derive_seed(spec.distill.seed, "look") % 2**29
    return tuple(range(first, first + spec.tune.pictures))


def ended(work: Generator[Any, None, Pictures]) -> Pictures:
    """What a generator that tells its progress returns at its end."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            found: Pictures = end.value
            return found
