"""A few pictures of what is erased by its name: the base draws from them, noised part of the way   (ours).

Where a base hardly knows a name, what it draws by it shows somebody else. So the concept's own forget pictures begin
at the given ones: noised a share of the way and drawn on under the concept's captions, they keep its looks, and the
less so the more noise. The given pictures themselves stay where they are; their hashes are part of what is asked.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fade.attacks.noised import draw_from_noised
from fade.data.loaders.files import loose_pictures
from fade.data.pictures import prepare
from fade.errors import DataError, LineageError, listing
from fade.files import sha256_file
from fade.models.base import Base

LEAST, MOST = 5, 50
STRENGTHS = (0.3, 0.5, 0.7)
"""Shares of the way to noise, by turns."""
NOISED_STEPS = 10
"""Of a whole way, at least: a share of fewer would be a single step."""


def describe_given(folder: Path) -> dict[str, Any]:
    """The pictures of a folder, by the hashes of their files.

    Raises:
        DataError: it is missing, holds fewer than 5 or more than 50, or one of them is no picture.
    """
    if not folder.is_dir():
        raise DataError(f"No folder of pictures {folder}: expected {LEAST} to {MOST} pictures of the concept there.")
    found = loose_pictures(folder)
    if not LEAST <= len(found) <= MOST:
        raise DataError(
            f"{folder} holds {len(found)} pictures: expected {LEAST} to {MOST} of the concept, right in that folder."
        )
    faults = []
    for path in found:
        try:
            prepare(path, size=None)
        except DataError as error:
            faults.append(f"{path.name}: {error}")
    if faults:
        raise DataError(f"{len(faults)} of the pictures in {folder} cannot be read: {listing(faults)}. Mend them.")
    return {"folder": folder.as_posix(), "sha256": {path.name: sha256_file(path) for path in found}}


def load_given(given: Mapping[str, Any], *, size: int) -> NDArray[np.uint8]:
    """The pictures, cut to squares of the base's size, (N, size, size, 3), in order of their names.

    Raises:
        LineageError: one is gone, or another than was asked with.
    """
    pictures = []
    for name, digest in sorted(given["sha256"].items()):
        path = Path(given["folder"]) / name
        if not path.is_file() or sha256_file(path) != digest:
            raise LineageError(f"{path} is gone, or is not the picture that was asked with. Restore it, or ask again.")
        with Image.open(io.BytesIO(prepare(path, size=size).content)) as image:
            pictures.append(np.asarray(image.convert("RGB")))
    return np.stack(pictures)


def drawn_from(
    base: Base,
    pictures: NDArray[np.uint8],
    prompts: Sequence[str],
    begins: Sequence[int],
    *,
    drawing: Mapping[str, Any],
    seed: int,
) -> list[NDArray[np.uint8]]:
    """A picture for each prompt, from the given picture of its number, at the strengths by turns.

    Args:
        drawing: how the base draws: ``steps``, ``guidance``, ``precision`` and ``batch``.
    """
    found: dict[int, NDArray[np.uint8]] = {}
    for turn, strength in enumerate(STRENGTHS):
        rows = list(range(turn, len(prompts), len(STRENGTHS)))
        for start in range(0, len(rows), drawing["batch"]):
            part = rows[start : start + drawing["batch"]]
            drawn = draw_from_noised(
                base,
                base.encode_pictures(pictures[[begins[i] for i in part]]),
                base.encode_prompts([prompts[i] for i in part]),
                strength=strength,
                steps=max(drawing["steps"], NOISED_STEPS),
                guidance=drawing["guidance"],
                precision=drawing["precision"],
                seed=seed + start,
            )
            found |= dict(zip(part, drawn, strict=True))
    return [found[i] for i in range(len(prompts))]
