"""How a base model is loaded, of whatever family."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import diffusers
import torch
import transformers
from diffusers.loaders.single_file_utils import SingleFileComponentError
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from fade.errors import BaseModelError
from fade.hardware import compute_device
from fade.models.base import Base, read_by
from fade.models.prompts import readers
from fade.models.registry import family
from fade.models.sharing import is_shared, shared
from fade.models.source import BaseSource, find_base, identity
from fade.models.supported import read_config
from fade.models.tensors import check_weights, empty_network

Weights = Literal["fp32", "bf16"]
_LOADERS_ERRORS = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, SingleFileComponentError)
"""What the libraries raise of files that they cannot use; the cause is kept for the log."""


def family_of(source: str | Path) -> type[Base]:
    """The family of a base, asked of its configurations alone.

    Raises:
        BaseModelError: as ``find_base``.
    """
    return family(find_base(source).pipeline)


def load_base(
    source: str | Path,
    *,
    expected_sha256: str | None = None,
    weights: Weights = "fp32",
    prompts: Sequence[str] | None = None,
) -> Base:
    """Load a base: a diffusers folder, a single safetensors file, or a name on the Hugging Face hub.

    It lies where models compute (``fade.hardware.compute_device``). Its weights are not to be written into: others
    may read them (``fade.models.sharing``).

    Args:
        weights: how the denoiser's weights are held; ``bf16`` halves their memory and rounds them, the
            encoders and the autoencoder stay float32.
        prompts: what will be told. They are read first, by text encoders that are dropped before the denoiser is
            loaded, so that memory never holds both (a T5 or a language model is as large as what it tells). Others
            can still be encoded: the encoders are then loaded again, used and dropped. None: they are kept. Of a
            single file they are always kept.

    Raises:
        BaseModelError: missing, damaged, not supported, or of another hash than expected.
    """
    device = compute_device()  # what is wrong with it is said before a hash is computed
    found = find_base(source)
    apart = prompts is not None and not found.path.is_file()
    identified = cache(partial(identity, found))  # a hash over all its files, where it is needed first
    if not is_shared(lambda: (identified(), weights, device, apart)):
        check_weights(found)
        readers(found)
    sha256 = identified()
    if expected_sha256 is not None and sha256 != expected_sha256:
        raise BaseModelError(
            f"The base model in {source} is another one: its hash is {sha256[:12]}, expected {expected_sha256[:12]}. "
            "An erasure holds for one base only; restore that base, or make a new request for this one."
        )
    base = shared(
        (sha256, weights, device, apart),
        lambda: _loaded(
            found, sha256, Path(source), weights=weights, device=device, prompts=prompts if apart else None
        ),
    )
    return base


def _loaded(
    found: BaseSource,
    sha256: str,
    source: Path,
    *,
    weights: Weights,
    device: torch.device,
    prompts: Sequence[str] | None,
) -> Base:
    kind = family(found.pipeline)
    encoders = None if prompts is None else partial(_encoders_alone, found, sha256, source, device)
    read = read_by(encoders, [kind.negative, *(prompts or ())])
    try:
        with _no_progress_bars():
            if found.path.is_file():
                pipeline = _load_file(found, weights)
            else:
                pipeline = _load_folder(found, weights, without=kind.tokenizers.values() if encoders else ())
    except _LOADERS_ERRORS as error:
        raise BaseModelError(f"The base model in {source} does not load: {error}. Restore it.") from error
    base = kind(_placed(pipeline, device), sha256, source)
    if weights == "bf16":
        _lay_out(base.network, pipeline.vae)
    base.encoders, base.read_before = encoders, read
    base.prepare()
    return base


def _placed(pipeline: Any, device: torch.device) -> Any:
    """The pipeline on a device, to be asked only."""
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module) and next(part.parameters()).device.type != "meta":
            # Not the pipeline's own `to`, which warns of types where only the place changes.
            part.requires_grad_(False).eval().to(device)
    return pipeline


def _lay_out(*networks: torch.nn.Module) -> None:
    """Hold the kernels of convolutions with the channels last, as products in bfloat16 read them.

    Otherwise each is copied at every step. Bases in float32 are left: what was drawn of them stays bit for bit.
    """
    for network in networks:
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _encoders_alone(found: BaseSource, sha256: str, source: Path, device: torch.device) -> Base:
    """A base that reads prompts and can do nothing else: its denoiser and its autoencoder hold nothing."""
    kind = family(found.pipeline)
    nothing = {
        part: empty_network(kind.parts[part], read_config(found.config / part / "config.json"))
        for part in (kind.denoiser_type.component, "vae")
    }
    try:
        with _no_progress_bars():
            pipeline = _load_folder(found, "fp32", given=nothing)
    except _LOADERS_ERRORS as error:
        raise BaseModelError(f"The text encoders in {source} do not load: {error}. Restore them.") from error
    return kind(_placed(pipeline, device), sha256, source)


def read_pipeline(found: BaseSource) -> Any:
    """A base's pipeline on the CPU, of its files as they are now, in float32; nothing of it is shared."""
    with _no_progress_bars():
        return (_load_file if found.path.is_file() else _load_folder)(found, "fp32")


def _load_folder(
    found: BaseSource, weights: Weights, *, without: Iterable[str] = (), given: Mapping[str, Any] = MappingProxyType({})
) -> Any:
    """The pipeline of a folder.

    Args:
        without: parts that are not loaded.
        given: parts that are there already.
    """
    held = {**given, **dict.fromkeys(without)}
    component = family(found.pipeline).denoiser_type.component
    dtypes = {"default": torch.float32, component: torch.bfloat16 if weights == "bf16" else torch.float32}
    if found.beside is not None and component not in held:
        held[component] = _network(found.pipeline, component).from_single_file(
            str(found.beside),
            config=str(found.config),
            subfolder=component,
            local_files_only=True,
            dtype=dtypes[component],
        )
    # Where a variant counts it is loaded by itself: the pipeline would prefer it in every part that has one.
    variants = {
        one.part: _network(found.pipeline, one.part).from_pretrained(
            found.path / one.part,
            variant=one.variant,
            dtype=dtypes.get(one.part, torch.float32),
            use_safetensors=True,
            local_files_only=True,
        )
        for one in found.parts
        if one.variant is not None and one.part not in held
    }
    return getattr(diffusers, found.pipeline).from_pretrained(
        found.path,
        dtype=dtypes,
        use_safetensors=True,
        local_files_only=True,
        **{**variants, **_left_out(found), **held},
    )


def _network(pipeline: str, part: str) -> Any:
    name = family(pipeline).parts[part]
    return getattr(transformers if hasattr(transformers, name) else diffusers, name)


def _load_file(found: BaseSource, weights: Weights) -> Any:
    pipeline = getattr(diffusers, found.pipeline).from_single_file(
        str(found.path),
        config=str(found.config),
        local_files_only=True,
        dtype=torch.float32,
        **_left_out(found),
    )
    if weights == "bf16":
        # diffusers' own `to` warns of modules to be kept in float32, also where there are none.
        torch.nn.Module.to(getattr(pipeline, family(found.pipeline).denoiser_type.component), torch.bfloat16)
    return pipeline


def _left_out(found: BaseSource) -> dict[str, Any]:
    """What the pipeline is not given: what its family leaves out, and parts that this base does without."""
    kind = family(found.pipeline)
    absent = [part for part in kind.optional if part not in found.held]
    absent += [name for name, encoder in kind.tokenizers.items() if encoder in absent]
    return {**kind.left_out, **dict.fromkeys(absent)}


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Both libraries draw a bar for each file they read; a base is read many times."""
    before = diffusers_logging.is_progress_bar_enabled(), transformers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if before[0]:
            diffusers_logging.enable_progress_bar()
        if before[1]:
            transformers_logging.enable_progress_bar()
