"""Classifiers of a user's folder: two image classifiers, ``style`` and ``object``, without pickle.

FOLDER/style, FOLDER/object     transformers' layout: config.json (``id2label``) and model.safetensors
FOLDER/style.safetensors ...    timm's vision transformer, as UnlearnCanvas publishes it (vit_large_patch16_224 with a
                                head of the benchmark's 51 or 20 outputs). Theirs are .pth files, pickles: read them
                                once where you trust them, with ``torch.load(path, weights_only=True)``, and save
                                ``["model_state_dict"]`` with safetensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from fade.errors import DataError, listing
from fade.evaluation.unlearncanvas import OBJECTS, STYLES
from fade.hardware import compute_device

DOMAINS: dict[str, Sequence[str]] = {"style": STYLES, "object": OBJECTS}
_HEAD_WIDTH = 64
"""Width of one attention head in every published vision transformer of timm."""


@dataclass(frozen=True, slots=True)
class Classifier:
    """A classifier: its network, the size of its input, and what its outputs are called."""

    model: Any
    size: int
    labels: tuple[str, ...]


def load_classifiers(folder: Path) -> dict[str, Classifier]:
    """Both classifiers of a folder by domain.

    Raises:
        DataError: one is missing, is no such network, or has other classes than its labels.
    """
    return {domain: _load(folder, domain, labels) for domain, labels in DOMAINS.items()}


def _load(folder: Path, domain: str, labels: Sequence[str]) -> Classifier:
    single, whole = folder / f"{domain}.safetensors", folder / domain
    if single.is_file():
        return from_timm(load_file(single), labels, origin=str(single))
    if not whole.is_dir():
        raise DataError(
            f"No {domain} classifier in {folder}: expected {single.name}, or {domain}/config.json with "
            f"{domain}/model.safetensors. Pickled checkpoints (.pth) are not read; see fade/evaluation/classifiers.py."
        )
    return load_classifier(whole)


def load_classifier(folder: Path) -> Classifier:
    """A classifier in transformers' layout.

    Raises:
        DataError: its files are missing.
    """
    if missing := [name for name in ("config.json", "model.safetensors") if not (folder / name).is_file()]:
        raise DataError(f"No classifier in {folder}: {missing[0]} is missing. Pickled checkpoints (.pth) are not read.")
    model: Any = AutoModelForImageClassification.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    model = model.eval().to(compute_device())
    named = model.config.id2label
    size = int(getattr(model.config, "image_size", 224))  # convolutions take any size and name none
    return Classifier(model, size, tuple(str(named[i]) for i in range(len(named))))


def from_timm(state: Mapping[str, Tensor], labels: Sequence[str], *, origin: str) -> Classifier:
    """timm's vision transformer (pre-norm, a class token, one linear head) as transformers' of the same shape.

    Raises:
        DataError: the tensors are of another network, or the head has another number of outputs than labels.
    """
    needed = {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "head.weight"}
    if missing := sorted(needed - set(state)):
        raise DataError(f"{origin} is no vision transformer of timm: it lacks {listing(missing)}.")
    width, patch = state["cls_token"].shape[-1], state["patch_embed.proj.weight"].shape[-1]
    if len(state["head.weight"]) != len(labels):
        raise DataError(f"{origin} has {len(state['head.weight'])} outputs; expected {len(labels)}, one a class.")
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    size = patch * math.isqrt(state["pos_embed"].shape[1] - 1)
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=max(1, width // _HEAD_WIDTH),
        intermediate_size=len(state["blocks.0.mlp.fc1.weight"]),
        image_size=size,
        patch_size=patch,
        layer_norm_eps=1e-6,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={name: i for i, name in enumerate(labels)},
    )
    model = ViTForImageClassification(config).eval()
    slots = {name: parameter for name, parameter in model.named_parameters()}
    for name, tensor in _renamed(state, depth, slots).items():
        if slots[name].shape != tensor.shape:
            raise DataError(f"{origin}: {name} is {tuple(tensor.shape)}, expected {tuple(slots[name].shape)}.")
        slots.pop(name).data.copy_(tensor)
    if slots:
        raise DataError(f"{origin} lacks the tensors for {listing(sorted(slots))}.")
    return Classifier(model.to(compute_device()), size, tuple(labels))


def _renamed(state: Mapping[str, Tensor], depth: int, slots: Mapping[str, Any]) -> dict[str, Tensor]:
    """timm's tensors by transformers' names, whose words changed between versions: they are found by their endings."""
    found = {
        _one(slots, "cls_token"): state["cls_token"],
        _one(slots, "position_embeddings"): state["pos_embed"],
        _one(slots, "patch_embeddings.projection.weight"): state["patch_embed.proj.weight"],
        _one(slots, "patch_embeddings.projection.bias"): state["patch_embed.proj.bias"],
    }
    for kind in ("weight", "bias"):
        found[f"vit.layernorm.{kind}"] = state[f"norm.{kind}"]
        found[f"classifier.{kind}"] = state[f"head.{kind}"]
        for i in range(depth):
            theirs = f"blocks.{i}"
            here = {
                name.partition(f".{i}.")[2]: name for name in slots if f"layers.{i}." in name or f"layer.{i}." in name
            }
            queries, keys, values = state[f"{theirs}.attn.qkv.{kind}"].chunk(3)
            parts = {
                ("query", "q_proj"): queries,
                ("key", "k_proj"): keys,
                ("value", "v_proj"): values,
                ("attention.output.dense", "o_proj"): state[f"{theirs}.attn.proj.{kind}"],
                ("intermediate.dense", "fc1"): state[f"{theirs}.mlp.fc1.{kind}"],
                ("layernorm_before",): state[f"{theirs}.norm1.{kind}"],
                ("layernorm_after",): state[f"{theirs}.norm2.{kind}"],
            }
            for endings, tensor in parts.items():
                (name,) = [n for n in here.values() if n.endswith(tuple(f"{ending}.{kind}" for ending in endings))]
                found[name] = tensor
            outputs = [n for key, n in here.items() if key in (f"output.dense.{kind}", f"mlp.fc2.{kind}")]
            found[outputs[0]] = state[f"{theirs}.mlp.fc2.{kind}"]
    return found


def _one(slots: Mapping[str, Any], ending: str) -> str:
    (name,) = [name for name in slots if name.endswith(ending)]
    return name


def classify(
    classifier: Classifier, pictures: Sequence[NDArray[np.uint8]], *, batch: int = 32
) -> tuple[list[str], NDArray[np.float64]]:
    """Names of pictures (H, W, 3), and the features they were named by, (N, D)."""
    said, features = answered(classifier, pictures, batch=batch)
    return [classifier.labels[i] for i in said.argmax(axis=1).tolist()], features


@torch.no_grad()
def answered(
    classifier: Classifier, pictures: Sequence[NDArray[np.uint8]], *, batch: int = 32
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Logits (N, classes) of pictures (H, W, 3), and the features they come from, (N, D).

    Prepared as UnlearnCanvas does: resized to the input's size (bilinear), then (x - 0.5) / 0.5.
    """
    said, features = [], []
    for start in range(0, len(pictures), batch):
        resized = [
            np.asarray(Image.fromarray(one).resize((classifier.size, classifier.size), Image.Resampling.BILINEAR))
            for one in pictures[start : start + batch]
        ]
        shown = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        answer = classifier.model(shown.to(classifier.model.device), output_hidden_states=True)
        said.append(answer.logits.double().cpu().numpy())
        last = answer.hidden_states[-1]
        features.append((last[:, 0] if last.dim() == 3 else last.mean(dim=(2, 3))).double().cpu().numpy())
    return np.concatenate(said), np.concatenate(features)
