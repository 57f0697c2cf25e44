"""How stock pipelines are called with latents as this library holds them, (B, C, h, w).

What a pipeline packs, shifts or scales in between is undone by its own methods, so that what is compared is independent
of ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from peft import PeftModel
from torch import Tensor

from .parts import LANGUAGE_LENGTH, LATENT, LENGTH, PICTURE


@dataclass(frozen=True)
class Call:
    """How a stock pipeline is called with (B, C, h, w) latents.

    Attributes:
        arguments: of the pipeline, first latents and guidance: what it is called with besides prompts and steps.
        latents: of the pipeline and latents as it holds them: (B, C, h, w).
    """

    arguments: Callable[[Any, Tensor, float], dict[str, Any]]
    latents: Callable[[Any, Tensor], Tensor]


def _flux_arguments(stock: Any, first: Tensor, guidance: float) -> dict[str, Any]:
    given: dict[str, Any] = {"latents": stock._pack_latents(first, *first.shape), "max_sequence_length": LENGTH}
    given |= {"height": PICTURE, "width": PICTURE}
    if stock.transformer.config.guidance_embeds:
        return given | {"guidance_scale": guidance}
    return given | {"true_cfg_scale": guidance, "negative_prompt": [""] * len(first)}


def _qwen_image_arguments(stock: Any, first: Tensor, guidance: float) -> dict[str, Any]:
    given = {"latents": stock._pack_latents(first, *first.shape), "height": PICTURE, "width": PICTURE}
    if guidance > 1:
        given |= {"true_cfg_scale": guidance, "negative_prompt": [" "] * len(first)}
    return given


def _flux_2_arguments(_: Any, first: Tensor, guidance: float) -> dict[str, Any]:
    size: dict[str, Any] = {"height": PICTURE, "width": PICTURE, "max_sequence_length": LANGUAGE_LENGTH}
    return {"latents": first, "guidance_scale": guidance, **size}


def _flux_2_latents(stock: Any, held: Tensor) -> Tensor:
    """Tokens as the loop holds them; or what the pipeline gives in the end, without its batch norm and patches."""
    if held.dim() == 3:
        side = LATENT // 2
        return held.transpose(1, 2).unflatten(2, (side, side))
    norm = stock.vae.bn
    deviation = torch.sqrt(norm.running_var + stock.vae.config.batch_norm_eps)
    return (stock._patchify_latents(held) - norm.running_mean[:, None, None]) / deviation[:, None, None]


def _sized(stock: Any, first: Tensor, guidance: float) -> dict[str, Any]:
    """These take a picture's size for one of few, and tiny ones are of none."""
    del stock
    size: dict[str, Any] = {"height": PICTURE, "width": PICTURE, "use_resolution_binning": False}
    return {"latents": first, "guidance_scale": guidance, **size}


def _one_less(stock: Any, first: Tensor, guidance: float) -> dict[str, Any]:
    """Z-Image counts guidance from the prompt's own answer."""
    del stock
    return {"latents": first, "guidance_scale": guidance - 1, "height": PICTURE, "width": PICTURE}


CALLS: Mapping[str, Call] = {
    "QwenImagePipeline": Call(
        _qwen_image_arguments,
        lambda stock, held: stock._unpack_latents(held, PICTURE, PICTURE, stock.vae_scale_factor)[:, :, 0],
    ),
    "Flux2Pipeline": Call(_flux_2_arguments, _flux_2_latents),
    "Flux2KleinPipeline": Call(_flux_2_arguments, _flux_2_latents),
    "FluxPipeline": Call(
        _flux_arguments, lambda stock, held: stock._unpack_latents(held, PICTURE, PICTURE, stock.vae_scale_factor)
    ),
    "PixArtSigmaPipeline": Call(_sized, lambda _, held: held),
    "SanaPipeline": Call(_sized, lambda _, held: held),
    "ZImagePipeline": Call(_one_less, lambda _, held: held),
}
"""By the pipeline's class; ``PLAIN`` for all others."""
PLAIN = Call(lambda _, first, guidance: {"latents": first, "guidance_scale": guidance}, lambda _, held: held)


def stock_pipeline(folder: Path) -> Any:
    """The stock pipeline in a folder."""
    index = json.loads((folder / "model_index.json").read_text())
    absent = {part: None for part, given in index.items() if given == [None, None] and part != "safety_checker"}
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_lora(stock: Any, folder: Path) -> None:
    """A LoRA in a folder by the stock pipeline's own loader, or by peft's where it has none."""
    if hasattr(stock, "load_lora_weights"):
        stock.load_lora_weights(folder)
    else:
        stock.transformer = PeftModel.from_pretrained(stock.transformer, folder).eval().get_base_model()


class _Counting(DPMSolverMultistepScheduler):
    """DPM-Solver++ for pipelines that say Euler's times (``sigmas``, ``mu``): it takes their number alone."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        del mu
        super().set_timesteps(num_inference_steps if sigmas is None else len(sigmas), device=device)


def stock_solver(stock: Any, name: str) -> Any:
    """A stock scheduler as a user would set it, ``ddim`` or ``dpm++``: of a flow, Euler's is the first-order one."""
    own = stock.scheduler
    if isinstance(own, FlowMatchEulerDiscreteScheduler):
        if name == "ddim":
            return own
        flow: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        if own.config.use_dynamic_shifting:
            return DPMSolverMultistepScheduler(**flow, use_dynamic_shifting=True, time_shift_type="exponential")
        return _Counting(**flow, flow_shift=own.config.shift)
    if own.config.get("use_flow_sigmas"):
        return own if name == "dpm++" else FlowMatchEulerDiscreteScheduler(shift=own.config.flow_shift)
    if isinstance(own, DPMSolverMultistepScheduler):  # which says nothing of it, and DDIM would cut latents off at 1
        return own if name == "dpm++" else DDIMScheduler.from_config(own.config, clip_sample=False)
    kind = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler}[name]
    return kind.from_config(own.config)


def draw(stock: Any, prompts: Sequence[str], first: Tensor, *, steps: int, guidance: float, output: str) -> Any:
    """What the stock pipeline draws: latents (B, C, h, w) for ``latent``, else pictures as it gives them (``np``)."""
    call = CALLS.get(type(stock).__name__, PLAIN)
    given = call.arguments(stock, first, guidance)
    found = stock(prompt=list(prompts), num_inference_steps=steps, output_type=output, **given).images
    return call.latents(stock, found) if output == "latent" else found


def answers(
    stock: Any, prompts: Sequence[str], first: Tensor, *, steps: int, guidance: float = 1.0
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What its network answered on the way: latents (B, C, h, w), time and answer (B, C, h, w) of each step.

    At a guidance of 1 it is the network's own answer; of one that is told its guidance, at any.
    """
    call, seen = CALLS.get(type(stock).__name__, PLAIN), []
    step = stock.scheduler.step

    def noted(answer: Tensor, timestep: Tensor, latents: Tensor, **options: Any) -> Any:
        seen.append((call.latents(stock, latents), timestep, call.latents(stock, answer)))
        return step(answer, timestep, latents, **options)

    stock.scheduler.step = noted
    try:
        draw(stock, prompts, first, steps=steps, guidance=guidance, output="latent")
    finally:
        del stock.scheduler.step
    return seen
