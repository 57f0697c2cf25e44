"""The network that an erasure changes, told through one protocol: all that a method needs to know of it."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fade.models.deltas import plain_modules
from fade.models.paths import NoisePath
from fade.models.told import Told

Part = Literal["all", "attention", "cross_attention", "text_attention", "text_sites"]


class Denoiser(ABC):
    """A network that answers noisy latents at a time under what it is told.

    Attributes:
        component: its name in the pipeline and in LoRA files.
        network: the module itself; adapters are put into it.
        path: how its latents are noised, and what it answers.
        latent_shape: channels, height and width of one picture's latents.
    """

    component: ClassVar[str]
    patterns: ClassVar[Mapping[str, re.Pattern[str]]]
    """Names of the modules of each part that is not all of the network: ``attention``, the projections that published
    erasures train; ``cross_attention``, the keys and values of the text; ``text_attention``, the whole of the layers
    that attend to it; ``text_sites``, the projections through which all text enters (``read``)."""

    def __init__(self, network: Any, path: NoisePath, latent_shape: tuple[int, int, int]) -> None:
        self.network, self.path, self.latent_shape = network, path, latent_shape

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return next(iter(self.network.parameters())).device

    @property
    def dtype(self) -> torch.dtype:
        """The type its weights are held in."""
        return next(iter(self.network.parameters())).dtype

    @abstractmethod
    def predict(self, noisy: Tensor, t: Tensor, told: Told) -> Tensor:
        """Its answer at z_t (what ``path.target`` says it learnt), (B, C, h, w), in the type of its weights.

        Args:
            noisy: z_t, (B, C, h, w).
            t: (B,), or one for all.
        """

    def text_sites(self) -> list[str]:
        """Names of the projections that read the text's states as they arrive: all that the network knows of them."""
        return self.modules("text_sites")

    def pooled_sites(self) -> list[str]:
        """Names of the projections whose input is the prompt's pooled state, ``told.others["pooled"]``; often none."""
        pattern = self.patterns.get("pooled_sites")
        return [] if pattern is None else [name for name in self.modules() if pattern.search(name)]

    def read(self, states: Tensor) -> Tensor:
        """What those projections read of states, (N, L, D): a family may norm them first."""
        return states

    def fused(self) -> dict[str, tuple[int, ...]]:
        """Modules that hold several projections in one weight, each with the rows of these in order."""
        return {}

    def modules(self, part: Part = "all") -> list[str]:
        """Names of the Linear and Conv2d modules of a part, sorted."""
        names = sorted(plain_modules(self.network))
        return names if part == "all" else [name for name in names if self.patterns[part].search(name)]

    def on(self, network: nn.Module) -> Denoiser:
        """The same on another network of its kind."""
        return type(self)(network, self.path, self.latent_shape)


def autocast(precision: str, device: str = "cpu") -> AbstractContextManager[None]:
    """Matrix products in bfloat16 for ``bf16``, untouched float32 for ``fp32``."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def weights_sha256(module: nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of all weights and buffers: equal means equal bits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}\n".encode())
        # A kernel of 1 x 1 counts as contiguous in any layout: flat it is.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
