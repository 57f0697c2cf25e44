"""CLIP score: how well pictures fit their prompts by a CLIP that a user gives (arXiv:2104.08718).

    100 max(cos(E_picture, E_prompt), 0)

The paper's own weight is 2.5 instead of 100. Of the prompts that name what was erased it should fall, of the others
stay. A CLIP is a folder in transformers' layout (CLIPModel or SiglipModel as safetensors with its tokenizer, and its
``preprocessor_config.json`` if its pictures are not prepared as the published ones'), or a name on the
Hugging Face hub.
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
from transformers import AutoModel, AutoTokenizer

from fade.errors import DataError
from fade.evaluation.extractors import Pictures, figure_name
from fade.files import read_json, sha256_file
from fade.hardware import compute_device
from fade.models.source import identity_of, is_hub_name

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the published CLIP's training pictures."""
HALF = (0.5, 0.5, 0.5)
"""Mean and deviation that the published SigLIPs take."""
KINDS = ("clip", "siglip")
"""Models, by transformers' word for them, that compare a picture with a sentence."""
_READ = (".json", ".txt", ".model", ".safetensors")


@dataclass(frozen=True, slots=True)
class Clip:
    """A CLIP, the size of its pictures, and their mean and deviation; ``name`` is what figures call it.

    Attributes:
        whole: whether a picture is resized whole, as SigLIP does, or its middle is cut out.
    """

    name: str
    model: Any
    tokenizer: Any
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    whole: bool = False

    @property
    def words(self) -> int:
        """Tokens of a text that are read."""
        return int(self.model.config.text_config.max_position_embeddings)


def find_clip(place: str | Path) -> Path:
    """The folder of a CLIP, by a folder or a name on the hub; nothing of it is loaded.

    Raises:
        DataError: it is not there whole, is another model, or the hub does not give it.
    """
    folder = _from_hub(str(place)) if is_hub_name(place) else Path(place)
    if missing := [name for name in ("config.json", "model.safetensors") if not (folder / name).is_file()]:
        raise DataError(
            f"No CLIP in {place}: {missing[0]} is missing. Give a folder of CLIPModel or SiglipModel in safetensors, "
            "or a name on the Hugging Face hub."
        )
    if (kind := read_json(folder / "config.json").get("model_type")) not in KINDS:
        raise DataError(
            f"{place} holds a model of the kind {kind!r}, not a CLIP that is known here: expected one of the kinds "
            f"{', '.join(KINDS)}, which compare a picture with a sentence."
        )
    return folder


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    try:
        return Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=[f"*{end}" for end in _READ])
        )
    except (OSError, ValueError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(
            f"No CLIP {name!r}: no such folder here, and the hub did not give it ({first}). Check the name; offline, "
            "fetch it first with `hf download` where there is a network; where the model asks for it, accept its "
            "licence and log in with `hf auth login`."
        ) from error


def clip_sha256(place: str | Path) -> str:
    """The identity of a CLIP: a hash over the names and hashes of all files that decide what it says."""
    folder = find_clip(place)
    return identity_of({path.name: sha256_file(path) for path in sorted(folder.iterdir()) if path.suffix in _READ})


def load_clip(place: str | Path) -> Clip:
    """The CLIP of a folder, or of a name on the hub.

    Raises:
        DataError: as ``find_clip``; or it does not load.
    """
    folder = find_clip(place)
    try:
        model: Any = AutoModel.from_pretrained(folder, use_safetensors=True, local_files_only=True)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise DataError(f"The CLIP in {place} does not load: {error}. Restore it.") from error
    prepared: Mapping[str, Any] = {}
    if (folder / "preprocessor_config.json").is_file():
        prepared = read_json(folder / "preprocessor_config.json")
    whole = model.config.model_type == "siglip"
    usual = (HALF, HALF) if whole else (MEAN, STD)
    mean, std = (tuple(prepared.get(key, value)) for key, value in zip(("image_mean", "image_std"), usual, strict=True))
    size = int(model.config.vision_config.image_size)
    return Clip(figure_name(folder), model.eval().to(compute_device()), tokenizer, size, mean, std, whole)


@torch.no_grad()
def embedded_texts(clip: Clip, texts: Sequence[str], *, batch: int = 64) -> Tensor:
    """Unit vectors of texts, (N, D) float32 on the CPU."""
    parts = []
    for start in range(0, len(texts), batch):
        told = _read(clip, texts[start : start + batch])
        parts.append(clip.model.get_text_features(**told).pooler_output.float().cpu())
    return torch.nn.functional.normalize(torch.cat(parts), dim=-1)


@torch.no_grad()
def embedded_pictures(clip: Clip, pictures: Pictures, *, batch: int = 32) -> Tensor:
    """Unit vectors of pictures (H, W, 3), (N, D) float32 on the CPU."""
    parts = []
    for start in range(0, len(pictures), batch):
        shown = torch.stack([_prepared(clip, one) for one in pictures[start : start + batch]]).to(clip.model.device)
        parts.append(clip.model.get_image_features(pixel_values=shown).pooler_output.float().cpu())
    return torch.nn.functional.normalize(torch.cat(parts), dim=-1)


def _read(clip: Clip, texts: Sequence[str]) -> dict[str, Tensor]:
    """Texts as the model takes them; a SigLIP was trained with all its positions filled."""
    padding: Any = "max_length" if clip.whole else True
    told = clip.tokenizer(list(texts), padding=padding, truncation=True, max_length=clip.words, return_tensors="pt").to(
        clip.model.device
    )
    return {name: told[name] for name in ("input_ids",) + (() if clip.whole else ("attention_mask",))}


@torch.no_grad()
def clip_scores(clip: Clip, pictures: Pictures, prompts: Sequence[str], *, batch: int = 32) -> NDArray[np.float64]:
    """The score of each picture (H, W, 3) with its prompt, 0 to 100.

    Raises:
        DataError: there are no pictures, or not as many as prompts.
    """
    if len(pictures) != len(prompts) or len(pictures) == 0:
        raise DataError(f"A CLIP score needs a prompt for each picture: got {len(pictures)} and {len(prompts)}.")
    cosine = (embedded_pictures(clip, pictures, batch=batch) * embedded_texts(clip, prompts)).sum(dim=-1)
    scores: NDArray[np.float64] = 100.0 * cosine.clamp(min=0).double().numpy()
    return scores


def _prepared(clip: Clip, picture: NDArray[np.uint8]) -> Tensor:
    """Resized by the shorter side (bicubic), the middle cut out, normalised, as published; a SigLIP's whole."""
    image = Image.fromarray(picture)
    scale = clip.size / min(image.size)
    width, height = (clip.size if clip.whole else max(clip.size, round(side * scale)) for side in image.size)
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
