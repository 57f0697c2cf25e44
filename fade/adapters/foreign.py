"""What other tools' adapter files hold: their names of tensors, their scalings, and what this library cannot take.

diffusers   ``<component>.<module>.lora_A.weight``, or as its training scripts save them ``.lora.down.weight``, or older
            ``.processor.to_q_lora.down.weight``; scaling in the file's metadata, 1 without
peft        ``base_model.model.<module>.lora_A.weight``; scaling in the ``adapter_config.json`` beside it
kohya       ``lora_unet_<module>.lora_down.weight`` with ``.alpha``; for SDXL and FLUX.1 the modules have the names of
            the original release (``input_blocks_4_1_...``, ``double_blocks_0_img_attn_qkv``)
difference  ``<component>.<module>.weight``

Names are turned back by diffusers' own converters. What is no LoRA and no difference of the denoiser is refused by
its name: read by half it would only erase less, and say nothing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_conversion_utils import _convert_unet_lora_key, _maybe_map_sgm_blocks_to_diffusers
from diffusers.utils import convert_unet_state_dict_to_peft
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import Tensor

from fade.errors import AdapterFormatError, listing, nearest

LORA_A, LORA_B, ALPHA, WEIGHT = ".lora_A.weight", ".lora_B.weight", ".alpha", ".weight"
_KOHYA = {".lora_down.weight": LORA_A, ".lora_up.weight": LORA_B, ALPHA: ALPHA}
_SGM = ("input_blocks", "middle_block", "output_blocks")
_MERGE = "Have the tool that made it merge it into the base, and import the difference (<component>.<module>.weight)."
_ALONE = (
    "The denoiser's part alone would erase less than the whole: train it without (kohya: --network_train_unet_only)."
)
_OTHER = "It is for another family of models."
# Whose key it is, what it is, and what to do.
_REFUSED = (
    (r"dora_scale|lora_magnitude_vector", "a DoRA", _MERGE),
    (r"\.hada_[wt]", "a LoHa", _MERGE),
    (r"\.lokr_[wt]", "a LoKr", _MERGE),
    (r"\.b?oft_|\.oft_blocks|\.oft_diag", "an OFT", _MERGE),
    (r"\.on_input$|\.ia3_", "an (IA)^3", _MERGE),
    (r"\.lora_mid\.weight$", "a LoCon in Tucker's form", _MERGE),
    (r"\.(diff|diff_b|w_norm|b_norm)$", "a LyCORIS of whole layers", _MERGE),
    (r"\.lora_B\.bias$|\.lora_up\.bias$|\.lora\.up\.bias$|\.bias$", "an adapter with biases", _MERGE),
    (r"^text_encoder|^text_model\.|^lora_te\d?_|^lora_prior_te_", "an adapter of a text encoder too", _ALONE),
    (r"^emb_params$|^string_to_param|^bundle_emb\.|^<", "an embedding (textual inversion)", _ALONE),
)
# By the name of the denoiser that it is not for.
_OF_ANOTHER = {
    "unet": (
        r"^transformer\.|^lora_transformer_|^lora_unet_(double|single|joint)_blocks_",
        "an adapter of a transformer",
    ),
    "transformer": (r"^unet\.|^lora_unet_(down|up|mid|input|output|middle)_", "an adapter of a U-Net"),
}
# How stock peft starts a LoRA without touching the base; the others (pissa, olora, ...) change the base's weights.
_KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
_WHOLE = 0.5
"""A difference that is nearer to the base's weight than this, in parts of the weight, is the weight itself."""


def refuse_others(tensors: Mapping[str, Tensor], component: str, source: Path) -> None:
    """Raise AdapterFormatError, which names the kind, for what is no LoRA and no difference of the denoiser.

    Args:
        component: the denoiser's name in its pipeline.
    """
    for pattern, what, do in (*_REFUSED, (*_OF_ANOTHER[component], _OTHER)):
        if keys := [key for key in tensors if re.search(pattern, key)]:
            raise AdapterFormatError(
                f"{source} is {what} ({listing(keys, 3)}). Only LoRAs and differences of the denoiser's weights are "
                f"taken. {do}"
            )
    numbers = {key: tensor for key, tensor in tensors.items() if not key.endswith(ALPHA)}
    if keys := [key for key, tensor in numbers.items() if str(tensor.dtype).startswith("torch.float8")]:
        raise AdapterFormatError(
            f"{source} is held in fp8 ({numbers[keys[0]].dtype}: {listing(keys, 3)}), which rounds an adapter away by "
            "parts, and some tools keep a scale of it elsewhere. Save it in float16 or float32."
        )
    if keys := [key for key, tensor in numbers.items() if not tensor.is_floating_point()]:
        raise AdapterFormatError(
            f"{source} is quantised ({numbers[keys[0]].dtype}: {listing(keys, 3)}). Save it in float16 or float32."
        )
    if keys := [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise AdapterFormatError(f"{source} holds values that are not finite in {listing(keys)}.")


def named(
    tensors: Mapping[str, Tensor], layout: str, modules: Mapping[str, Any], *, component: str, config: Any, source: Path
) -> dict[str, dict[str, Tensor]]:
    """Module to its parts (``LORA_A``, ``LORA_B``, ``ALPHA``; ``WEIGHT`` of a difference), every tensor used.

    Args:
        layout: ``diffusers``, ``peft``, ``kohya`` or ``difference``.
        modules: the denoiser's, by name.
        component: the denoiser's name in its pipeline.
        config: the denoiser's configuration.

    Raises:
        AdapterFormatError: a tensor finds no module, or two find the same place.
    """
    stems = {module.replace(".", "_"): module for module in modules}
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        place = _kohya(key, stems, config) if layout == "kohya" else _dotted(key, layout, component)
        if place is None or place[0] not in modules:
            raise AdapterFormatError(
                f"{source}: {key} finds no use. {nearest(key, _expected(layout, modules, component))}"
            )
        module, part = place
        if part in found.setdefault(module, {}):
            raise AdapterFormatError(f"{source}: {key} is a second {part.strip('.')} of {module}. Export it anew.")
        found[module][part] = tensor
    return found


def from_kohya(pipeline: Any, tensors: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """kohya's tensors of a transformer under diffusers' names, by the stock pipeline's own converter; alpha is in them.

    Raises:
        AdapterFormatError: the converter knows none of them, or not all.
    """
    try:  # the converter refuses a file of which it cannot use all
        found: dict[str, Tensor] = pipeline.lora_state_dict(dict(tensors))
    except (ValueError, KeyError, AssertionError, RuntimeError) as error:
        raise AdapterFormatError(
            f"{source} cannot be read as kohya's LoRA of a {pipeline.__name__}: {error}."
        ) from error
    if lost := sorted(key for key in found if key in tensors):
        raise AdapterFormatError(
            f"{source}: {listing(lost, 3)} find no use: a {pipeline.__name__} reads no such LoRA of kohya's. Have it "
            "converted to diffusers' names by the tool that made it."
        )
    return found


def _dotted(key: str, layout: str, component: str) -> tuple[str, str] | None:
    """Module and part of a key with dots."""
    prefix = "base_model.model." if layout == "peft" else f"{component}."
    name = key.removeprefix(prefix)
    if layout == "difference":
        return (name.removesuffix(WEIGHT), WEIGHT) if name.endswith(WEIGHT) and name != key else None
    name = next(iter(convert_unet_state_dict_to_peft({name: None})))
    return next(((name.removesuffix(one), one) for one in (LORA_A, LORA_B, ALPHA) if name.endswith(one)), None)


def _kohya(key: str, stems: Mapping[str, str], config: Any) -> tuple[str, str] | None:
    """The same of kohya's key, whose dots are lost."""
    ending = next((one for one in _KOHYA if key.endswith(one)), "")
    if not ending or not key.startswith("lora_unet_"):
        return None
    name = key.removesuffix(ending)
    if name.removeprefix("lora_unet_") not in stems:
        if any(one in name for one in _SGM):
            try:  # one by one: of several at once it takes block 1 for 10 and 11 too
                name = next(iter(_maybe_map_sgm_blocks_to_diffusers({name: None}, config)))
            except (ValueError, IndexError):
                return None
        if name.removeprefix("lora_unet_") not in stems:
            name = _convert_unet_lora_key(name).replace(".processor.", ".").replace(".", "_")
    module = stems.get(name.removeprefix("lora_unet_"))
    return None if module is None else (module, _KOHYA[ending])


def _expected(layout: str, modules: Mapping[str, Any], component: str) -> list[str]:
    if layout == "kohya":
        return [f"lora_unet_{module.replace('.', '_')}{ending}" for module in modules for ending in _KOHYA]
    if layout == "difference":
        return [f"{component}.{module}{WEIGHT}" for module in modules]
    prefix = "base_model.model." if layout == "peft" else f"{component}."
    return [f"{prefix}{module}{part}" for module in modules for part in (LORA_A, LORA_B)]


def refuse_whole_weights(found: Mapping[str, Mapping[str, Tensor]], modules: Mapping[str, Any], source: Path) -> None:
    """Raise AdapterFormatError if a difference is the weights themselves, a bit changed: added, they would double."""
    whole = []
    for module, parts in found.items():
        weight = modules[module].weight.detach().float().cpu()
        given = parts[WEIGHT].float()
        if given.shape == weight.shape and weight.numel() > 1 and weight.any():
            nearness = torch.linalg.vector_norm(given - weight) / torch.linalg.vector_norm(weight)
            whole += [module] if nearness < _WHOLE else []
    if whole:
        raise AdapterFormatError(
            f"{source} holds whole weights, no difference: {listing(whole)} are the base's own, changed a little. "
            "Subtract the base's weights, or load the model as a base."
        )


def read_metadata(path: Path, component: str) -> dict[str, Any]:
    """The LoRA configuration in a diffusers file; empty where it has none, which means a scaling of 1.

    Raises:
        AdapterFormatError: it is no LoRA configuration.
    """
    with safe_open(path, framework="pt") as stored:
        text = (stored.metadata() or {}).get("lora_adapter_metadata", "{}")
    try:
        content = json.loads(text)
        if content.get("r") is not None:  # of a denoiser saved by itself
            return dict(content)
        start = f"{component}."
        return {k.removeprefix(start): value for k, value in content.items() if k.startswith(start)}
    except (ValueError, AttributeError, RecursionError) as error:
        raise AdapterFormatError(
            f"The metadata of {path} is no LoRA configuration: {error}. Save the adapter anew with its own tool."
        ) from None


def scaling_of(alpha: Tensor | None, rank: int, module: str, config: Mapping[str, Any]) -> float:
    """alpha / rank: kohya's own alpha, or as peft reads its configuration; 1 where there is neither.

    Raises:
        AdapterFormatError: alpha is no finite number, or the configuration is of no plain LoRA or odd.
    """
    if alpha is not None:
        if alpha.numel() != 1 or not torch.isfinite(alpha).all():
            raise AdapterFormatError(f"{module}: .alpha must be one finite number, got shape {tuple(alpha.shape)}.")
        return float(alpha) / rank
    if not config:
        return 1.0
    if config.get("use_dora") or config.get("init_lora_weights") not in _KEEPS_BASE:
        raise AdapterFormatError(f"{module} is no plain LoRA: DoRA and starts that change the base are not supported.")
    stated = _stated(config, "r", "rank_pattern", module)
    if stated != rank:
        raise AdapterFormatError(f"{module} has rank {rank}; its configuration says {stated:g}.")
    scale = math.sqrt(rank) if config.get("use_rslora") else rank
    return _stated(config, "lora_alpha", "alpha_pattern", module) / scale


def _stated(config: Mapping[str, Any], default: str, name: str, module: str) -> float:
    """What a configuration says of a module, by peft's rules."""
    pattern = config.get(name) or {}
    if not isinstance(pattern, dict):
        raise AdapterFormatError(
            f"{name} of the adapter's configuration is a {type(pattern).__name__}; expected names and numbers."
        )
    try:
        value = pattern.get(get_pattern_key(list(pattern), module), config.get(default, 8))
    except re.error as error:
        raise AdapterFormatError(f"{name} of the adapter's configuration is no pattern: {error}.") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise AdapterFormatError(
            f"The adapter's configuration says {value!r} for {default} of {module}; expected a finite number."
        )
    return float(value)
