"""What the tests of families share: tiny bases of every kind, and an erasure through its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.tiny.families import save_tiny
from benchmarks.tiny.stock import draw
from fade.models.base import Base
from fade.models.generate import first_latents, sample_latents
from fade.models.source import base_sha256
from fade.spec import Spec, make_spec, save_spec
from fade.steps.adapter import make_adapter
from fade.steps.mask import mask
from fade.steps.saliency import saliency
from fade.steps.split import split
from tests.tiny import SETTINGS

ASKED = "a astronaut image in photo style."


class Bases(dict[str, Path]):
    """Kind to the folder of its tiny base, saved when it is first asked for."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def __missing__(self, kind: str) -> Path:
        self[kind] = save_tiny(self.root / kind, kind)
        return self[kind]


def erase(folder: Path, base: Path, catalog: Path, **settings: Any) -> Spec:
    """An erasure through its steps, up to the adapter."""
    chosen = SETTINGS | {"threads": 1} | settings
    chosen["distill"] = SETTINGS["distill"] | {"learning_rate": 0.05} | settings.get("distill", {})
    spec = make_spec(
        concept="astronaut",
        kind="object",
        surrogate="cameraman",
        base=str(base),
        base_sha256=base_sha256(base),
        catalog=str(catalog),
        judges="",
        **chosen,
    )
    save_spec(spec, folder)
    split(folder)
    saliency(folder)
    mask(folder)
    assert len(list(make_adapter(folder))) == spec.distill.steps
    return spec


def latents(base: Base, *, guidance: float = 3.0) -> torch.Tensor:
    """What the base draws for what is erased, its adapters as they are."""
    return sample_latents(base, base.encode_prompts([ASKED]), [1], steps=2, guidance=guidance, solver="ddim")


def stock_latents(stock: Any, base: Base, *, guidance: float = 3.0) -> torch.Tensor:
    """The same by a stock pipeline."""
    first = first_latents([1], base.denoiser.latent_shape)
    found: torch.Tensor = draw(stock, [ASKED], first, steps=2, guidance=guidance, output="latent")
    return found
