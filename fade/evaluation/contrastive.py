"""Training of a small CLIP on pictures whose subject and style are known: the judge that ships for the canvas.

A caption may be true of many pictures of a batch ("a picture of a cat" of every cat), so the loss counts each true
pair: the softmax over captions shall be even over those that are true of a picture, and over pictures likewise

    L = 1/2 [ CE(softmax(s E_p E_t'), Y / |Y|) + CE(softmax(s E_t E_p'), Y' / |Y'|) ]
    (arXiv:2103.00020, figure 3, where each has one true partner; several as arXiv:2004.11362, equation 2)

Damaged pictures go with captions that say so and with no other: a CLIP that goes by texture alone calls shuffled
patches by their subject's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from fade.errors import DataError
from fade.evaluation.damage import SCRAMBLED, damaged, softened
from fade.files import write_json, writing
from fade.models.latents import to_tensor
from fade.models.training.networks import build_tokenizer, tokenize
from fade.seeding import derive_seed, torch_generator

BOTH = ("a {object} image in {style} style.", "a {style} picture of a {object}", "{object} in {style} style")
OF_OBJECT = ("a {object}", "a picture of a {object}", "an image of a {object}")
OF_STYLE = ("an image in {style} style", "a {style} picture", "a picture in {style} style")
OF_DAMAGED = (f"a {SCRAMBLED} image", f"a {SCRAMBLED} picture", SCRAMBLED)
WORDS = 16
"""Tokens of a caption, its begin and end among them."""


@dataclass(frozen=True, slots=True)
class Caption:
    """A caption, and what it says; an object or a style that is None is not spoken of."""

    text: str
    object: str | None
    style: str | None


def new_clip(tokenizer: CLIPTokenizer, *, size: int, width: int, layers: int, patch: int, seed: int) -> CLIPModel:
    """A CLIPModel with weights drawn from the seed; both of its encoders project to ``width`` / 2."""
    shared = {"num_attention_heads": max(1, width // 32), "hidden_act": "gelu"}
    half = width // 2
    text = {"hidden_size": half, "intermediate_size": 2 * half, "num_hidden_layers": 2, **shared}
    text |= {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    text |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    vision = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers, **shared}
    vision |= {"image_size": size, "patch_size": patch}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "clip"))
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=half))


def captions_of(objects: dict[str, tuple[str, ...]], styles: Sequence[str]) -> list[Caption]:
    """Every caption that training draws from.

    Args:
        objects: by name, further words for it.
    """
    spoken = [(name, word) for name, words in objects.items() for word in (name, *words)]
    found = [Caption(t.format(object=word, style=style), name, style) for name, word in spoken for style in styles
             for t in BOTH]  # fmt: skip
    found += [Caption(t.format(object=word), name, None) for name, word in spoken for t in OF_OBJECT]
    found += [Caption(t.format(style=style), None, style) for style in styles for t in OF_STYLE]
    return [*found, *(Caption(text, SCRAMBLED, SCRAMBLED) for text in OF_DAMAGED)]


def train_clip(
    folder: Path,
    pictures: NDArray[np.uint8],
    objects: Sequence[str],
    styles: Sequence[str],
    *,
    words: dict[str, tuple[str, ...]],
    width: int,
    layers: int,
    patch: int,
    steps: int,
    batch: int,
    learning_rate: float,
    damaged_share: float,
    seed: int,
) -> Iterator[tuple[int, float]]:
    """Train a CLIP on pictures (N, H, W, 3) uint8 and write ``folder``; yields step (from 1) and loss.

    Args:
        objects, styles: of each picture.
        words: by object, further words for it.

    Raises:
        DataError: there are no pictures.
    """
    if len(pictures) == 0:
        raise DataError("No pictures to train a CLIP on: got 0.")
    captions = captions_of(words, sorted(set(styles)))
    tokenizer = build_tokenizer([one.text for one in captions], max_length=WORDS)
    model = new_clip(tokenizer, size=pictures.shape[1], width=width, layers=layers, patch=patch, seed=seed)
    told = tokenize(tokenizer, [one.text for one in captions])
    said = _said_of(captions, objects, styles)
    speaks = torch.tensor([2 * (one.object is None) + (one.style is None) for one in captions])
    generator = torch_generator(seed, "clip")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, weight_decay=5e-2, betas=(0.9, 0.98), fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    broken = round(batch * damaged_share)
    model.train()
    for step in range(1, steps + 1):
        rows = torch.randint(len(pictures), (batch,), generator=generator)
        whole = to_tensor(pictures[rows.numpy()])
        shown = softened(torch.cat([damaged(whole[:broken], generator), whole[broken:]]), generator)
        fits = said[:, rows].clone()
        fits[:, :broken] = said[:, -1:]
        drawn = torch.multinomial(_evenly(fits, speaks).T, 1, generator=generator).squeeze(1)
        answer = model(input_ids=told[drawn], pixel_values=shown)
        loss = _loss(answer.logits_per_image, fits[drawn].T)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=float(np.log(100)))
        yield step, float(loss.detach())
    _save(folder, model.eval(), tokenizer, pictures.shape[1])


def _said_of(captions: Sequence[Caption], objects: Sequence[str], styles: Sequence[str]) -> Tensor:
    """Which captions are true of which pictures, (captions, pictures + 1) boolean; the last is a damaged picture."""
    shown = (np.array([*objects, SCRAMBLED]), np.array([*styles, SCRAMBLED]))
    rows = [
        (shown[0] == one.object if one.object is not None else shown[0] != SCRAMBLED)
        & (shown[1] == one.style if one.style is not None else shown[1] != SCRAMBLED)
        for one in captions
    ]
    return torch.from_numpy(np.stack(rows))


def _evenly(fits: Tensor, speaks: Tensor) -> Tensor:
    """Weights of captions (captions, pictures): of both, of the object, of the style come as often."""
    weights = torch.zeros(fits.shape)
    for kind in speaks.unique():
        true = fits.float() * (speaks == kind)[:, None]
        weights += true / true.sum(dim=0, keepdim=True).clamp(min=1)
    return weights


def _loss(logits: Tensor, fits: Tensor) -> Tensor:
    """Of logits (pictures, captions) and which of them are true."""
    true = fits.float()
    by_picture = -(true / true.sum(1, keepdim=True) * F.log_softmax(logits, dim=1)).sum(1).mean()
    by_caption = -(true / true.sum(0, keepdim=True) * F.log_softmax(logits, dim=0)).sum(0).mean()
    return (by_picture + by_caption) / 2


def _save(folder: Path, model: CLIPModel, tokenizer: CLIPTokenizer, size: int) -> None:
    with writing(folder) as temporary:
        model.save_pretrained(temporary, safe_serialization=True)
        tokenizer.save_pretrained(temporary)
        half = [0.5, 0.5, 0.5]
        kind = {"image_processor_type": "CLIPImageProcessor", "crop_size": size, "size": {"shortest_edge": size}}
        write_json(temporary / "preprocessor_config.json", {**kind, "image_mean": half, "image_std": half})
