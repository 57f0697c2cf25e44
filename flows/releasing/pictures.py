"""Use what is registered: pictures from the base, from one adapter, or from everything that is live."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fade.adapters.store import activate, apply_adapter
from fade.errors import ConfigError, ResourceError
from fade.files import writing
from fade.hardware import threads_at_most
from fade.models.base import Base
from fade.models.family import load_base
from fade.models.generate import generate_batch
from tasks.mlflow import tracking

STEPS, GUIDANCE = 25, 4.0
SMALL = 50_000_000
"""Parameters of a denoiser that draws a picture as fast on one thread as on several: its products are too small to be
split, and threads that wait for each other take the cores from whatever else runs."""


def load_with(base: str | Path, adapters: Sequence[tracking.AdapterVersion]) -> Base:
    """The base with these registered adapters stacked and switched on.

    Raises:
        AdapterFormatError: an adapter is damaged or for another base.
        LineageError: an adapter is not the one that was registered.
    """
    sd = load_base(base)
    names = {}
    for version in adapters:
        name = f"{version.model}-{version.version}"
        apply_adapter(sd, tracking.fetch_adapter(version), name=name)
        names[name] = 1.0
    activate(sd, names)
    return sd


def live_adapters(base_sha256: str) -> list[tracking.AdapterVersion]:
    """The approved version of every erasure on a base, if the ledger registered it and no release refused it."""
    return [
        one
        for one in tracking.versions()
        if one.base_sha256 == base_sha256
        and one.live
        and not one.release.startswith(("refused", "waiting"))
        and tracking.is_registered(one)
    ]


def draw(base: Base, prompts: Sequence[str], *, seed: int, steps: int = STEPS) -> NDArray[np.uint8]:
    """Pictures in float32, one a prompt, all from one seed.

    Raises:
        ConfigError: a prompt is empty.
    """
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ConfigError("The prompt is empty. Give the words of a picture, e.g. 'a cat image in neon style.'")
    small = sum(one.numel() for one in base.network.parameters()) <= SMALL
    with threads_at_most(1) if small else nullcontext():
        return generate_batch(
            base, list(prompts), [seed] * len(prompts), steps=steps, guidance=GUIDANCE, solver="ddim", precision="fp32"
        )


def save_picture(pixels: NDArray[np.uint8], path: Path) -> None:
    """Write a picture; the ending of the name decides the format.

    Raises:
        ConfigError: the ending names no picture format.
        ResourceError: the place cannot be written.
    """
    if path.suffix.lower() not in {".png", ".jpg", ".jpeg", ".webp"}:
        raise ConfigError(f"{path} does not end like a picture: expected .png, .jpg or .webp.")
    try:
        with writing(path) as temporary:
            Image.fromarray(pixels).save(temporary)
    except OSError as error:
        raise ResourceError(f"Cannot write {path}: {error}") from None
