"""The families of base models that are supported: a line each, imported when a base of its kind is met."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fade.models.base import Base

FAMILIES = {
    "StableDiffusionPipeline": "fade.models.families.stable_diffusion:StableDiffusion",
    "StableDiffusionXLPipeline": "fade.models.families.stable_diffusion_xl:StableDiffusionXL",
    "StableDiffusion3Pipeline": "fade.models.families.stable_diffusion_3:StableDiffusion3",
    "FluxPipeline": "fade.models.families.flux:Flux",
    "QwenImagePipeline": "fade.models.families.qwen_image:QwenImage",
    "Flux2Pipeline": "fade.models.families.flux_2:Flux2",
    "Flux2KleinPipeline": "fade.models.families.flux_2:Flux2Klein",
    "PixArtSigmaPipeline": "fade.models.families.pixart_sigma:PixArtSigma",
    "SanaPipeline": "fade.models.families.sana:Sana",
    "ZImagePipeline": "fade.models.families.z_image:ZImage",
    "Lumina2Pipeline": "fade.models.families.lumina2:Lumina2",
}
"""The class of the diffusers pipeline to the family's."""


def family(pipeline: str) -> type[Base]:
    """The family of a pipeline's class, a key of ``FAMILIES``."""
    module, _, name = FAMILIES[pipeline].partition(":")
    found: type[Base] = getattr(import_module(module), name)
    return found
