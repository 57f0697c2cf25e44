"""Whether a base's weights are those that its configurations describe, tensor by tensor, before it is loaded.

Loaders draw a tensor that a file lacks at random, say nothing, and draw another one the next time; and one that the
network does not know is dropped. Both are found here from the files' headers, and values that are no numbers by
reading the tensors one at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers
from diffusers.loaders import single_file_utils
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from safetensors import SafetensorError, safe_open

from fade.errors import BaseModelError, listing
from fade.models.registry import family
from fade.models.source import BaseSource
from fade.models.supported import read_config
from fade.models.weights import read_header

Shapes = Mapping[str, tuple[int, ...]]
# How the attention of an autoencoder was named before diffusers 0.12; it is still read.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_NAME = re.compile(rf"(\.attentions\.\d+)\.({'|'.join(_OLD_ATTENTION)})\.(?=weight$|bias$)")
# Where a model that reads text and pictures keeps its language model has changed twice; transformers reads all three.
_LANGUAGE = re.compile(r"^(model\.language_model\.|language_model\.model\.|language_model\.|model\.)")
# A whole CLIP is a text encoder too; positions are counted, not learnt;
# and a whole language model, of which the states alone are asked.
_SURPLUS = ("position_ids", "logit_scale", "text_projection.weight", "lm_head.weight")
_PICTURE_HALF = ("vision_model.", "visual_projection.")
_UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, IndexError, NotImplementedError, RuntimeError)
_SINGLE_FILE_PREFIXES = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text_encoder_2": ("conditioner.embedders.1.",),
}


def check_weights(found: BaseSource) -> None:
    """Compare the weights' names and shapes with the configurations both ways, and look for what is no number.

    Raises:
        BaseModelError: a tensor is lacking, not known, of another shape, not a number or infinite; names tensor and
            file. A part's configuration describes no network.
    """
    faults = [fault for part in found.held for fault in _misfits(found, part)]
    if not faults:
        faults = [fault for file in found.weights for fault in _not_numbers(found, file)]
    if faults:
        raise BaseModelError(
            f"The base in {found.path} is damaged, or its files belong to different models: {'; '.join(faults)}. Fetch "
            "it again, or give each file the configuration it was saved with."
        )


def _misfits(found: BaseSource, part: str) -> Iterator[str]:
    """What of a part's tensors does not fit its configuration."""
    folder = found.config / part
    wanted, twins = _described(family(found.pipeline).parts[part], folder)
    files = next((one.files for one in found.parts if one.part == part), (found.path,))
    where = listing(map(found.called, files), 2) if found.parts else found.path.name
    try:
        if files == (found.beside,):
            held = _held_alone(files[0], family(found.pipeline).parts[part], folder, wanted)
        else:
            held = _held_in_parts(files) if found.parts else _held_in_one(found.path, folder, part)
    except _UNREADABLE as error:
        if isinstance(error, BaseModelError):
            raise
        yield f"{where} does not hold the {part} that {part}/config.json describes ({error})"
        return
    if missing := [name for name in wanted if held.keys().isdisjoint(twins.get(name, {name}))]:
        yield f"{where} lacks {listing(missing, 3)}"
    if unknown := [name for name in held if name not in wanted and not _is_surplus(part, name)]:
        yield f"{where} holds {listing(unknown, 3)}, which {part}/config.json does not describe"
    other = [
        f"{name} {held[name]} (expected {shape})" for name, shape in wanted.items() if held.get(name, shape) != shape
    ]
    if other:
        yield f"{where} holds tensors of other shapes than {part}/config.json describes: {listing(other, 3)}"


def _is_surplus(part: str, name: str) -> bool:
    if not part.startswith("text_encoder"):
        return name in ("v_pred", "ztsnr")
    return name.endswith(_SURPLUS) or name.startswith(_PICTURE_HALF)


def described(network: str, folder: Path) -> Shapes:
    """Names and shapes of the tensors of the network that ``folder/config.json`` describes.

    Args:
        network: its class in diffusers or transformers.

    Raises:
        BaseModelError: the configuration describes no such network.
    """
    return _described(network, folder)[0]


def _described(network: str, folder: Path) -> tuple[Shapes, Mapping[str, frozenset[str]]]:
    config = read_config(folder / "config.json")
    try:
        return _shapes_and_twins(network, json.dumps(config, sort_keys=True))
    except _UNREADABLE as error:
        raise BaseModelError(f"{folder}/config.json describes no {network}: {error}. Restore it.") from error


@lru_cache(maxsize=16)
def _shapes_and_twins(network: str, config: str) -> tuple[Shapes, Mapping[str, frozenset[str]]]:
    """Shapes by name; and of tensors that are one under several names, all of these by each: files hold one of them,
    or all."""
    model = empty_network(network, json.loads(config))
    shapes, named = {}, dict[int, set[str]]()
    for key, value in model.state_dict(keep_vars=True).items():
        name = _name(key)
        shapes[name] = tuple(value.shape)
        named.setdefault(id(value), set()).add(name)
    twins = {name: frozenset(names) for names in named.values() if len(names) > 1 for name in names}
    return shapes, twins


def empty_network(network: str, config: dict[str, Any]) -> Any:
    """A network whose tensors hold nothing."""
    with torch.device("meta"):  # nothing is allocated, and nothing drawn
        if not hasattr(transformers, network):
            return getattr(diffusers, network).from_config(config)
        kind: Any = getattr(transformers, network)
        # Of a whole CLIP the half that reads.
        text = config.get("text_config") if kind.config_class.base_config_key == "text_config" else None
        return kind(kind.config_class.from_dict(text or config))


def _name(key: str) -> str:
    """A tensor's name as files of all versions of both libraries have it."""
    key = _OLD_NAME.sub(lambda match: f"{match[1]}.{_OLD_ATTENTION[match[2]]}.", key.removeprefix("text_model."))
    return _LANGUAGE.sub("", key)


def _held_in_parts(files: tuple[Path, ...]) -> Shapes:
    return {_name(key): shape for file in files for key, shape in read_header(file).shapes.items()}


def _held_alone(path: Path, network: str, folder: Path, wanted: Shapes) -> Shapes:
    """The tensors of a transformer's own file, under the names and in the shapes that diffusers makes of them."""
    held = _held_in_parts((path,))
    if held.keys() == wanted.keys():  # diffusers converts all others, as here
        return held
    stored = {key: torch.empty(shape, device="meta") for key, shape in read_header(path).shapes.items()}
    convert = SINGLE_FILE_LOADABLE_CLASSES[network]["checkpoint_mapping_fn"]
    converted = convert(checkpoint=stored, config=read_config(folder / "config.json"))
    return {_name(key): tuple(value.shape) for key, value in converted.items()}


def _held_in_one(path: Path, folder: Path, part: str) -> Shapes:
    """The tensors of one part in a single file, under the names and in the shapes that diffusers makes of them."""
    stored: dict[str, Any] = {
        key: torch.empty(shape, device="meta")
        for key, shape in read_header(path).shapes.items()
        if key.startswith(_SINGLE_FILE_PREFIXES[part])
    }
    if part in ("unet", "vae"):
        convert = getattr(single_file_utils, f"convert_ldm_{part}_checkpoint")
        converted = convert(stored, read_config(folder / "config.json"))
    elif any(".transformer.text_model." in key for key in stored):
        converted = single_file_utils.convert_ldm_clip_checkpoint(stored)
    else:
        prefix = "cond_stage_model.model." if part == "text_encoder" else "conditioner.embedders.1.model."
        text = SimpleNamespace(config=transformers.CLIPTextConfig.from_dict(read_config(folder / "config.json")))
        converted = single_file_utils.convert_open_clip_checkpoint(text, stored, prefix=prefix)
    return {_name(key): tuple(value.shape) for key, value in converted.items()}


def _not_numbers(found: BaseSource, file: Path) -> Iterator[str]:
    """The tensors of a file that hold NaN or infinite values."""
    name = found.called(file)
    used = tuple(start for part in found.held for start in _SINGLE_FILE_PREFIXES.get(part, ()))
    try:
        with safe_open(file, framework="pt") as stored:
            keys = [key for key in stored.keys() if found.parts or key.startswith(used)]  # noqa: SIM118
            bad = [key for key in keys if not _finite(stored.get_tensor(key))]
    except (SafetensorError, OSError) as error:
        raise BaseModelError(f"The weights in {file} do not load: {error}. Fetch it again.") from None
    if bad:
        yield f"{name} holds NaN or infinite values in {listing(bad, 3)}"


def _finite(tensor: torch.Tensor) -> bool:
    if tensor.is_floating_point() and tensor.element_size() == 1:
        tensor = tensor.float()  # nothing else is computed in 8 bits
    return bool(torch.isfinite(tensor).all())
