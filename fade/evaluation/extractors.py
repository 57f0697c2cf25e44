"""Feature extractors that a user gives for FID and KID of real pictures. Nothing is unpickled.

NAME.pt                TorchScript, as Inception is published for FID: takes uint8 pictures (B, 3, H, W) of 0 to 255 and
                       gives features (B, D); one that has the option ``return_features`` is asked for them
NAME/                  an image classifier in transformers' layout (config.json, model.safetensors): what its last
                       layer decides by

The figures carry its name (``fid_NAME``, ``kid_NAME``): distances in different features do not compare.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fade.errors import DataError
from fade.evaluation.classifiers import classify, load_classifier
from fade.hardware import compute_device

Pictures = Sequence[NDArray[np.uint8]]


@dataclass(frozen=True, slots=True)
class Extractor:
    """What turns pictures (H, W, 3) into features (N, D) float64, and what it is called in figures."""

    name: str
    features: Callable[[Pictures], NDArray[np.float64]]


def figure_name(path: Path) -> str:
    """A file's or folder's name as the names of figures may hold it: ``inception-2015`` -> ``inception_2015``."""
    return re.sub(r"[^a-z0-9]+", "_", path.stem.lower() if path.is_file() else path.name.lower()).strip("_")


def load_extractor(path: Path) -> Extractor:
    """The extractor of a file or folder.

    Raises:
        DataError: it is neither, or is no TorchScript.
    """
    if path.is_file():
        return Extractor(figure_name(path), _scripted(path))
    if path.is_dir():
        classifier = load_classifier(path)
        return Extractor(figure_name(path), lambda pictures: classify(classifier, pictures)[1])
    raise DataError(
        f"No feature extractor in {path}: expected a TorchScript file, or a folder with config.json and "
        "model.safetensors."
    )


def _scripted(path: Path) -> Callable[[Pictures], NDArray[np.float64]]:
    device = compute_device()
    try:
        model: Any = torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        raise DataError(f"{path} is no TorchScript file: {str(error).splitlines()[0]}") from None
    named = {argument.name for argument in model.forward.schema.arguments}
    options = {"return_features": True} if "return_features" in named else {}

    @torch.no_grad()
    def features(pictures: Pictures) -> NDArray[np.float64]:
        parts = []
        for start in range(0, len(pictures), 32):
            shown = torch.from_numpy(np.stack(pictures[start : start + 32])).permute(0, 3, 1, 2).contiguous()
            found = model(shown.to(device), **options)
            if not isinstance(found, torch.Tensor) or found.shape[0] != len(shown):
                raise DataError(f"{path} gave no features: expected a tensor with {len(shown)} rows.")
            parts.append(found.flatten(1).double().cpu().numpy())
        return np.concatenate(parts)

    return features
