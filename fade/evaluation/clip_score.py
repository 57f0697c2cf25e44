"""CLIP score: how well pictures fit their prompts by a CLIP that a user gives (arXiv:2104.08718).

    100 max(cos(E_picture, E_prompt), 0)

The paper's own weight is 2.5 instead of 100. Of the prompts that name what was erased it should fall, of the others
stay. The folder is in transformers' layout: CLIPModel as safetensors with its tokenizer, and its
``preprocessor_config.json`` if its pictures are not prepared as the published CLIP's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from fade.errors import DataError
from fade.evaluation.extractors import Pictures, figure_name
from fade.files import read_json
from fade.hardware import compute_device

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the published CLIP's training pictures."""


@dataclass(frozen=True, slots=True)
class Clip:
    """A CLIP, the size of its pictures, and their mean and deviation; ``name`` is what figures call it."""

    name: str
    model: Any
    tokenizer: Any
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_clip(folder: Path) -> Clip:
    """The CLIP of a folder.

    Raises:
        DataError: it is not there whole, or is another model.
    """
    if missing := [name for name in ("config.json", "model.safetensors") if not (folder / name).is_file()]:
        raise DataError(f"No CLIP in {folder}: {missing[0]} is missing. Give a folder of CLIPModel in safetensors.")
    if (kind := read_json(folder / "config.json").get("model_type")) != "clip":
        raise DataError(f"{folder} holds a model of the kind {kind!r}, not a CLIP.")
    model = CLIPModel.from_pretrained(folder, use_safetensors=True, local_files_only=True).eval().to(compute_device())
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    prepared: Mapping[str, Any] = {}
    if (folder / "preprocessor_config.json").is_file():
        prepared = read_json(folder / "preprocessor_config.json")
    size = int(model.config.vision_config.image_size)
    mean, std = (tuple(prepared.get(key, value)) for key, value in (("image_mean", MEAN), ("image_std", STD)))
    return Clip(figure_name(folder), model, tokenizer, size, mean, std)


@torch.no_grad()
def clip_scores(clip: Clip, pictures: Pictures, prompts: Sequence[str], *, batch: int = 32) -> NDArray[np.float64]:
    """The score of each picture (H, W, 3) with its prompt, 0 to 100.

    Raises:
        DataError: there are no pictures, or not as many as prompts.
    """
    if len(pictures) != len(prompts) or len(pictures) == 0:
        raise DataError(f"A CLIP score needs a prompt for each picture: got {len(pictures)} and {len(prompts)}.")
    parts = []
    for start in range(0, len(pictures), batch):
        told = clip.tokenizer(
            list(prompts[start : start + batch]), padding=True, truncation=True,
            max_length=clip.model.config.text_config.max_position_embeddings, return_tensors="pt",
        ).to(clip.model.device)  # fmt: skip
        shown = torch.stack([_prepared(clip, one) for one in pictures[start : start + batch]]).to(clip.model.device)
        answer = clip.model(input_ids=told.input_ids, attention_mask=told.attention_mask, pixel_values=shown)
        cosine = torch.nn.functional.cosine_similarity(answer.image_embeds, answer.text_embeds)
        parts.append(100.0 * cosine.clamp(min=0).double().cpu().numpy())
    return np.concatenate(parts)


def _prepared(clip: Clip, picture: NDArray[np.uint8]) -> Tensor:
    """Resized by the shorter side (bicubic), the middle cut out, normalised, as the published CLIP's."""
    image = Image.fromarray(picture)
    scale = clip.size / min(image.size)
    width, height = (max(clip.size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - clip.size) // 2, (height - clip.size) // 2
    image = image.crop((left, top, left + clip.size, top + clip.size))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(clip.mean)[:, None, None]) / torch.tensor(clip.std)[:, None, None]


def mean_scores(
    clip: Clip, pictures: Pictures, prompts: Sequence[str], erased: NDArray[np.bool_]
) -> tuple[float | None, float | None]:
    """Mean scores of the retained prompts' pictures, and of those that were erased; None of none."""
    scores = clip_scores(clip, pictures, prompts)
    retained, gone = (float(part.mean()) if len(part) else None for part in (scores[~erased], scores[erased]))
    return retained, gone
