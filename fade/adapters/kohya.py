"""LoRAs under kohya's names, as A1111, ComfyUI and kohya's own scripts read them.

U-Net    ``lora_unet_<module>``, a pair of factors for each module
FLUX.1   ``lora_unet_<block>_<layer>`` by the names of its release, in which queries, keys and values (and in single
         blocks what goes into the feed-forward) are one layer: their factors are put beside each other, each with rows
         of the up matrix and columns of its own, so that a reader takes them apart again bit for bit

Dots are lost in these names, and readers turn them back by lists. So the stock pipeline's own reader is asked what it
makes of them, and what it loses is refused here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from diffusers import FluxPipeline, StableDiffusionPipeline
from diffusers.utils import convert_unet_state_dict_to_peft
from torch import Tensor

from fade.adapters.foreign import LORA_A, LORA_B
from fade.errors import AdapterFormatError, listing

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""Module to its A, (r, in, ...), and B, (out, r, ...), of scaling 1."""
FLUX = "FluxPipeline"
_FLUX_LAYERS = {
    r"transformer_blocks\.(\d+)\.attn\.to_out\.0": r"double_blocks_\1_img_attn_proj",
    r"transformer_blocks\.(\d+)\.attn\.to_add_out": r"double_blocks_\1_txt_attn_proj",
    r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj": r"double_blocks_\1_img_mlp_0",
    r"transformer_blocks\.(\d+)\.ff\.net\.2": r"double_blocks_\1_img_mlp_2",
    r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj": r"double_blocks_\1_txt_mlp_0",
    r"transformer_blocks\.(\d+)\.ff_context\.net\.2": r"double_blocks_\1_txt_mlp_2",
    r"transformer_blocks\.(\d+)\.norm1\.linear": r"double_blocks_\1_img_mod_lin",
    r"transformer_blocks\.(\d+)\.norm1_context\.linear": r"double_blocks_\1_txt_mod_lin",
    r"single_transformer_blocks\.(\d+)\.proj_out": r"single_blocks_\1_linear2",
    r"single_transformer_blocks\.(\d+)\.norm\.linear": r"single_blocks_\1_modulation_lin",
}
_FLUX_FUSED = {
    (r"transformer_blocks\.(\d+)", r"double_blocks_\1_img_attn_qkv"): {f"attn.to_{x}": 1 for x in "qkv"},
    (r"transformer_blocks\.(\d+)", r"double_blocks_\1_txt_attn_qkv"): {f"attn.add_{x}_proj": 1 for x in "qkv"},
    (r"single_transformer_blocks\.(\d+)", r"single_blocks_\1_linear1"): {
        **{f"attn.to_{x}": 1 for x in "qkv"},
        "proj_mlp": 4,
    },
}
"""Block and fused layer to its parts, in order, each with its rows in widths of the network."""


def as_kohya(factors: Factors, *, pipeline: str, component: str) -> dict[str, Tensor]:
    """A LoRA's tensors under kohya's names, alpha the rank in each.

    Args:
        pipeline: the base's class in diffusers.
        component: the denoiser's name in it.

    Raises:
        AdapterFormatError: no such names are known of its kind, or the stock reader loses a module of it.
    """
    if component == "unet":
        return _of_unet(factors)
    if pipeline == FLUX:
        return _of_flux(factors)
    raise AdapterFormatError(
        f"kohya's names are known of U-Nets and FLUX.1 alone, and this adapter is of a {pipeline or component}. Export "
        "it as 'diffusers', 'peft', 'difference' or 'merged'."
    )


def _of_unet(factors: Factors) -> dict[str, Tensor]:
    """Lower ranks are filled up with zeros, as diffusers forgets attention's alphas when they differ."""
    rank, named = max(len(a) for a, _ in factors.values()), dict[str, Tensor]()
    for module, (a, b) in factors.items():
        missing = rank - len(a)
        down = torch.cat([a, a.new_zeros(missing, *a.shape[1:])])
        up = torch.cat([b, b.new_zeros(len(b), missing, *b.shape[2:])], dim=1)
        named |= _entry(f"lora_unet_{module.replace('.', '_')}", down, up)
    read, _ = StableDiffusionPipeline.lora_state_dict(dict(named))
    back = convert_unet_state_dict_to_peft({key.partition(".")[2]: tensor for key, tensor in read.items()})
    _refuse_lost(module for module in factors if f"{module}{LORA_A}" not in back or f"{module}{LORA_B}" not in back)
    return named


def _of_flux(factors: Factors) -> dict[str, Tensor]:
    named, taken = dict[str, Tensor](), set[str]()
    for module, (a, b) in factors.items():
        for pattern, layer in _FLUX_LAYERS.items():
            if found := re.fullmatch(pattern, module):
                named |= _entry(f"lora_unet_{found.expand(layer)}", a, b)
                taken.add(module)
    for (pattern, layer), parts in _FLUX_FUSED.items():
        blocks = {found[0]: found for module in factors if (found := re.match(pattern + r"(?=\.)", module))}
        for block, found in blocks.items():
            given = {part: factors[name] for part in parts if (name := f"{block}.{part}") in factors}
            if given:
                named |= _entry(f"lora_unet_{found.expand(layer)}", *_beside(given, parts))
                taken |= {f"{block}.{part}" for part in given}
    _refuse_lost(module for module in factors if module not in taken)
    try:
        back = FluxPipeline.lora_state_dict(dict(named))
    except (AssertionError, ValueError) as error:  # it knows the width of the published network alone
        raise AdapterFormatError(
            f"'kohya' cannot hold this adapter: diffusers does not read it ({error or 'another width than 3072'}). Use "
            "another layout."
        ) from error
    _refuse_lost(module for module, pair in factors.items() if not _is_back(module, pair, back))
    return named


def _beside(given: Factors, parts: Mapping[str, int]) -> tuple[Tensor, Tensor]:
    """The factors of one fused layer: every part has its own share of the rank, and those not given are zero."""
    like = next(iter(given.values()))[0]
    width, rank = like.shape[1], max(len(a) for a, _ in given.values())
    downs, ups = [], []
    for part, widths in parts.items():
        a, b = given.get(part, (like.new_zeros(0, width), like.new_zeros(widths * width, 0)))
        downs.append(torch.cat([a, a.new_zeros(rank - len(a), width)]))
        ups.append(torch.cat([b, b.new_zeros(len(b), rank - b.shape[1])], dim=1))
    return torch.cat(downs), torch.block_diag(*ups)


def _is_back(module: str, pair: tuple[Tensor, Tensor], back: Mapping[str, Tensor]) -> bool:
    """Whether a reader has a module's factors again, filled up with zeros or not."""
    a, b = (back.get(f"transformer.{module}{ending}") for ending in (LORA_A, LORA_B))
    rank = len(pair[0])
    return a is not None and b is not None and torch.equal(a[:rank], pair[0]) and torch.equal(b[:, :rank], pair[1])


def _entry(name: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    alpha = torch.tensor(float(len(down)))
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alpha}


def _refuse_lost(modules: Iterable[str]) -> None:
    if lost := list(modules):
        raise AdapterFormatError(f"'kohya' cannot hold {listing(lost)}: diffusers misreads these. Use another layout.")
