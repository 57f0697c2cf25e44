"""Stable Diffusion XL: two text encoders, pooled text states and size conditioning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from fade.models.families.stable_diffusion import StableDiffusion, token_ids
from fade.models.told import Told


class StableDiffusionXL(StableDiffusion):
    """A Stable Diffusion but for what its denoiser is told (arXiv:2307.01952, section 2)."""

    title = "Stable Diffusion XL"
    parts: ClassVar[Mapping[str, str]] = {
        **StableDiffusion.parts,
        "text_encoder_2": "CLIPTextModelWithProjection",
    }
    tokenizers: ClassVar[Mapping[str, str]] = {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"}
    left_out: ClassVar[Mapping[str, Any]] = {
        "add_watermarker": False,
        **{"feature_extractor": None, "image_encoder": None},
    }

    def encoded(self, prompts: list[str]) -> Told:
        """Both encoders' last but one hidden states side by side, the second's pooled state, and the sizes.

        The sizes say a whole picture as the base draws it: original and target size are its own, and
        nothing was cropped away.
        """
        pipeline = self.pipeline
        first, second = (
            encoder(token_ids(pipeline, prompts, encoder=ending).to(self.reads_on), output_hidden_states=True)
            for encoder, ending in ((pipeline.text_encoder, ""), (pipeline.text_encoder_2, "_2"))
        )
        states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1).float().cpu()
        size = float(self.picture_size)
        sizes = torch.tensor([[size, size, 0.0, 0.0, size, size]]).expand(len(prompts), -1)
        return Told(states, others={"pooled": second.text_embeds.float().cpu(), "sizes": sizes})

    def unconditional(self) -> Told:
        """What guidance leads away from, one row: zeros, or the empty prompt, as the base's pipeline says."""
        empty = self.encode_prompts([""])
        if not self.pipeline.config.force_zeros_for_empty_prompt:
            return empty
        pooled = torch.zeros_like(empty.others["pooled"])
        return Told(torch.zeros_like(empty.states), others={**empty.others, "pooled": pooled})
