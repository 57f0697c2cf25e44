"""Step ``mask``: what may change."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from fade.methods.fade.masks import Mask, make_mask, save_mask
from fade.spec import load_spec


def mask(folder: Path) -> Mask:
    """Write ``mask/``: the granularity, how much is kept, and what."""
    spec = load_spec(folder)
    settings = spec.mask
    within = None
    if settings.within != "all":
        # The models' libraries take longer to load than all else here: only whoever asks for a part of a network waits.
        from fade.models.family import family_of

        within = family_of(spec.base).denoiser_type.patterns[settings.within]
    saliency = load_file(folder / "saliency.safetensors")
    found = make_mask(saliency, settings.density, granularity=settings.granularity, within=within)
    save_mask(folder / "mask", found)
    return found
