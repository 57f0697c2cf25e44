"""Which bases are supported, and in which words another one is refused: read from configurations alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fade.errors import BaseModelError, ConfigError, listing
from fade.files import read_json
from fade.models.registry import FAMILIES, family

SCALED = ("scaled_fp8", ".scale_weight", ".weight_scale", ".scale_input")
"""Endings of tensors that scale weights of 8 bits."""
_REFINER = "is the refiner of Stable Diffusion XL, which goes over the pictures of another model"


def supported() -> str:
    """The end of a message that refuses."""
    titles = [f"{name} ({family(name).title})" for name in FAMILIES]
    return f"supported are {', '.join(titles[:-1])} and {titles[-1]} that make a picture of a text alone"


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
    """The name of the pipeline that a folder holds, a key of ``FAMILIES``.

    Raises:
        BaseModelError: it holds no pipeline, or one that is not supported; says what it holds instead.
    """
    if not (folder / "model_index.json").is_file():
        raise BaseModelError(
            f"No base model in {folder}: expected a diffusers folder with model_index.json. {_instead(folder)}"
        )
    index = read_config(folder / "model_index.json")
    name = str(index.get("_class_name"))
    if name in FAMILIES and not _absent(index, "text_encoder"):
        return name
    if name.startswith("StableDiffusionXL") and _absent(index, "text_encoder"):
        raise BaseModelError(f"The base in {folder} {_REFINER}. Give that model; {supported()}.")
    raise BaseModelError(f"The base in {folder} is a {name}, which is not supported yet; {supported()}.")


def reads_alone(pipeline: str) -> bool:
    """Whether diffusers reads the denoiser of such a pipeline from a file of its own (``from_single_file``)."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    kind = family(pipeline)
    return kind.parts[kind.denoiser_type.component] in SINGLE_FILE_LOADABLE_CLASSES


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
            f"pipeline of its kind; {supported()}."
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


def parts(folder: Path, pipeline: str) -> tuple[str, ...]:
    """The parts of a base that hold weights; of those that its family may do without, the ones it has."""
    kind, index = family(pipeline), read_config(folder / "model_index.json")
    return tuple(part for part in kind.parts if part not in kind.optional or not _absent(index, part))


def tokenizers(folder: Path, pipeline: str) -> dict[str, str]:
    """The parts of a base that read prompts, each with the text encoder that it reads for."""
    here = parts(folder, pipeline)
    return {part: encoder for part, encoder in family(pipeline).tokenizers.items() if encoder in here}


def lacking(folder: Path, pipeline: str) -> list[str]:
    """Parts and configurations that a folder should hold and does not, each as ``lacks ...``; weights are not asked."""
    index, found = read_config(folder / "model_index.json"), []
    wanted = dict.fromkeys(parts(folder, pipeline), "config.json") | {"scheduler": "scheduler_config.json"}
    for part, file in wanted.items():
        if _absent(index, part):
            found.append(f"lacks {part} (model_index.json names none)")
        elif not (folder / part / file).is_file():
            found.append(f"lacks {part}/{file}")
    for part in tokenizers(folder, pipeline):
        at = folder / part
        if not (at / "tokenizer.json").is_file() and not (
            (at / "vocab.json").is_file() and (at / "merges.txt").is_file()
        ):
            found.append(f"lacks {part}/tokenizer.json, or vocab.json and merges.txt")
            if pieces := [name for name in ("spiece.model", "tokenizer.model") if (at / name).is_file()]:
                found[-1] += f" ({pieces[0]} alone is not read: save it once with transformers where sentencepiece is)"
    return found


def unsupported(folder: Path, pipeline: str) -> list[str]:
    """What in the configurations of a whole folder is not supported, each as a phrase that follows ``the base``."""
    index, kind, here = read_config(folder / "model_index.json"), family(pipeline), parts(folder, pipeline)
    found = []
    for part in here:
        given = (index.get(part) or ("", None))[1]
        if given != kind.parts[part] and given not in kind.renamed.get(part, ()):
            found.append(f"has a {given} as its {part} (expected {kind.parts[part]})")
    for part, encoder in tokenizers(folder, pipeline).items():
        named = kind.parts[encoder].partition("Text")[0].partition("Encoder")[0] + "Tokenizer"
        expected = kind.tokenizer_classes.get(part, (named,))
        if (given := str((index.get(part) or ("", None))[1])).removesuffix("Fast") not in expected:
            found.append(f"has a {given} as its {part} (expected {' or '.join(expected)})")
    for part in here:
        if "quantization_config" in read_config(folder / part / "config.json"):
            found.append(f"has a quantised {part}")
        if (folder / part / "adapter_config.json").is_file():
            found.append(f"has an adapter of its own in {part} (adapter_config.json)")
    return found + kind.unsupported(configurations(folder), str((index.get("scheduler") or ("", None))[1]))


def configurations(folder: Path) -> Callable[[str], dict[str, Any]]:
    """The configuration of each part of a folder, read when it is asked for."""
    return lambda part: read_config(folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json"))


def side(sample_size: Any) -> int | None:
    """The side of square latents as a configuration says it: a number, or a pair of equal ones; else None."""
    sides = set(sample_size) if isinstance(sample_size, list | tuple) else {sample_size}
    only = next(iter(sides)) if len(sides) == 1 else None
    return only if isinstance(only, int) else None


def autoencoder_factor(vae: Mapping[str, Any]) -> int:
    """Pixels of a picture's side to one of its latents."""
    levels = vae.get("block_out_channels") or vae.get("encoder_block_out_channels") or ()
    return int(2 ** (len(levels) - 1))


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
    if said in ("epsilon", "v_prediction") and said != predicts:
        found.append(
            f"its weights' file is marked as {said}, and {where} says {predicts}: correct prediction_type there"
        )
    if "ztsnr" in marks and not config.get("rescale_betas_zero_snr"):
        found.append(
            f"its weights' file is marked for a schedule that ends in noise alone (ztsnr), and {where} does not say "
            "so: set rescale_betas_zero_snr there"
        )
    return found
