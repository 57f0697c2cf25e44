"""Families of base models behind one protocol: what the method needs of a loaded base, and how one is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import diffusers
import numpy as np
import torch
import transformers
from diffusers.loaders.single_file_utils import SingleFileComponentError
from diffusers.models.attention_processor import AttnProcessor
from diffusers.utils import logging as diffusers_logging
from numpy.typing import NDArray
from torch import Tensor
from transformers.utils import logging as transformers_logging

from fade.errors import BaseModelError
from fade.hardware import compute_device
from fade.models.denoiser import Denoiser
from fade.models.families.stable_diffusion import StableDiffusion
from fade.models.families.stable_diffusion_xl import StableDiffusionXL
from fade.models.prompts import readers
from fade.models.sharing import shared
from fade.models.source import BaseSource, find_base, identity
from fade.models.supported import NETWORKS, PREDICTION_TYPES, side
from fade.models.tensors import check_weights
from fade.models.told import Told

Weights = Literal["fp32", "bf16"]
_LOADERS_ERRORS = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, SingleFileComponentError)
"""What the libraries raise of files that they cannot use; the cause is kept for the log."""
FAMILIES = {"StableDiffusionPipeline": StableDiffusion, "StableDiffusionXLPipeline": StableDiffusionXL}


def family_of(source: str | Path) -> type[StableDiffusion]:
    """The family of a base, asked of its configurations alone.

    Raises:
        BaseModelError: as ``find_base``.
    """
    return FAMILIES[find_base(source).pipeline]


# Plain attention is faster than the fused kernel in the backward pass on CPU, but holds all pairs of positions.
_PLAIN_ATTENTION_UP_TO = 32 * 32


class Base(Protocol):
    """A loaded base model: its denoiser, what it is told, and the adapters that are switched on.

    Attributes:
        sha256: its identity; an adapter holds for one base only.
        folder: where it was loaded from.
        active: adapter name to weight.
    """

    sha256: str
    folder: Path
    active: dict[str, float]

    @property
    def pipeline(self) -> Any:
        """The stock diffusers pipeline."""

    @property
    def denoiser(self) -> Denoiser:
        """What a method changes and asks."""

    @property
    def network(self) -> Any:
        """The denoiser's module, which adapters are put into."""

    @property
    def device(self) -> torch.device:
        """Where the denoiser lies."""

    def solver(self, name: str, steps: int) -> Any:
        """One of diffusers' schedulers, of the base's own configuration, set to so many steps."""

    @property
    def picture_size(self) -> int:
        """Height and width of a picture, in pixels."""

    def encode_prompts(self, prompts: Sequence[str]) -> Told:
        """What the denoiser is told for each prompt, on the CPU."""

    def unconditional(self) -> Told:
        """What guidance leads away from, one row."""

    def encode_pictures(self, pictures: NDArray[np.uint8]) -> Tensor:
        """Scaled latents, (N, C, h, w) float32 on the CPU, of (N, H, W, 3) pictures."""

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures of scaled latents, (B, 3, H, W) float32, about -1..1."""


def load_base(source: str | Path, *, expected_sha256: str | None = None, weights: Weights = "fp32") -> Base:
    """Load a base: a diffusers folder, a single safetensors file, or a name on the Hugging Face hub.

    It lies where models compute (``fade.hardware.compute_device``). Its weights are not to be written into: others
    may read them (``fade.models.sharing``).

    Args:
        weights: how the denoiser's weights are held; ``bf16`` halves their memory and rounds them, the
            encoders and the autoencoder stay float32.

    Raises:
        BaseModelError: missing, damaged, not supported, or of another hash than expected.
    """
    device = compute_device()  # what is wrong with it is said before a hash is computed
    found = find_base(source)
    check_weights(found)
    readers(found)
    sha256 = identity(found)
    if expected_sha256 is not None and sha256 != expected_sha256:
        raise BaseModelError(
            f"The base model in {source} is another one: its hash is {sha256[:12]}, expected {expected_sha256[:12]}. "
            "An erasure holds for one base only; restore that base, or make a new request for this one."
        )
    return shared((sha256, weights, device), lambda: _loaded(found, sha256, Path(source), weights, device))


def _loaded(found: BaseSource, sha256: str, source: Path, weights: Weights, device: torch.device) -> Base:
    try:
        with _no_progress_bars():
            pipeline = (_load_file if found.path.is_file() else _load_folder)(found, weights)
    except _LOADERS_ERRORS as error:
        raise BaseModelError(f"The base model in {source} does not load: {error}. Restore it.") from error
    predicts = pipeline.scheduler.config.get("prediction_type")
    if predicts not in PREDICTION_TYPES or not hasattr(pipeline.scheduler, "alphas_cumprod"):
        raise BaseModelError(
            f"The base in {source} has a {type(pipeline.scheduler).__name__} that predicts {predicts!r}; supported "
            f"are diffusion schedules with {' and '.join(PREDICTION_TYPES)}."
        )
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            # Not the pipeline's own `to`, which warns of types where only the place changes.
            part.requires_grad_(False).eval().to(device)
    # Elsewhere one number is expected, and a pair of equal ones says the same.
    pipeline.unet.register_to_config(sample_size=side(pipeline.unet.config.sample_size))
    if pipeline.unet.config.sample_size**2 <= _PLAIN_ATTENTION_UP_TO:
        pipeline.unet.set_attn_processor(AttnProcessor())
    return FAMILIES[found.pipeline](pipeline, sha256, source)


def read_pipeline(found: BaseSource) -> Any:
    """A base's pipeline on the CPU, of its files as they are now, in float32; nothing of it is shared."""
    with _no_progress_bars():
        return (_load_file if found.path.is_file() else _load_folder)(found, "fp32")


def _load_folder(found: BaseSource, weights: Weights) -> Any:
    dtypes = {"default": torch.float32, "unet": torch.bfloat16 if weights == "bf16" else torch.float32}
    # Where a variant counts it is loaded by itself: the pipeline would prefer it in every part that has one.
    variants = {
        one.part: _network(one.part).from_pretrained(
            found.path / one.part,
            variant=one.variant,
            dtype=dtypes.get(one.part, torch.float32),
            use_safetensors=True,
            local_files_only=True,
        )
        for one in found.parts
        if one.variant is not None
    }
    return getattr(diffusers, found.pipeline).from_pretrained(
        found.path, dtype=dtypes, use_safetensors=True, local_files_only=True, **variants, **_left_out(found)
    )


def _network(part: str) -> Any:
    return getattr(transformers if part.startswith("text_encoder") else diffusers, NETWORKS[part])


def _load_file(found: BaseSource, weights: Weights) -> Any:
    pipeline = getattr(diffusers, found.pipeline).from_single_file(
        str(found.path), config=str(found.config), local_files_only=True, dtype=torch.float32, **_left_out(found)
    )
    if weights == "bf16":
        # diffusers' own `to` warns of modules to be kept in float32, also where there are none.
        torch.nn.Module.to(pipeline.unet, torch.bfloat16)
    return pipeline


def _left_out(found: BaseSource) -> dict[str, Any]:
    """Parts that judge or mark pictures, or are told pictures: they are no part of what is erased."""
    others = {"feature_extractor": None, "image_encoder": None}
    if found.pipeline == "StableDiffusionPipeline":
        return {"safety_checker": None, "requires_safety_checker": False, **others}
    return {"add_watermarker": False, **others}


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Both libraries draw a bar for each file they read; a base is read many times."""
    before = diffusers_logging.is_progress_bar_enabled(), transformers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if before[0]:
            diffusers_logging.enable_progress_bar()
        if before[1]:
            transformers_logging.enable_progress_bar()
