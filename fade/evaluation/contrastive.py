"""Training of a small CLIP on pictures whose subject and style are known: the judge that ships for the canvas.

A batch of captions sampled at random holds few of a vocabulary's names, and most of what a small CLIP learns from it
are styles. So each step tells every name at once, in wordings drawn anew, and each picture is asked twice:

    L = CE(softmax(s E_p E_o'), its object) + CE(softmax(s E_p E_s'), its style) + 1/2 [ CE by rows + CE by columns ]

o, s: one caption of each object, of each style, and of damage. The last term is the contrastive one (arXiv:2103.00020,
figure 3) over captions of both, of the pictures that are whole; a caption may be true of several of them, over which
its target is then even (arXiv:2004.11362, equation 2). The first two are ours.

Damaged pictures go with captions that say so and with no other, each beside the same picture whole: a CLIP that goes
by texture alone calls shuffled patches by their subject's name.
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
MOVE = 2
"""Pixels by which a picture is moved each way."""
KIND = 3
"""Damaged pictures of one kind of damage; a step has several."""
PLACES = 5.0
"""By what transformers' initial embeddings of a patch's place are multiplied."""


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
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=half))
    with torch.no_grad():  # drawn much smaller than what patches give: textures would be learnt long before places
        model.vision_model.embeddings.position_embedding.weight.mul_(PLACES)
    return model


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
    names = [sorted(set(objects)), sorted(set(styles))]
    captions = captions_of(words, names[1])
    tokenizer = build_tokenizer([one.text for one in captions], max_length=WORDS)
    model = new_clip(tokenizer, size=pictures.shape[1], width=width, layers=layers, patch=patch, seed=seed)
    told = tokenize(tokenizer, [one.text for one in captions])
    wordings = _wordings(captions, *names)
    shows = torch.tensor([[of.index(one) for of, one in zip(names, pair, strict=True)]
                          for pair in zip(objects, styles, strict=True)])  # fmt: skip
    generator = torch_generator(seed, "clip")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, weight_decay=5e-2, betas=(0.9, 0.98), fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    broken = round(batch * damaged_share)
    model.train()
    for step in range(1, steps + 1):
        rows = torch.randint(len(pictures), (batch,), generator=generator)
        rows[:broken] = rows[broken : 2 * broken]
        whole = _moved(to_tensor(pictures[rows.numpy()]), generator)
        mush = [damaged(part, generator) for part in whole[:broken].split(KIND)]
        shown = softened(torch.cat([*mush, whole[broken:]]), generator)
        loss = _loss(model, told, wordings, shown, shows[rows], broken=broken, generator=generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=float(np.log(100)))
        yield step, float(loss.detach())
    _save(folder, model.eval(), tokenizer, pictures.shape[1])


@dataclass(frozen=True, slots=True)
class _Wordings:
    """Rows of the captions that say one thing: of each object, and of damage; of each style, and of damage; of both.

    ``both`` has the object's number by rows and the style's by columns.
    """

    objects: list[list[int]]
    styles: list[list[int]]
    both: list[list[list[int]]]


def _wordings(captions: Sequence[Caption], objects: Sequence[str], styles: Sequence[str]) -> _Wordings:
    said: dict[tuple[str | None, str | None], list[int]] = {}
    for row, one in enumerate(captions):
        said.setdefault((one.object, one.style), []).append(row)
    damage = said[SCRAMBLED, SCRAMBLED]
    return _Wordings(
        [*(said[name, None] for name in objects), damage],
        [*(said[None, name] for name in styles), damage],
        [[said[name, style] for style in styles] for name in objects],
    )


def _drawn(wordings: Sequence[Sequence[int]], generator: torch.Generator) -> list[int]:
    """One caption of each."""
    return [one[int(torch.randint(len(one), (1,), generator=generator))] for one in wordings]


def _loss(
    model: CLIPModel,
    told: Tensor,
    wordings: _Wordings,
    shown: Tensor,
    shows: Tensor,
    *,
    broken: int,
    generator: torch.Generator,
) -> Tensor:
    """L of pictures, the first ``broken`` of them damaged; ``shows``: numbers of object and style, (B, 2)."""
    groups = [_drawn(one, generator) for one in (wordings.objects, wordings.styles)]
    whole = shows[broken:]
    both = _drawn([wordings.both[thing][style] for thing, style in whole.tolist()], generator)
    answer = model(input_ids=told[torch.tensor([*groups[0], *groups[1], *both])], pixel_values=shown)
    of_objects, of_styles, of_both = answer.logits_per_image.split([len(groups[0]), len(groups[1]), len(both)], dim=1)
    named = []
    for logits, column in ((of_objects, 0), (of_styles, 1)):
        damage = torch.full((broken,), logits.shape[1] - 1)
        named.append(F.cross_entropy(logits, torch.cat([damage, whole[:, column]])))
    true = (whole[:, None] == whole[None]).all(dim=2).float()
    even = true / true.sum(dim=1, keepdim=True)
    pairs = of_both[broken:]
    contrast = (F.cross_entropy(pairs, even) + F.cross_entropy(pairs.T, even)) / 2
    total: Tensor = named[0] + named[1] + contrast
    return total


def _moved(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (B, C, H, W) moved by up to ``MOVE`` pixels each way; edges are repeated."""
    count, _, height, width = pictures.shape
    wide = F.pad(pictures, (MOVE,) * 4, mode="replicate")
    places = torch.randint(2 * MOVE + 1, (count, 2), generator=generator).tolist()
    return torch.stack([one[:, y : y + height, x : x + width] for one, (y, x) in zip(wide, places, strict=True)])


def _save(folder: Path, model: CLIPModel, tokenizer: CLIPTokenizer, size: int) -> None:
    with writing(folder) as temporary:
        model.save_pretrained(temporary, safe_serialization=True)
        tokenizer.save_pretrained(temporary)
        half = [0.5, 0.5, 0.5]
        kind = {"image_processor_type": "CLIPImageProcessor", "crop_size": size, "size": {"shortest_edge": size}}
        write_json(temporary / "preprocessor_config.json", {**kind, "image_mean": half, "image_std": half})
