"""What an erasure of a full-size transformer holds: modules, trained numbers, bytes of the adapter, peak memory.

    python benchmarks/sizes.py --json sizes.json

Networks are built at their published configurations with tensors that hold nothing (torch's device ``meta``), so that
it runs anywhere in a minute; nothing is trained or drawn. Peak memory is that of a step of distillation on one picture
at the size the model draws, calculated as

    weights and buffers in bfloat16 + 16 bytes a trained number (itself, its gradient, Adam's two, float32)
    + what enters each block (kept by gradient checkpointing) + what autograd keeps inside the largest block

The last two are read off a pass of the real network with the adapter in it. Not in it: the text encoders (gone before,
see ``fade.models.family.load_base``; their bytes in float32 are beside it), the autoencoder, and what the kernels
themselves need. Ranks are those of the defaults; an adapter is stored in float16. It writes the rows, and prints the
table of docs/models.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
)
from torch import Tensor, nn

from fade.files import write_json
from fade.methods.fade.masks import Mask
from fade.methods.fade.sparse_lora import add_sparse_lora
from fade.models.deltas import plain_modules
from fade.models.denoiser import Denoiser
from fade.models.families.flux import FluxTransformer
from fade.models.families.flux_2 import Flux2Transformer
from fade.models.families.qwen_image import QwenImageTransformer
from fade.models.families.stable_diffusion_3 import JointTransformer
from fade.models.paths import FlowPath
from fade.models.told import Told

RANK = 8
PAIRS = 4000
"""Square matrices larger than this are scores of attention, which the fused kernels of CPU and GPU do not keep; where
tensors hold nothing torch takes the plain one."""
PARTS = ("all", "attention", "text_attention", "text_sites")
T5_XXL, CLIP_L, CLIP_G = 4_762_310_656, 123_060_480, 694_659_840
"""Numbers in the text encoders, as published."""


@dataclass(frozen=True)
class Size:
    """A model at full size.

    Attributes:
        network: builds its transformer.
        denoiser: the family's.
        latents: channels, height and width.
        tokens, width, pooled: of what it is told.
        guidance: whether it is told that too.
        encoders: numbers in its text encoders.
    """

    network: Callable[[], Any]
    denoiser: type[Denoiser]
    latents: tuple[int, int, int]
    tokens: int
    width: int
    pooled: int = 0
    guidance: bool = False
    masked: bool = False
    encoders: int = 0


def _sd35_medium() -> Any:
    return SD3Transformer2DModel(
        sample_size=128,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    )


def _flux_2_klein() -> Any:
    return Flux2Transformer2DModel(
        num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
    )


SIZES = {
    "SD3.5 medium": Size(
        _sd35_medium, JointTransformer, (16, 128, 128), 77 + 256, 4096, pooled=2048, encoders=CLIP_L + CLIP_G + T5_XXL
    ),
    "FLUX.1 dev": Size(
        lambda: FluxTransformer2DModel(guidance_embeds=True),
        FluxTransformer,
        (16, 128, 128),
        512,
        4096,
        pooled=768,
        guidance=True,
        encoders=CLIP_L + T5_XXL,
    ),
    "FLUX.1 schnell": Size(
        FluxTransformer2DModel, FluxTransformer, (16, 128, 128), 256, 4096, pooled=768, encoders=CLIP_L + T5_XXL
    ),
    "Qwen-Image": Size(
        QwenImageTransformer2DModel,
        QwenImageTransformer,
        (16, 128, 128),
        512,
        3584,
        masked=True,
        encoders=8_292_166_656,
    ),
    "FLUX.2 klein 4B": Size(_flux_2_klein, Flux2Transformer, (128, 64, 64), 512, 7680, encoders=4_022_468_096),
    "FLUX.2 dev": Size(
        Flux2Transformer2DModel,
        Flux2Transformer,
        (128, 64, 64),
        512,
        15360,
        guidance=True,
        encoders=24_011_361_280,
    ),
}


def rows(name: str, size: Size | None = None) -> Iterator[dict[str, Any]]:
    """A row for each part of a model that an erasure may change; ``size``: its own, but for the picture's."""
    size = size or SIZES[name]
    for part in PARTS:
        with _in_half(), torch.device("meta"):
            network = size.network().requires_grad_(False)
        denoiser = size.denoiser(network, FlowPath(), size.latents)
        numbers = sum(weight.numel() for weight in network.parameters())
        # Of SD3 a table of positions for pictures of any size, which is a tenth of all that it holds.
        held = 2 * (numbers + sum(buffer.numel() for buffer in network.buffers()))
        names = tuple(denoiser.modules(part))  # type: ignore[arg-type]
        weights = [plain_modules(network)[module].weight.numel() for module in names]
        mask = Mask("none", names, len(names), len(names))
        trained = add_sparse_lora(network, mask, rank=RANK, alpha=RANK, seed=0, name="student")
        learnt = sum(parameter.numel() for parameter in trained)
        with torch.device("meta"):
            entering, inside = _kept(denoiser, size)
        yield {
            "model": name,
            "part": part,
            "numbers": numbers,
            "modules": len(names),
            "weights_of_these": sum(weights),
            "trained": learnt,
            "adapter_bytes": 2 * learnt,
            "weights_bytes": held,
            "encoders_bytes": 4 * size.encoders,
            "kept_bytes": entering + inside,
            "peak_bytes": held + 16 * learnt + entering + inside,
        }


def told(size: Size) -> Told:
    """A prompt of zeros, in the shapes that a model is told."""
    others = {"pooled": torch.zeros(1, size.pooled)} if size.pooled else {}
    if size.guidance:
        others["guidance"] = torch.ones(1, 1)
    mask = torch.ones(1, size.tokens, dtype=torch.bool) if size.masked else None
    return Told(torch.zeros(1, size.tokens, size.width), mask, others)


def _kept(denoiser: Denoiser, size: Size) -> tuple[int, int]:
    """Bytes that enter the blocks, all of them, and that autograd keeps inside the largest one."""
    network, entering, inside, live = denoiser.network, [0], [0], [0]
    seen: set[int] = set()
    held: list[Tensor] = []  # alive, so that no two are one by their address
    fixed = {one.untyped_storage()._cdata for one in network.parameters()}

    def saved(tensor: Tensor) -> Tensor:
        if tensor.dim() > 1 and tensor.shape[-1] == tensor.shape[-2] > PAIRS:
            return tensor
        storage = tensor.untyped_storage()  # a view keeps all of it, and several views keep it once
        if storage._cdata not in seen | fixed:
            seen.add(storage._cdata)
            held.append(tensor)
            live[0] += storage.nbytes()
        return tensor

    def before(_: nn.Module, positional: Any, named: Any) -> None:
        tensors = {id(one): one for one in (*positional, *named.values()) if isinstance(one, Tensor)}
        entering[0] += sum(one.numel() * one.element_size() for one in tensors.values() if one.requires_grad)
        live[0] = 0

    def after(*_: Any) -> None:
        inside[0] = max(inside[0], live[0])

    blocks = [*network.transformer_blocks, *getattr(network, "single_transformer_blocks", ())]
    hooks = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    hooks += [block.register_forward_hook(after) for block in blocks]
    # What a step feeds in asks for no gradient; with adapters before the first block what enters it does.
    noisy = torch.zeros(1, *size.latents)
    with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
        denoiser.predict(noisy, torch.tensor(500), told(size))
    for hook in hooks:
        hook.remove()
    return entering[0], inside[0]


@contextmanager
def _in_half() -> Iterator[None]:
    """New tensors in bfloat16: of a network that holds nothing the type cannot be changed later."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def table(found: list[dict[str, Any]]) -> str:
    """As docs/models.md shows it."""
    lines = [
        "| model | what may change | modules | trained, rank 8 | adapter | peak of a step | text encoders, gone |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        lines.append(
            f"| {row['model']}, {row['numbers'] / 1e9:.1f} B | {row['part']} | {row['modules']} "
            f"| {row['trained'] / 1e6:.2f} M | {row['adapter_bytes'] / 1e6:.1f} MB | {row['peak_bytes'] / 1e9:.1f} GB "
            f"| {row['encoders_bytes'] / 1e9:.1f} GB |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table; write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--models", nargs="*", default=list(SIZES), choices=list(SIZES))
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = [row for name in given.models for row in rows(name)]
    print(table(found))
    if given.json:
        write_json(given.json, {"rank": RANK, "rows": found})


if __name__ == "__main__":
    main()
