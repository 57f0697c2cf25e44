"""What a method is given, of noise for pictures."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fade.methods.fade.examples import Examples
from fade.methods.method import Material
from fade.models.families.stable_diffusion import StableDiffusion
from fade.models.told import Told


@pytest.fixture
def material(base: StableDiffusion) -> Material:
    generator = torch.Generator().manual_seed(3)

    def pictures(count: int) -> Tensor:
        return torch.randn((count, *base.denoiser.latent_shape), generator=generator)

    def told(name: str) -> Told:
        return base.encode_prompts(
            [f"a {name} image in {style} style." for style in ("neon", "oil", "mosaic", "photo")]
        )

    others = base.encode_prompts([f"a {name} image in oil style." for name in ("horse", "coffee", "rocket", "flower")])
    cat, horse = told("cat"), told("horse")
    sets = {
        "forget": _Rows(Examples(pictures(4), cat, horse)),
        "surrogate": _Rows(Examples(pictures(4), cat, horse)),
        "retain": _Rows(Examples(pictures(4), others, others)),
    }
    return Material(sets.__getitem__, base.unconditional())


class _Rows:
    """A split that is encoded."""

    def __init__(self, examples: Examples) -> None:
        self._examples = examples

    def latents(self) -> Tensor:
        return self._examples.latents

    def captions(self) -> tuple[Told, Told]:
        return self._examples.prompts, self._examples.targets

    def encoded(self, most: int | None = None) -> Examples:
        return self._examples
