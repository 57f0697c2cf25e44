"""Where a base model comes from, and what is known of it before it is loaded.

folder      diffusers layout: ``model_index.json`` and a folder for each part
file        all weights in one ``.safetensors`` file, as Stable Diffusion was first published; the folder of
            the same name without the ending, beside it, describes its parts
hub name    ``owner/name`` or ``owner/name@revision``: the snapshot in the local Hugging Face cache, or a
            download; then a folder

Only configurations and file headers are read here, so that what cannot work is said at once.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fade.errors import BaseModelError, ConfigError, listing
from fade.files import read_json, sha256_file

PARTS = {
    "StableDiffusionPipeline": ("unet", "vae", "text_encoder"),
    "StableDiffusionXLPipeline": ("unet", "vae", "text_encoder", "text_encoder_2"),
}
"""The pipelines that are supported, and the parts of each that hold weights."""
PREDICTION_TYPES = ("epsilon", "v_prediction")
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")
_SINGLE_FILE_UNET = "model.diffusion_model.input_blocks.0.0.weight"
_SINGLE_FILE_TEXT = {
    "conditioner.embedders.1.": "StableDiffusionXLPipeline",
    "cond_stage_model.": "StableDiffusionPipeline",
}
_PICKLES = (".ckpt", ".bin", ".pt", ".pth")


@dataclass(frozen=True, slots=True)
class BaseSource:
    """A base model that can be loaded.

    Attributes:
        path: its folder, or its single file.
        pipeline: the name of its diffusers pipeline, a key of ``PARTS``.
        weights: the files that hold its weights.
        config: the folder that describes its parts; None for a single file without one beside it.
        picture_size: height and width it draws, in pixels; None where no configuration says so.
    """

    path: Path
    pipeline: str
    weights: tuple[Path, ...]
    config: Path | None
    picture_size: int | None


def is_hub_name(source: str | Path) -> bool:
    """Whether this names a model on the Hugging Face hub rather than a place on this machine."""
    path = Path(source)
    return not path.exists() and path.suffix != ".safetensors" and _HUB_NAME.fullmatch(str(source)) is not None


def find_base(source: str | Path) -> BaseSource:
    """Find a base and check all that can be checked without loading it.

    Raises:
        BaseModelError: nothing is there, its weights are incomplete or no safetensors, or its kind is not
            supported; names what was found and what is supported.
    """
    path = Path(source)
    if path.suffix in _PICKLES:
        raise BaseModelError(
            f"{path} is a pickle file, which can run code when it is read: only safetensors are loaded. "
            "Convert it, or take the model's .safetensors file."
        )
    if path.is_file():
        return _single_file(path)
    if from_hub := is_hub_name(source):
        path = _snapshot(str(source))
    if not (path / "model_index.json").is_file():
        raise BaseModelError(
            f"No base model in {path}: expected a diffusers folder with model_index.json. "
            "Give the folder of a StableDiffusionPipeline, or build the built-in base with `dvc repro base`."
        )
    pipeline = _supported_pipeline(path)
    files = sorted(file for part in PARTS[pipeline] for file in (path / part).glob("*.safetensors"))
    if from_hub:
        # Variants (fp16, non_ema) lie in the cache or not, by what was loaded before: they must not count.
        files = [file for file in files if "." not in file.stem]
    if lacking := [part for part in PARTS[pipeline] if part not in {file.parent.name for file in files}]:
        pickles = [file.name for part in lacking for file in (path / part).glob("*") if file.suffix in _PICKLES]
        raise BaseModelError(
            f"The base model in {path} lacks safetensors weights for {', '.join(lacking)}."
            + (f" {listing(pickles)} can run code and is not read." if pickles else "")
            + " Save the pipeline with `safe_serialization=True`, or fetch the missing files."
        )
    return BaseSource(path, pipeline, tuple(files), path, _checked_config(path, path))


def base_sha256(source: str | Path) -> str:
    """The identity of a base: of a single file its SHA-256, else one over the names and hashes of its weight files.

    Raises:
        BaseModelError: as ``find_base``.
    """
    return identity(find_base(source))


def identity(found: BaseSource) -> str:
    """The same of a base that was found."""
    if found.path.is_file():
        return sha256_file(found.path)
    digest = hashlib.sha256()
    for path in found.weights:
        digest.update(f"{path.parent.name}/{path.name}:{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def picture_size(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
    """Height and width in pixels of what a UNet and an autoencoder of these configurations draw."""
    return int(unet["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)


def _supported_pipeline(folder: Path) -> str:
    name = _read(folder / "model_index.json").get("_class_name")
    if name not in PARTS:
        raise BaseModelError(f"The base in {folder} is a {name}, which is not supported yet; {_supported()}.")
    return str(name)


def _supported() -> str:
    return (
        f"supported are {' and '.join(PARTS)} (Stable Diffusion 1.x, 2.x and XL) that make a picture of a text alone, "
        f"with {' or '.join(PREDICTION_TYPES)}"
    )


def _checked_config(folder: Path, named: Path) -> int:
    """Check what the parts' configurations say; give the size of the pictures.

    Args:
        named: the base as error messages name it.
    """
    unet, vae = _read(folder / "unet/config.json"), _read(folder / "vae/config.json")
    predicts = _read(folder / "scheduler/scheduler_config.json").get("prediction_type", "epsilon")
    faults = []
    if predicts not in PREDICTION_TYPES:
        faults.append(f"predicts {predicts!r}")
    if (takes := unet.get("in_channels", 4)) != (latent := vae.get("latent_channels", 4)):
        faults.append(f"has a UNet that takes {takes} channels (inpainting or depth) for latents of {latent}")
    if unet.get("time_cond_proj_dim") is not None:
        faults.append("has a UNet that is told the guidance (LCM)")
    if vae.get("latents_mean") is not None:
        faults.append("has an autoencoder that shifts its latents")
    if not isinstance(unet.get("sample_size"), int) or not isinstance(vae.get("block_out_channels"), list):
        faults.append("does not say the size of its pictures (sample_size, block_out_channels)")
    if faults:
        raise BaseModelError(f"The base in {named} {' and '.join(faults)}, which is not supported yet; {_supported()}.")
    return picture_size(unet, vae)


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except ConfigError as error:
        raise BaseModelError(f"The base model in {path.parent} cannot be read: {error} Restore the folder.") from None


def _single_file(path: Path) -> BaseSource:
    if path.suffix != ".safetensors":
        raise BaseModelError(f"{path} is no base model: expected a diffusers folder or a .safetensors file.")
    try:
        with safe_open(path, framework="pt") as stored:
            keys = list(stored.keys())
            channels = stored.get_slice(_SINGLE_FILE_UNET).get_shape()[1] if _SINGLE_FILE_UNET in keys else None
    except SafetensorError as error:
        raise BaseModelError(f"{path} is not a safetensors file: {error}. Fetch it again.") from None
    pipelines = [name for start, name in _SINGLE_FILE_TEXT.items() if any(key.startswith(start) for key in keys)]
    if channels is None or not pipelines:
        raise BaseModelError(
            f"{path} is not a whole Stable Diffusion in one file: its tensors are {listing(keys, 3)}; {_supported()}."
        )
    if channels != 4:
        raise BaseModelError(
            f"{path} has a UNet that takes {channels} channels (inpainting or depth) for latents of 4; {_supported()}."
        )
    config = path.with_suffix("")
    if not (config / "model_index.json").is_file():
        return BaseSource(path, pipelines[0], (path,), None, None)
    if (described := _supported_pipeline(config)) != pipelines[0]:
        raise BaseModelError(
            f"{config} describes a {described}, but {path.name} holds a {pipelines[0]}. "
            "Give the file the folder of its own kind."
        )
    return BaseSource(path, pipelines[0], (path,), config, _checked_config(config, path))


def _snapshot(name: str) -> Path:
    """The folder of a hub name: from the local cache if the machine is offline, else brought up to date."""
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=["model_index.json", "*/*.json", "*/*.txt", "*/*.safetensors"],
                # The same weights again: `<name>.<variant>.safetensors`.
                ignore_patterns=["*/*.*.safetensors"],
            )
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BaseModelError(
            f"No base model {name!r}: no such folder or file here, and the hub did not give it ({reason}). Check the "
            "name; offline, fetch it first with `hf download` where there is a network; where the model asks for it, "
            "accept its licence and log in with `hf auth login`."
        ) from error
