"""Step ``mask``: what may change."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from fade.config import load_spec
from fade.methods.fade.masks import Mask, make_mask, save_mask


def mask(folder: Path) -> Mask:
    """Write ``mask/``: the granularity, how much is kept, and what."""
    settings = load_spec(folder).mask
    saliency = load_file(folder / "saliency.safetensors")
    found = make_mask(saliency, settings.density, granularity=settings.granularity, within=settings.within)
    save_mask(folder / "mask", found)
    return found
