"""Z-Image: a flow-matching transformer of a single stream, whose captions have lengths of their own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from fade.models.base import Configs
from fade.models.denoiser import Denoiser
from fade.models.flow import SizedByAutoencoder, size_shift
from fade.models.supported import autoencoder_factor
from fade.models.told import Told

_LENGTH = 512


class SingleStreamTransformer(Denoiser):
    """Text enters through the caption embedder, is refined by layers of its own, and is then one sequence with the
    picture, whose projections are shared by both."""

    component = "transformer"
    patterns: ClassVar[Mapping[str, re.Pattern[str]]] = {
        "attention": re.compile(r"\.(to_q|to_k|to_v|to_out\.0)$"),
        "cross_attention": re.compile(r"^context_refiner\.\d+\.attention\.(to_k|to_v)$"),
        "text_attention": re.compile(r"^context_refiner\.\d+\.attention\."),
        "text_sites": re.compile(r"^cap_embedder\.1$"),
    }

    @torch.no_grad()
    def read(self, states: Tensor) -> Tensor:
        """What the caption embedder's projection reads: the states, normed."""
        normed: Tensor = self.network.cap_embedder[0](states.to(self.device, self.dtype))
        return normed.float().cpu()

    def predict(self, noisy: Tensor, t: Tensor, told: Told) -> Tensor:
        """The velocity e - z_0; the network itself answers z_0 - e, and its times run from noise to picture."""
        assert told.mask is not None
        answers: list[Tensor] = self.network(
            list(noisy.to(self.dtype)[:, :, None]),  # a frame
            1 - t.expand(len(noisy)) / self.path.steps,
            [states[mask] for states, mask in zip(told.states.to(self.dtype), told.mask, strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack(answers)[:, :, 0]


class ZImage(SizedByAutoencoder):
    """Z-Image and Z-Image-Turbo (arXiv:2511.22699): Qwen3's last but one states of a chat with the prompt in it.

    Guidance counts as in all families: the stock pipeline's ``guidance_scale`` is one less, and Turbo is drawn at 1.
    """

    title = "Z-Image"
    parts: ClassVar[Mapping[str, str]] = {
        "transformer": "ZImageTransformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "Qwen3Model",
    }
    tokenizers: ClassVar[Mapping[str, str]] = {"tokenizer": "text_encoder"}
    tokenizer_classes: ClassVar[Mapping[str, tuple[str, ...]]] = {"tokenizer": ("Qwen2Tokenizer",)}
    denoiser_type = SingleStreamTransformer

    @classmethod
    def unsupported(cls, config: Configs, scheduler: str) -> list[str]:
        """Another scheduler, a transformer that is shown pictures (Omni), or pictures of unknown size."""
        found = super().unsupported(config, scheduler)
        if config("transformer").get("siglip_feat_dim") is not None:
            found.append("has a transformer that is shown pictures (siglip_feat_dim)")
        return found

    @classmethod
    def prompt_length(cls, config: Configs) -> int:
        """512, the chat around it among them."""
        del config
        return _LENGTH

    @staticmethod
    def written(tokenizer: Any, prompts: Sequence[str]) -> list[str]:
        """A chat in which each is what the user says."""
        return [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
            )
            for prompt in prompts
        ]

    @cached_property
    def denoiser(self) -> SingleStreamTransformer:
        """The transformer on the straight path."""
        edge = self.picture_size // autoencoder_factor(self.pipeline.vae.config)
        return SingleStreamTransformer(self.network, self.path, (self.network.config.in_channels, edge, edge))

    def settle(self) -> None:
        """The text encoder's hooks, and the table of its positions."""
        super().settle()
        self.network.rope_embedder(torch.zeros(1, 3, dtype=torch.int32, device=self.device))

    def times(self, steps: int) -> dict[str, Any]:
        """Equal steps of s, shifted by the picture's size where the base's scheduler says so."""
        edge = self.denoiser.latent_shape[1]
        mu = size_shift(edge * edge // 4, self.pipeline.scheduler.config)
        return {"sigmas": torch.linspace(1.0, 1 / steps, steps).tolist(), "mu": mu}

    def encoded(self, prompts: list[str]) -> Told:
        """As the stock pipeline encodes them, the captions' lengths made equal by zeros that are never read."""
        rows, _ = self.pipeline.encode_prompt(
            list(prompts), device=self.reads_on, do_classifier_free_guidance=False, max_sequence_length=_LENGTH
        )
        states = torch.nn.utils.rnn.pad_sequence([row.float().cpu() for row in rows], batch_first=True)
        states = torch.nn.functional.pad(states, (0, 0, 0, _LENGTH - states.shape[1]))
        lengths = torch.tensor([len(row) for row in rows])
        return Told(states, torch.arange(_LENGTH)[None] < lengths[:, None])
