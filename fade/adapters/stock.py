"""An export, loaded back by stock libraries that know nothing of this one: do they predict what was approved? (ours)

A LoRA that a tool reads by half, or whose alpha it loses, raises no error there: it only erases less.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from fade.adapters.card import load_card, weights_path
from fade.adapters.exports import Layout
from fade.adapters.store import activate, apply_adapter, put_in, restore_base
from fade.errors import AdapterFormatError, listing
from fade.files import read_json
from fade.models.base import Base
from fade.models.denoiser import Denoiser
from fade.models.family import load_base
from fade.models.generate import first_latents
from fade.models.source import find_base
from fade.models.told import Told

LIMIT = 0.01
"""Of ``deviation``, less what rounding explains."""


def deviation(out: Path, *, layout: Layout, adapter: Path, base: Path, strength: float = 1.0) -> float:
    """How far stock libraries with the export are from this library with the adapter, in parts of the adapter's change.

    0 is the same prediction of the denoiser, 1 as far off as the base without any adapter; at one noisy latent of
    each of four timesteps.

    Args:
        out: what ``export_adapter`` wrote with this ``layout`` and ``strength``.
        adapter: the adapter it was made of.
        base: the adapter's base: a diffusers folder, a hub name, or a single file, opened as ``load_base`` opens it.

    Raises:
        AdapterFormatError: further off than rounding explains: a tensor or a factor was lost.
        BaseModelError: ``base`` is no base model.
    """
    sd = load_base(base)
    ask = Question.of(sd)
    plain = ask(sd.denoiser)
    apply_adapter(sd, adapter, name="export")
    activate(sd, {"export": strength})
    ours = ask(sd.denoiser)
    restore_base(sd)
    # A merged model is held in the precision of its base: of a small change that may be much.
    dtype = _precision(out / sd.denoiser.component) if layout == "merged" else torch.float32
    denoiser = sd.denoiser
    del sd  # encoders and decoder, which are asked no more
    rounding = _rounding(ask, denoiser, plain, dtype)
    # Two models of today are more than many machines hold: this one goes before the other is loaded.
    shell = denoiser.on(nn.Identity())
    del denoiser
    gc.collect()
    theirs = ask(shell.on(_stock_network(out, layout, base, shell.component).to(ask.latents.device)))
    change, off = _norm(ours - plain), _norm(ours - theirs)
    found = off / change if change else float(off > 0)
    if not off <= LIMIT * change + rounding:  # NaN too
        raise AdapterFormatError(
            f"The export {out} is not what was exported: loaded back by stock libraries it is off by {found:.1%} of "
            "the adapter's change. Do not use it; a tensor or a factor is lost in this layout."
        )
    return found


def check_stored(sd: Base, tensors: Mapping[str, Tensor], folder: Path) -> float:
    """How far an imported adapter as it was stored is from what was read, in parts of its change.

    At most ``LIMIT``, in every tensor, and in what the network answers but for what rounding explains.

    Args:
        sd: the base, without adapters.
        tensors: what ``import_adapter`` gave: float32, and a difference's positions.
        folder: where ``save_adapter`` wrote them.

    Raises:
        AdapterFormatError: further off, or it changes nothing.
    """
    written = load_file(weights_path(folder, load_card(folder)))
    lost = [name for name, one in tensors.items() if _is_lost(one, written[name].to(one))]
    ask = Question.of(sd)
    plain = ask(sd.denoiser)
    try:
        put_in(sd, tensors, name="read", origin=str(folder))
        activate(sd, {"read": 1.0})
        read = ask(sd.denoiser)
        restore_base(sd)
        apply_adapter(sd, folder, name="stored")
        activate(sd, {"stored": 1.0})
        stored = ask(sd.denoiser)
    finally:
        restore_base(sd)
    change, off = _norm(read - plain), _norm(read - stored)
    if not change > 0:
        raise AdapterFormatError("The adapter changes nothing of what the base predicts: there is nothing to import.")
    if lost or not off <= LIMIT * change + _rounding(ask, sd.denoiser, plain, torch.float32):
        raise AdapterFormatError(
            f"The adapter as it was stored is off by {off / change:.1%} of its change; at most {LIMIT:.0%} is taken"
            f"{f' ({listing(lost)} differ)' if lost else ''}. Save it anew in float32 with the tool that made it."
        )
    return off / change


def _is_lost(read: Tensor, stored: Tensor) -> bool:
    """Whether a tensor was stored as another one; positions are whole numbers, of which none may differ."""
    if not read.is_floating_point():
        return not torch.equal(read, stored)
    return _norm(read - stored) > LIMIT * _norm(read)


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))


def _precision(weights: Path) -> torch.dtype:
    """The coarsest type of a merged model's denoiser, in its folder."""
    tensors = [tensor for file in sorted(weights.glob("*.safetensors")) for tensor in load_file(file).values()]
    return max((tensor.dtype for tensor in tensors if tensor.is_floating_point()), key=lambda one: torch.finfo(one).eps)


def _rounding(ask: Question, denoiser: Denoiser, plain: Tensor, dtype: torch.dtype) -> float:
    """How far apart two answers may be by rounding of the weights in this type alone."""
    return 2 * _norm(ask(denoiser.on(_rounded(denoiser.network, dtype))) - plain)


@torch.no_grad()
def _rounded(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy with every weight off by at most half a unit in its last place, at random.

    A copy, since others may read these weights (``fade.models.sharing``).
    """
    copied, draw = copy.deepcopy(network), torch.Generator().manual_seed(0)
    for weight in copied.parameters():
        shift = (torch.rand(weight.shape, generator=draw) - 0.5) * torch.finfo(dtype).eps
        weight.mul_(1 + shift.to(weight.device))
    return copied


@dataclass(frozen=True, slots=True)
class Question:
    """What denoisers of one base are asked: a noisy latent at each of four times, (4, C, h, w), told one prompt."""

    latents: Tensor
    told: Told

    @classmethod
    @torch.no_grad()
    def of(cls, base: Base) -> Question:
        """One that fits a base's latents and prompts, on its device."""
        latents = first_latents(range(4), base.denoiser.latent_shape)
        return cls(latents.to(base.device), base.encode_prompts(["a picture"]).to(base.device))

    @torch.no_grad()
    def __call__(self, denoiser: Denoiser) -> Tensor:
        """Its answers; one latent at a time, since of a large network all four take much memory at once."""
        times = torch.tensor([50, 300, 600, 900]).to(self.latents.device)
        told = zip(self.latents.split(1), times.split(1), strict=True)
        return torch.cat([denoiser.predict(noisy, time, self.told).float().cpu() for noisy, time in told])


def _stock_network(out: Path, layout: Layout, base: Path, component: str) -> Any:
    found = None if layout == "merged" else find_base(base)
    source = out if found is None else found.path
    if found is not None and (source.is_file() or found.beside is not None):
        pipeline = load_base(base).pipeline
    else:
        # Parts that a base does without are to be said: the loader asks for them else.
        index = read_json(source / "model_index.json")
        absent = {part: None for part, given in index.items() if given == [None, None]}
        pipeline = DiffusionPipeline.from_pretrained(source, torch_dtype=torch.float32, **absent)
    if layout in ("diffusers", "kohya"):
        pipeline.load_lora_weights(out)
    network = getattr(pipeline, component)
    if layout == "peft":
        return PeftModel.from_pretrained(network, out).eval()
    if layout == "difference":
        weights = network.state_dict()
        for key, tensor in load_file(out).items():
            weights[key.removeprefix(f"{component}.")] += tensor.to(network.device)
    return network.eval()
