"""A loaded base model, and what is known of its family before it is loaded: one class, a subclass for each family.

A family is one file in ``fade/models/families`` and one line in ``fade/models/registry.py``.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fade.errors import DataError
from fade.models.denoiser import Denoiser
from fade.models.latents import in_scale, posterior_means
from fade.models.supported import autoencoder_factor, side
from fade.models.told import Told

Config = Mapping[str, Any]
Configs = Callable[[str], Config]
"""The configuration of a part, by the part's name."""
T5_LENGTH = 256
"""Tokens that most stock pipelines give a T5."""
_READING = threading.RLock()
"""A tokenizer serves one thread at a time: what it cuts and fills up to is set in it, prompt by prompt."""
ENCODED_PIXELS = 64 * 64 * 64
"""Of pictures that are encoded at a time: 64 of 64 x 64, one of 512 x 512, whose activations take about 2 GB."""


class Base(ABC):
    """A loaded base: the stock pipeline, the hash it was loaded under, the adapters that are switched on.

    Attributes:
        pipeline: the stock diffusers pipeline.
        sha256: its identity; an adapter holds for one base only.
        folder: where it was loaded from: a folder, or a single file.
        active: adapter name to weight; kept here because peft reports a disabled adapter as active.
        encoders: what loads a base of its kind that has text encoders alone, where this one has none; they are used
            and dropped.
        read_before: prompts that such encoders have read, each with what the denoiser is told.
    """

    title: ClassVar[str]
    """What people call models of its kind."""
    parts: ClassVar[Mapping[str, str]]
    """The parts of the pipeline that hold weights, each with its class in diffusers or transformers."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Those of them that a base may do without."""
    tokenizers: ClassVar[Mapping[str, str]]
    """The parts that read prompts, each with the text encoder that it reads for."""
    tokenizer_classes: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Their classes, without the ending ``Fast``, where they are not named after the encoder's kind."""
    renamed: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Parts whose class is named otherwise in some folders, and is the same: those other names."""
    exchanged: ClassVar[Mapping[type, type]] = {}
    """Classes of modules that ``prepare`` exchanges for others, which compute the same: the stock one to ours."""
    denoiser_type: ClassVar[type[Denoiser]]
    negative: ClassVar[str] = ""
    """The prompt that guidance leads away from."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Settings of an erasure, by dotted name, that are better otherwise on a base of its kind than on a U-Net of a
    diffusion: its values, for those that nobody gives (``fade.config.BY_KIND``)."""
    left_out: ClassVar[Mapping[str, Any]] = {}
    """What the pipeline's loader is told: parts that judge or mark pictures are no part of what is erased."""

    def __init__(self, pipeline: Any, sha256: str, folder: Path) -> None:
        self.pipeline, self.sha256, self.folder = pipeline, sha256, folder
        self.active: dict[str, float] = {}
        self.encoders: Callable[[], Base] | None = None
        self.read_before: dict[str, Told] = {}

    # --- before it is loaded ---

    @classmethod
    @abstractmethod
    def unsupported(cls, config: Configs, scheduler: str) -> list[str]:
        """What of the configurations is not supported, each as a phrase that follows ``the base``.

        Args:
            scheduler: the name of its scheduler's class.
        """

    @classmethod
    def pictures_of(cls, config: Configs) -> int:
        """Height and width in pixels of what a base of these configurations draws.

        Here the latents' side, the denoiser's ``sample_size``, times the autoencoder's factor.
        """
        edge = side(config(cls.denoiser_type.component)["sample_size"])
        return (edge or 0) * autoencoder_factor(config("vae"))

    @classmethod
    @abstractmethod
    def predicts(cls, config: Configs) -> str:
        """What its denoiser answers, in the field's word."""

    @classmethod
    def prompt_length(cls, config: Configs) -> int:
        """Tokens of a prompt that an encoder without learnt positions (T5, a language model) is given."""
        del config
        return T5_LENGTH

    @staticmethod
    def written(tokenizer: Any, prompts: Sequence[str]) -> list[str]:
        """What the stock pipeline gives a tokenizer for prompts: themselves, or with what it writes around them."""
        del tokenizer
        return list(prompts)

    # --- loaded ---

    @property
    def network(self) -> Any:
        """The denoiser's module, in evaluation mode, its weights as ``load_base`` was asked to hold them."""
        return getattr(self.pipeline, self.denoiser_type.component)

    @cached_property
    @abstractmethod
    def denoiser(self) -> Denoiser:
        """What a method changes and asks."""

    @property
    def device(self) -> torch.device:
        """Where the denoiser lies."""
        return self.denoiser.device

    @property
    def reads_on(self) -> torch.device:
        """Where its text encoders lie."""
        encoders = (getattr(self.pipeline, name) for name in self.tokenizers.values())
        return next(next(iter(one.parameters())).device for one in encoders if one is not None)

    @property
    def picture_size(self) -> int:
        """Height and width of a picture, in pixels."""
        return self.pictures_of(lambda part: getattr(self.pipeline, part).config)

    @staticmethod
    @abstractmethod
    def noise_schedule(scheduler: Any) -> tuple[object, Tensor | None]:
        """What two schedulers must agree in to lead along one path: what is predicted, and the noise's levels."""

    @abstractmethod
    def solver(self, name: str, steps: int) -> Any:
        """One of diffusers' schedulers, of the base's own configuration, set to so many steps.

        Args:
            name: ``ddim``, the first-order step along the path, or ``dpm++``.
        """

    def prepare(self) -> None:  # noqa: B027, most families change nothing
        """What a family changes in a pipeline that was just loaded; nothing that changes its answers."""

    def settle(self) -> None:
        """What its modules set up at their first answer and keep, set up now: a runtime holds them to what it is."""
        self.encode_prompts([self.negative])  # language models hang hooks of their own on themselves

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Told:
        """What the denoiser is told for each prompt, on the CPU; equal prompts are encoded once."""
        unique = list(dict.fromkeys(prompts)) or [self.negative]  # of no prompts the shapes are still to be known
        at = {prompt: i for i, prompt in enumerate(unique)}
        with _READING:
            told = self.encoded(unique) if self.encoders is None else self._read_apart(unique)
        return told[[at[prompt] for prompt in prompts]]

    def _read_apart(self, prompts: list[str]) -> Told:
        """The same by encoders that are loaded for what was not read before, and dropped."""
        wanted = prompts or [self.negative]  # of no prompts the shapes are still to be known
        if missing := [prompt for prompt in wanted if prompt not in self.read_before]:
            self.read_before |= read_by(self.encoders, missing)
        return Told.join(*(self.read_before[prompt] for prompt in wanted))[: len(prompts)]

    @abstractmethod
    def encoded(self, prompts: list[str]) -> Told:
        """The same for prompts that differ from each other, float32 on the CPU; gradients reach the encoders' input."""

    def unconditional(self) -> Told:
        """What guidance leads away from, one row."""
        return self.encode_prompts([self.negative])

    def guide(self, told: Told, guidance: float) -> tuple[Told, float]:
        """What the denoiser is told at a guidance, and how far beyond the empty prompt's answer to go besides.

        Models that were distilled for guidance are told it, and are asked once a step.
        """
        return told, guidance

    def combine(self, without: Tensor, with_prompt: Tensor, guidance: float) -> Tensor:
        """Classifier-free guidance (arXiv:2207.12598) of two answers, (B, C, h, w) each."""
        return without + guidance * (with_prompt - without)

    def encode_pictures(self, pictures: NDArray[np.uint8]) -> Tensor:
        """Scaled latents, (N, C, h, w) float32 on the CPU: the posterior's mean, so nothing is drawn.

        Args:
            pictures: (N, H, W, 3).

        Raises:
            DataError: the pictures are not of the size that the base draws.
        """
        if pictures.shape[1:3] != (self.picture_size, self.picture_size):
            raise DataError(
                f"The pictures are {pictures.shape[1]} x {pictures.shape[2]}; the base in {self.folder} draws "
                f"{self.picture_size} x {self.picture_size}. Resize them to that, or take another base."
            )
        at_once = max(1, ENCODED_PIXELS // self.picture_size**2)
        return self.scaled(posterior_means(self.posterior, pictures, like=self.pipeline.vae, batch=at_once))

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures of scaled latents, (B, 3, H, W) float32, about -1..1."""
        vae = self.pipeline.vae
        return self.reconstructed(self.unscaled(latents).to(vae.device, vae.dtype)).float()

    def posterior(self, pixels: Tensor) -> Tensor:
        """The autoencoder's mean latents of (B, 3, H, W) in -1..1, as it gives them."""
        mean: Tensor = self.pipeline.vae.encode(pixels).latent_dist.mean
        return mean

    def reconstructed(self, latents: Tensor) -> Tensor:
        """What the autoencoder makes of latents as it gives them, (B, 3, H, W)."""
        pixels: Tensor = self.pipeline.vae.decode(latents).sample
        return pixels

    def scaled(self, latents: Tensor) -> Tensor:
        """The autoencoder's latents as the denoiser takes them, (B, C, h, w)."""
        return in_scale(self.pipeline.vae.config, latents)

    def unscaled(self, latents: Tensor) -> Tensor:
        """The way back."""
        config = self.pipeline.vae.config
        found = latents / config.scaling_factor
        return found + shift if (shift := config.get("shift_factor")) else found


READ_AT_ONCE = 32
"""Prompts that an encoder reads in one pass: a large one is not to hold the inside of hundreds."""


@torch.no_grad()
def read_by(encoders: Callable[[], Base] | None, prompts: Sequence[str]) -> dict[str, Told]:
    """What each prompt tells, read by encoders that are gone afterwards."""
    if encoders is None:
        return {}
    base, unique = encoders(), list(dict.fromkeys(prompts))
    parts = [base.encoded(unique[start : start + READ_AT_ONCE]) for start in range(0, len(unique), READ_AT_ONCE)]
    rows = Told.join(*parts)
    return {prompt: rows[i : i + 1] for i, prompt in enumerate(unique)}
