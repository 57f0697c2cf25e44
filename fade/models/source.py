"""Where a base model comes from, and what is known of it before it is loaded.

folder      diffusers layout: ``model_index.json`` and a folder for each part
file        all weights in one ``.safetensors`` file, as Stable Diffusion was first published; the folder of
            the same name without the ending, beside it, describes its parts; without one, the published
            description of its kind from the hub. Or the weights of a transformer alone, as the models after it
            are published: that folder then holds the other parts
hub name    ``owner/name`` or ``owner/name@revision``: the snapshot in the local Hugging Face cache, or a
            download; then a folder

Only configurations and file headers are read here, so that what cannot work is said at once.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fade.errors import BaseModelError, listing
from fade.files import sha256_file
from fade.models import supported
from fade.models.registry import FAMILIES, family
from fade.models.supported import read_config, refiner, tokenizers
from fade.models.weights import PICKLES, Header, PartWeights, find_weights, marks, read_header

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")
_SINGLE_FILE_UNET = "model.diffusion_model.input_blocks.0.0.weight"
_SINGLE_FILE_TEXT = ("cond_stage_model.transformer.text_model.", "cond_stage_model.model.")
_SINGLE_FILE_XL_TEXT = ("conditioner.embedders.0.transformer.",)
_SINGLE_FILE_VAE = ("first_stage_model.", "vae.")
_CONFIGURATIONS = (".json", ".txt", ".model", ".jinja")


@dataclass(frozen=True, slots=True)
class BaseSource:
    """A base model that can be loaded.

    Attributes:
        path: its folder, or its single file.
        pipeline: the name of its diffusers pipeline, a key of ``FAMILIES``.
        parts: where the weights of each part are; empty for a single file.
        config: the folder that describes its parts; ``path`` itself if that is a folder.
        picture_size: height and width it draws, in pixels.
        beside: the file of the denoiser's weights, where it lies beside the folder that is ``path``; its tensors may
            have the names of the original release.
    """

    path: Path
    pipeline: str
    parts: tuple[PartWeights, ...]
    config: Path
    picture_size: int
    beside: Path | None = None

    @property
    def held(self) -> tuple[str, ...]:
        """The parts that hold weights, in whatever file."""
        return supported.parts(self.config, self.pipeline)

    @property
    def weights(self) -> tuple[Path, ...]:
        """The files that hold its weights and count."""
        return tuple(file for part in self.parts for file in part.files) or (self.path,)

    def called(self, file: Path) -> str:
        """A file of its weights as messages and identities name it: by its place in the folder, or its name."""
        inside = file != self.path and file.is_relative_to(self.path)
        return file.relative_to(self.path).as_posix() if inside else file.name


def is_hub_name(source: str | Path) -> bool:
    """Whether this names a model on the Hugging Face hub rather than a place on this machine."""
    path = Path(source)
    return not path.exists() and path.suffix != ".safetensors" and _HUB_NAME.fullmatch(str(source)) is not None


def find_base(source: str | Path) -> BaseSource:
    """Find a base and check all that can be checked without loading it.

    Raises:
        BaseModelError: nothing is there, its weights are incomplete or no safetensors, or its kind is not
            supported; names all that was found and what is supported.
    """
    path = Path(source)
    if path.suffix in PICKLES:
        raise BaseModelError(
            f"{path} is a pickle file, which can run code when it is read: only safetensors are loaded. "
            "Convert it, or take the model's .safetensors file."
        )
    if path.is_file():
        return _with_folder(path) if _holds_transformer(path) else _single_file(path)
    if is_hub_name(source):
        path = _snapshot(str(source))
    return _folder(path)


def _folder(path: Path, beside: Path | None = None) -> BaseSource:
    """A base in a folder, the weights of its denoiser perhaps in a file beside it."""
    pipeline = supported.pipeline_of(path)
    component = family(pipeline).denoiser_type.component
    given = {} if beside is None else {component: PartWeights(component, (beside,), None, None, ())}
    found = [given.get(part) or find_weights(path / part) for part in supported.parts(path, pipeline)]
    faults = supported.lacking(path, pipeline) + [fault for fault in found if isinstance(fault, str)]
    if faults:
        raise BaseModelError(
            f"The base model in {path} {'; '.join(faults)}. Save the pipeline with `safe_serialization=True`, or fetch "
            "the missing files."
        )
    parts = tuple(part for part in found if isinstance(part, PartWeights))
    denoiser = [read_header(file) for part in parts if part.part == component for file in part.files]
    return BaseSource(path, pipeline, parts, path, _checked(path, pipeline, path, denoiser), beside)


def _holds_transformer(path: Path) -> bool:
    """Whether a folder beside a file says that it is of a family whose transformer is published by itself."""
    folder = path.with_suffix("")
    if path.suffix != ".safetensors" or not (folder / "model_index.json").is_file():
        return False
    return family(supported.pipeline_of(folder)).denoiser_type.component == "transformer"


def _with_folder(path: Path) -> BaseSource:
    """The base whose transformer is this file, and whose other parts lie in the folder beside it.

    Raises:
        BaseModelError: as ``find_base``; or diffusers reads no such file of this family.
    """
    folder = path.with_suffix("")
    pipeline = supported.pipeline_of(folder)
    if not supported.reads_alone(pipeline):
        raise BaseModelError(
            f"{path.name} is to be the transformer of the {pipeline} in {folder}, and diffusers reads no such file of "
            "this kind. Put its weights into the folder, as diffusers saves them."
        )
    return _folder(folder, path)


def base_sha256(source: str | Path) -> str:
    """The identity of a base: a hash over the names and hashes of all files that decide its pictures.

    Raises:
        BaseModelError: as ``find_base``.
    """
    return identity(find_base(source))


def identity(found: BaseSource) -> str:
    """The same of a base that was found."""
    return identity_of({name: sha256_file(path) for name, path in deciding_files(found).items()})


def identity_of(files: dict[str, str]) -> str:
    """The same of the hashes of its files, by name."""
    digest = hashlib.sha256()
    for name, sha256 in sorted(files.items()):
        digest.update(f"{name}:{sha256}\n".encode())
    return digest.hexdigest()


def deciding_files(found: BaseSource) -> dict[str, Path]:
    """Every file that decides what a base draws, by its path in the base: weights, configurations, vocabularies.

    Not among them: variants that are not read, and parts that judge or mark pictures.
    """
    files = {one.name: one for one in (found.path, found.beside) if one is not None and one.is_file()}
    described = [found.config / "model_index.json"]
    for part in (*found.held, *tokenizers(found.config, found.pipeline), "scheduler"):
        described += [path for path in (found.config / part).glob("*") if path.suffix in _CONFIGURATIONS]
    read = {path for part in found.parts for path in (*part.files, part.index) if path not in (None, found.beside)}
    files |= {
        path.relative_to(found.config).as_posix(): path
        for path in (*described, *read)
        # The index of a variant decides nothing.
        if path in read or ".safetensors." not in path.name
    }
    return dict(sorted(files.items()))


def _checked(config: Path, pipeline: str, named: Path, headers: Sequence[Header]) -> int:
    """Check what the parts' configurations say, and the denoiser's file of itself; give the size of the pictures.

    Args:
        named: the base as error messages name it.
    """
    marked = {name: value for header in headers for name, value in marks(header).items()}
    if faults := supported.unsupported(config, pipeline) + supported.unsupported_marks(marked):
        raise BaseModelError(
            f"The base in {named} {' and '.join(faults)}, which is not supported yet; {supported.supported()}."
        )
    scheduler = read_config(config / "scheduler/scheduler_config.json")
    if faults := supported.contradicted(marked, scheduler):
        raise BaseModelError(f"The base in {named} contradicts itself: {'; '.join(faults)}.")
    return family(pipeline).pictures_of(supported.configurations(config))


def _single_file(path: Path) -> BaseSource:
    if path.suffix != ".safetensors":
        raise BaseModelError(f"{path} is no base model: expected a diffusers folder or a .safetensors file.")
    header = read_header(path)
    pipeline = _kind_of(path, header)
    config = path.with_suffix("")
    if not (config / "model_index.json").is_file():
        config = _published_config(path, header, pipeline)
    if (described := supported.pipeline_of(config)) != pipeline:
        raise BaseModelError(
            f"{config} describes a {described}, but {path.name} holds a {pipeline}. "
            "Give the file the folder of its own kind."
        )
    if faults := supported.lacking(config, pipeline):
        raise BaseModelError(f"{config}, which describes {path.name}, {'; '.join(faults)}. Restore the folder.")
    return BaseSource(path, pipeline, (), config, _checked(config, pipeline, path, [header]))


def _kind_of(path: Path, header: Header) -> str:
    """The pipeline that a single file holds, whole."""

    def holds(starts: Sequence[str]) -> bool:
        return any(key.startswith(tuple(starts)) for key in header.shapes)

    if holds(["conditioner.embedders.0.model."]) and not holds(["conditioner.embedders.1."]):
        raise refiner(path)
    kinds = {"conditioner.": "StableDiffusionXLPipeline", "cond_stage_model.": "StableDiffusionPipeline"}
    kind = next((kind for start, kind in kinds.items() if holds([start])), None)
    if kind is None or _SINGLE_FILE_UNET not in header.shapes:
        raise BaseModelError(
            f"{path} is not a whole Stable Diffusion in one file: its tensors are {listing(header.shapes, 3)}. If it "
            f"is a transformer alone, put the pipeline's folder with all its other parts beside it, as "
            f"{path.with_suffix('').name!r}. All else is read as a folder in diffusers layout; {supported.supported()}."
        )
    if (channels := header.shapes[_SINGLE_FILE_UNET][1]) != 4:
        raise BaseModelError(
            f"{path} has a UNet that takes {channels} channels (inpainting or depth) for latents of 4; "
            f"{supported.supported()}."
        )
    wanted: dict[str, tuple[str, ...]] = {"autoencoder": _SINGLE_FILE_VAE}
    if kind == "StableDiffusionXLPipeline":
        wanted |= {"text encoder": _SINGLE_FILE_XL_TEXT, "second text encoder": ("conditioner.embedders.1.model.",)}
    else:
        wanted["text encoder"] = _SINGLE_FILE_TEXT
    if lacking := [
        f"{name} ({' or '.join(f'{start}*' for start in starts)})"
        for name, starts in wanted.items()
        if not holds(starts)
    ]:
        raise BaseModelError(
            f"{path} is not a whole Stable Diffusion in one file: it lacks its {' and its '.join(lacking)}. Take the "
            "file that holds all parts, or put them together in a diffusers folder."
        )
    return kind


def _published_config(path: Path, header: Header, pipeline: str) -> Path:
    """The published description of a single file's kind, from the hub or its cache."""
    import torch
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    shapes = {key: torch.empty(shape, device="meta") for key, shape in header.shapes.items()}
    repository = fetch_diffusers_config(shapes)["pretrained_model_name_or_path"]
    try:
        return _download(repository, None, ["*.json", "*/*.json", "*/*.txt", "*/*.model"], [])
    except (OSError, ValueError) as error:
        raise BaseModelError(
            f"Nothing describes the parts of {path}, and the hub did not give {repository} ({_first_line(error)}). "
            f"Without a network, put a folder {path.with_suffix('').name!r} beside it that describes its parts: a "
            f"{pipeline} in diffusers layout, of which only configurations and tokenizers are read."
        ) from error


def _snapshot(name: str) -> Path:
    """The folder of a hub name: from the local cache if the machine is offline, else brought up to date.

    What lies in the cache depends on what was loaded before: so the main weights are asked for first, and variants,
    which are the same weights again, only where a part has no others.
    """
    repository, _, revision = name.partition("@")
    patterns = ["*.json", *(f"*/*{ending}" for ending in (*_CONFIGURATIONS, ".safetensors"))]
    try:
        path = _download(repository, revision or None, patterns, ["*/*.*.safetensors"])
        index = read_config(path / "model_index.json") if (path / "model_index.json").is_file() else {}
        known = str(index.get("_class_name"))
        parts = supported.parts(path, known) if known in FAMILIES else ()
        if any(isinstance(find_weights(path / part), str) for part in parts):
            path = _download(repository, revision or None, patterns, [])
        return path
    except (OSError, ValueError) as error:
        if isinstance(error, BaseModelError):
            raise
        raise BaseModelError(
            f"No base model {name!r}: no such folder or file here, and the hub did not give it ({_first_line(error)}). "
            "Check the name; offline, fetch it first with `hf download` where there is a network; where the model asks "
            "for it, accept its licence and log in with `hf auth login`."
        ) from error


def _download(repository: str, revision: str | None, wanted: list[str], left_out: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(repository, revision=revision, allow_patterns=wanted, ignore_patterns=left_out or None)
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
