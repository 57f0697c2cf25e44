"""Which bases are supported, and in which words another one is refused: read from configurations alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fade.errors import BaseModelError, ConfigError, listing
from fade.files import read_json

PARTS = {
    "StableDiffusionPipeline": ("unet", "vae", "text_encoder"),
    "StableDiffusionXLPipeline": ("unet", "vae", "text_encoder", "text_encoder_2"),
}
"""The pipelines that are supported, and the parts of each that hold weights."""
NETWORKS = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}
"""The class of each part that holds weights."""
PREDICTION_TYPES = ("epsilon", "v_prediction")
SCHEDULERS = (
    *(
        "DDIM",
        "DDPM",
        "PNDM",
        "LMSDiscrete",
        "EulerDiscrete",
        "EulerAncestralDiscrete",
        "HeunDiscrete",
        "DEISMultistep",
    ),
    *("KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverMultistep", "DPMSolverSinglestep", "DPMSolverSDE"),
    *("UniPCMultistep", "SASolver", "DDIMInverse", "DPMSolverMultistepInverse"),
)
"""Solvers, without the ending ``Scheduler``, that are made from one schedule of noise, so that any of them draws."""
SCALED = ("scaled_fp8", ".scale_weight", ".weight_scale", ".scale_input")
"""Endings of tensors that scale weights of 8 bits."""
_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
_REFINER = "is the refiner of Stable Diffusion XL, which goes over the pictures of another model"


def supported() -> str:
    """The end of a message that refuses."""
    return (
        f"supported are {' and '.join(PARTS)} (Stable Diffusion 1.x, 2.x and XL) that make a picture of a text alone, "
        f"with {' or '.join(PREDICTION_TYPES)}"
    )


def read_config(path: Path) -> dict[str, Any]:
    """A configuration of a base.

    Raises:
        BaseModelError: it is missing or no JSON object.
    """
    try:
        return read_json(path)
    except ConfigError as error:
        raise BaseModelError(f"The base model in {path.parent} cannot be read: {error} Restore the folder.") from None


def pipeline_of(folder: Path) -> str:
    """The name of the pipeline that a folder holds, a key of ``PARTS``.

    Raises:
        BaseModelError: it holds no pipeline, or one that is not supported; says what it holds instead.
    """
    if not (folder / "model_index.json").is_file():
        raise BaseModelError(
            f"No base model in {folder}: expected a diffusers folder with model_index.json. {_instead(folder)}"
        )
    index = read_config(folder / "model_index.json")
    name = str(index.get("_class_name"))
    if name in PARTS and not _absent(index, "text_encoder"):
        return name
    if name.startswith("StableDiffusionXL") and _absent(index, "text_encoder"):
        raise BaseModelError(f"The base in {folder} {_REFINER}. Give that model; {supported()}.")
    raise BaseModelError(f"The base in {folder} is a {name}, which is not supported yet; {supported()}.")


def refiner(path: Path) -> BaseModelError:
    """What to raise of a single file that holds the refiner."""
    return BaseModelError(f"{path} {_REFINER}. Give that model; {supported()}.")


def _absent(index: Mapping[str, Any], part: str) -> bool:
    given = index.get(part)
    return not isinstance(given, list) or len(given) != 2 or given[1] is None


def _instead(folder: Path) -> str:
    """What a folder without model_index.json holds, and what to give."""
    if (folder / "modular_model_index.json").is_file():
        return (
            "It holds a modular pipeline, which names its parts in other places. Load it in diffusers and save it as a "
            "StableDiffusionPipeline or StableDiffusionXLPipeline."
        )
    if any((folder / name).is_file() for name in ("adapter_config.json", "pytorch_lora_weights.safetensors")):
        return "It holds an adapter (LoRA), which goes on a base: give the base it was made for, and `fade import` it."
    if (folder / "config.json").is_file():
        config = read_config(folder / "config.json")
        name = config.get("_class_name") or next(iter(config.get("architectures") or ()), "part of a model")
        return f"It holds a {name} alone, one part of a model. Give the folder of the whole pipeline, above it."
    if whole := sorted(path.name for path in folder.glob("*.safetensors")):
        return f"It holds {listing(whole)}: give the file itself, if it is a whole model."
    return "Give the folder of a StableDiffusionPipeline, or build the built-in base with `dvc repro base`."


def lacking(folder: Path, pipeline: str) -> list[str]:
    """Parts and configurations that a folder should hold and does not, each as ``lacks ...``; weights are not asked."""
    index, found = read_config(folder / "model_index.json"), []
    wanted = {part: "config.json" for part in PARTS[pipeline]} | {"scheduler": "scheduler_config.json"}
    for part, file in wanted.items():
        if _absent(index, part):
            found.append(f"lacks {part} (model_index.json names none)")
        elif not (folder / part / file).is_file():
            found.append(f"lacks {part}/{file}")
    for part in tokenizers(pipeline):
        at = folder / part
        if not (at / "tokenizer.json").is_file() and not (
            (at / "vocab.json").is_file() and (at / "merges.txt").is_file()
        ):
            found.append(f"lacks {part}/tokenizer.json, or vocab.json and merges.txt")
    return found


def tokenizers(pipeline: str) -> tuple[str, ...]:
    """The parts of a pipeline that read prompts, one for each text encoder."""
    return tuple(part.replace("text_encoder", "tokenizer") for part in PARTS[pipeline] if part.startswith("text_"))


def unsupported(folder: Path, pipeline: str) -> list[str]:
    """What in the configurations of a whole folder is not supported, each as a phrase that follows ``the base``."""
    index = read_config(folder / "model_index.json")
    found = []
    expected = {part: (NETWORKS[part],) for part in PARTS[pipeline]}
    for part, classes in (expected | dict.fromkeys(tokenizers(pipeline), _TOKENIZERS)).items():
        if (given := (index.get(part) or ("", None))[1]) not in classes:
            found.append(f"has a {given} as its {part} (expected {classes[0]})")
    for part in PARTS[pipeline]:
        if "quantization_config" in read_config(folder / part / "config.json"):
            found.append(f"has a quantised {part}")
        if (folder / part / "adapter_config.json").is_file():
            found.append(f"has an adapter of its own in {part} (adapter_config.json)")
    found += _of_networks(read_config(folder / "unet/config.json"), read_config(folder / "vae/config.json"))
    name = str((index.get("scheduler") or ("", None))[1])
    return found + _of_scheduler(name, read_config(folder / "scheduler/scheduler_config.json"))


def _of_networks(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> list[str]:
    found = []
    if (takes := unet.get("in_channels", 4)) != (latent := vae.get("latent_channels", 4)):
        found.append(f"has a UNet that takes {takes} channels (inpainting or depth) for latents of {latent}")
    if unet.get("time_cond_proj_dim") is not None:
        found.append("has a UNet that is told the guidance (LCM)")
    if unet.get("addition_embed_type") not in (None, "text_time"):
        found.append(f"has a UNet that is told {unet['addition_embed_type']!r} besides the text")
    if vae.get("latents_mean") is not None:
        found.append("has an autoencoder that shifts its latents")
    size = unet.get("sample_size")
    if isinstance(size, list) and len(set(size)) > 1:
        factor = 2 ** (len(vae.get("block_out_channels") or ()) - 1)
        high, wide = (int(side * factor) for side in size[:2])
        found.append(f"draws pictures that are not square ({high} x {wide}: sample_size {size})")
    elif side(size) is None or not isinstance(vae.get("block_out_channels"), list):
        found.append("does not say the size of its pictures (sample_size, block_out_channels)")
    return found


def _of_scheduler(name: str, config: Mapping[str, Any]) -> list[str]:
    predicts = str(config.get("prediction_type", "epsilon"))
    if name.startswith("Flow") or config.get("use_flow_sigmas") or predicts.startswith("flow"):
        return [f"is a flow model ({name}, which predicts {predicts!r})"]
    if name.startswith("EDM") or config.get("timestep_type") == "continuous":
        return [f"is trained on the noise levels of EDM ({name})"]
    if name in ("LCMScheduler", "TCDScheduler"):
        return [f"is drawn by an {name}, in a few steps as it was distilled to: other solvers do not draw it"]
    found = [f"predicts {predicts!r}"] if predicts not in PREDICTION_TYPES else []
    if name.removesuffix("Scheduler") not in SCHEDULERS:
        found.append(f"has a {name}, of whose noise schedule nothing is known")
    return found


def side(sample_size: Any) -> int | None:
    """The side of square latents as a configuration says it: a number, or a pair of equal ones; else None."""
    sides = set(sample_size) if isinstance(sample_size, list | tuple) else {sample_size}
    only = next(iter(sides)) if len(sides) == 1 else None
    return only if isinstance(only, int) else None


def picture_size(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
    """Height and width in pixels of what a UNet and an autoencoder of these configurations draw."""
    return int(side(unet["sample_size"]) or 0) * 2 ** (len(vae["block_out_channels"]) - 1)


def unsupported_marks(marks: Mapping[str, str]) -> list[str]:
    """What the marks in a denoiser's file say it is, where that is not supported.

    Args:
        marks: names of tensors that are no weights, and of metadata, to values (``fade.models.weights.marks``).
    """
    found = []
    if edm := sorted(name for name in marks if name.startswith("edm_")):
        found.append(f"is trained on the noise levels of EDM (its file holds {listing(edm)})")
    if scaled := sorted(name for name in marks if name.endswith(SCALED)):
        found.append(f"holds scaled 8-bit weights (its file holds {listing(scaled, 2)})")
    return found


def contradicted(marks: Mapping[str, str], config: Mapping[str, Any]) -> list[str]:
    """What the marks in a denoiser's file say and its scheduler's configuration denies, with what to do."""
    found, where = [], "scheduler/scheduler_config.json"
    predicts = config.get("prediction_type", "epsilon")
    said = "v" if "v_pred" in marks else marks.get("modelspec.prediction_type", predicts)
    said = "v_prediction" if said == "v" else said
    if said in PREDICTION_TYPES and said != predicts:
        found.append(
            f"its weights' file is marked as {said}, and {where} says {predicts}: correct prediction_type there"
        )
    if "ztsnr" in marks and not config.get("rescale_betas_zero_snr"):
        found.append(
            f"its weights' file is marked for a schedule that ends in noise alone (ztsnr), and {where} does not say "
            "so: set rescale_betas_zero_snr there"
        )
    return found
