"""The runtime: a diffusers pipeline that draws only what the release manifest allows (ours).

    pipe = StableDiffusionPipeline.from_pretrained("base")
    pipe = Runtime(pipe, "release", public_key="public.pem")
    picture = pipe("a cat image in neon style.").images[0]

Each request begins by looking at the manifest. A new one is verified and prepared beside the running
requests and takes over for the requests after it; a request keeps the set it began with. If the manifest
cannot be established (missing, changed, another base, an adapter that does not fit, an older counter
without a signed permission) nothing is generated until it can: the runtime fails closed.
"""

from __future__ import annotations

import copy
import hashlib
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from filelock import FileLock
from numpy.typing import NDArray
from safetensors import safe_open

from fade.adapters.manifest import MANIFEST_NAME, Manifest, check_base, is_permitted, parse_manifest, read_adapter
from fade.adapters.overlay import AdapterSet, Overlay, using
from fade.errors import BaseModelError, ConfigError, FadeError, RefusedError, ResourceError, listing
from fade.files import read_json, write_json
from fade.models.deltas import plain_modules
from fade.models.family import FAMILIES, Base
from fade.models.generate import Solver, generate_batch
from fade.models.source import find_base
from fade.signing import key_id
from fade.signing import public_key as load_public_key


@dataclass(frozen=True, slots=True)
class Live:
    """What requests that begin now are drawn with."""

    manifest: Manifest
    adapters: AdapterSet
    swap_seconds: float


class Runtime:
    """A pipeline bound to a release. Called like the pipeline; other attributes are the pipeline's.

    Args:
        pipeline: a diffusers pipeline loaded from a folder or file, or a loaded ``Base``. Its weights
            must be the base's own: fused adapters or edited weights are refused.
        release: folder that ``fade.adapters.manifest.publish`` writes.
        public_key: the PEM file of the key that signs releases, or the key.
        state: file that remembers the highest counter seen, so that an older release is refused after a
            restart too; by default under ``$XDG_STATE_HOME/fade`` or ``~/.local/state/fade``.

    Raises:
        RefusedError: the manifest cannot be established now; says why.
        BaseModelError: the pipeline is of an unsupported class.
    """

    def __init__(
        self,
        pipeline: Any,
        release: str | Path,
        *,
        public_key: str | Path | Ed25519PublicKey,
        state: str | Path | None = None,
    ) -> None:
        self.release = Path(release)
        self.key = public_key if isinstance(public_key, Ed25519PublicKey) else load_public_key(Path(public_key))
        self.base = _as_base(pipeline)
        self.pipeline = self.base.pipeline
        self._state_given = None if state is None else Path(state)
        self._changing = threading.Lock()
        self._live: Live | None = None
        self._base_checked: Mapping[str, str] = {}
        self.refusal = "no manifest was read yet"
        self._check_unet()
        self._overlay = Overlay(self.pipeline.unet)
        self._tokenizers = _one_text_at_a_time(self.pipeline)
        try:
            self.refresh()
        except FadeError:
            self._restore()
            raise

    def __getattr__(self, name: str) -> Any:
        if name == "pipeline":  # not set yet: an error in the constructor must not recurse
            raise AttributeError(name)
        return getattr(self.pipeline, name)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Draw with the live adapters: the pipeline's own call, one manifest from beginning to end.

        Raises:
            RefusedError: the manifest cannot be established.
        """
        with self.serving():
            # Schedulers count their steps inside: each request has its own, so that several may run at once.
            call = copy.copy(self.pipeline)
            call.scheduler = copy.deepcopy(self.pipeline.scheduler)
            return call(*arguments, **options)

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int,
        guidance: float,
        solver: Solver = "ddim",
        base_only: bool = False,
    ) -> tuple[NDArray[np.uint8], Manifest]:
        """Pictures (B, H, W, 3) and the manifest they were drawn under, in float32.

        Args:
            base_only: without any adapter, for comparison. Whoever may ask for this can undo every
                erasure: offer it to reviewers alone.
        """
        with self.serving() as manifest, using(AdapterSet()) if base_only else _nothing():
            pictures = generate_batch(
                self.base, list(prompts), list(seeds), steps=steps, guidance=guidance, solver=solver, precision="fp32"
            )
        return pictures, manifest

    @contextmanager
    def serving(self) -> Iterator[Manifest]:
        """A request: all that the pipeline computes inside, in this thread, is drawn under one manifest.

        Raises:
            RefusedError: the manifest cannot be established.
        """
        live = self.refresh()
        with using(live.adapters):
            yield live.manifest

    @property
    def manifest(self) -> Manifest | None:
        """The manifest in force; None while the runtime refuses."""
        live = self._live
        return None if live is None else live.manifest

    def refresh(self) -> Live:
        """Look at the manifest and take a new one over; without a change it costs the reading of one small file.

        Raises:
            RefusedError: the manifest cannot be established; nothing is generated until it can.
        """
        with self._changing:
            try:
                data = (self.release / MANIFEST_NAME).read_bytes()
                if self._live is None or hashlib.sha256(data).hexdigest() != self._live.manifest.sha256:
                    self._live = self._take_over(data)
                _check_age(self._live.manifest)
                self.refusal = ""
                return self._live
            except (FadeError, OSError) as error:
                # Which adapters must be on is unknown from here: the old set may lack the newest erasure.
                self._live = None
                self.refusal = str(error)
                raise RefusedError(
                    f"Nothing is generated, because what must be erased cannot be established: {error}"
                ) from error

    def close(self) -> None:
        """Give the pipeline back as it was: the plain base."""
        self._live = None
        self.refusal = "the runtime was closed"
        self._restore()

    def _restore(self) -> None:
        self._overlay.remove()
        for tokenizer, kind in self._tokenizers:
            tokenizer.__class__ = kind

    def _take_over(self, data: bytes) -> Live:
        begun = time.perf_counter()
        manifest = parse_manifest(data, self.key, origin=str(self.release / MANIFEST_NAME))
        if self._base_checked != manifest.base_files:
            check_base(self.base.folder, manifest)
        path = self._state_path(manifest)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock", timeout=10):
                seen = self._seen(path)
                self._check_counter(manifest, seen)
                adapters = self._prepared(manifest)
                now = {"counter": manifest.counter, "sha256": manifest.sha256}
                if seen != now:
                    write_json(path, now)
        except OSError as error:
            if isinstance(error, FadeError):
                raise
            raise ResourceError(
                f"The highest counter seen cannot be kept in {path}: {error}. "
                "Give the runtime a file that it may write: state=."
            ) from None
        self._base_checked = manifest.base_files
        return Live(manifest, adapters, time.perf_counter() - begun)

    def _prepared(self, manifest: Manifest) -> AdapterSet:
        """The manifest's adapters, ready; those in force stay if it is the same release issued anew."""
        live = self._live
        if live is not None and (live.manifest.base_sha256, live.manifest.adapters) == (
            manifest.base_sha256,
            manifest.adapters,
        ):
            return live.adapters
        return self._overlay.prepare(
            [
                (one.name, one.weight, read_adapter(self.release, one, base_sha256=manifest.base_sha256))
                for one in manifest.adapters
            ]
        )

    def _state_path(self, manifest: Manifest) -> Path:
        if self._state_given is not None:
            return self._state_given
        home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state")
        return home / "fade" / f"{manifest.release}-{key_id(self.key)}.json"

    def _seen(self, path: Path) -> dict[str, Any]:
        """The highest counter taken over so far, and its manifest's hash."""
        if not path.exists():
            return {"counter": 0, "sha256": ""}
        seen = read_json(path)
        if set(seen) != {"counter", "sha256"} or not isinstance(seen["counter"], int):
            raise ConfigError(f"{path} does not say which release was seen last. Restore it, or remove it by hand.")
        return seen

    def _check_counter(self, manifest: Manifest, seen: dict[str, Any]) -> None:
        if manifest.counter > seen["counter"] or manifest.sha256 == seen["sha256"]:
            return
        if manifest.counter == seen["counter"]:
            raise RefusedError(
                f"Two manifests have the counter {manifest.counter}: {manifest.sha256[:12]} is offered, "
                f"{seen['sha256'][:12]} was in force. Publish a new one."
            )
        if not is_permitted(self.release, manifest, seen=seen["counter"], key=self.key):
            raise RefusedError(
                f"The manifest has the counter {manifest.counter}, but {seen['counter']} was in force already: an "
                "older release could bring back what was erased since. Publish a new one, or sign a permission."
            )

    def _check_unet(self) -> None:
        """Compare the denoiser in memory with the base's files: an adapter on other weights erases nothing for sure."""
        found = find_base(self.base.folder)
        if found.path.is_file():
            return  # another naming of tensors; its file's hash is checked against the manifest
        modules = plain_modules(self.pipeline.unet)
        wrong = []
        for file in [file for file in found.weights if file.parent.name == "unet"]:
            with safe_open(file, framework="pt") as stored:
                for key in stored.keys():  # noqa: SIM118 - a safetensors file, not a dict
                    name, _, kind = key.rpartition(".")
                    if name in modules and kind == "weight":
                        held = modules[name].weight
                        expected = stored.get_tensor(key).to(held.dtype)
                        if not torch.equal(held.detach().cpu(), expected):
                            wrong.append(key)
        if wrong:
            raise BaseModelError(
                f"The pipeline's weights are not those in {self.base.folder}: {listing(wrong)} differ. Give the "
                "runtime the base as it was loaded, without fused adapters."
            )


class _OneTextAtATime:
    """Makes a tokenizer fit for several threads.

    A fast tokenizer keeps padding and truncation in itself and sets them at each call: two requests at once read
    each other's, and one of them is drawn from a prompt of another length than its own.
    """

    _reading = threading.RLock()

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        with self._reading:
            return super().__call__(*arguments, **options)  # type: ignore[misc]

    def encode(self, *arguments: Any, **options: Any) -> Any:
        with self._reading:
            return super().encode(*arguments, **options)  # type: ignore[misc]

    def tokenize(self, *arguments: Any, **options: Any) -> Any:
        with self._reading:
            return super().tokenize(*arguments, **options)  # type: ignore[misc]


def _one_text_at_a_time(pipeline: Any) -> list[tuple[Any, type]]:
    """Change the pipeline's tokenizers so; each with the class that it had. They stay of that class to `isinstance`."""
    found = [part for name, part in pipeline.components.items() if name.startswith("tokenizer") and part is not None]
    before = [(tokenizer, type(tokenizer)) for tokenizer in found]
    for tokenizer, kind in before:
        if not issubclass(kind, _OneTextAtATime):
            tokenizer.__class__ = type(kind.__name__, (_OneTextAtATime, kind), {"__module__": kind.__module__})
    return before


def _check_age(manifest: Manifest) -> None:
    if manifest.expires is not None and datetime.now(UTC) > manifest.expires:
        raise RefusedError(
            f"The manifest {manifest.counter} of {manifest.issued} was valid for {manifest.valid_seconds} s: a newer "
            "one was withheld, or nobody issues them any more. See that `fade release --watch` runs."
        )


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _as_base(pipeline: Any) -> Base:
    """A loaded base as it is; a stock pipeline as the base it was loaded from."""
    if hasattr(pipeline, "noise_scheduler"):
        base: Base = pipeline
        return base
    name = type(pipeline).__name__
    if name not in FAMILIES:
        raise BaseModelError(f"A {name} is not supported yet; supported are {listing(FAMILIES)}.")
    source = getattr(pipeline, "name_or_path", "") or getattr(pipeline.config, "_name_or_path", "")
    if not source:
        raise BaseModelError(
            "The pipeline does not say where it was loaded from. Load it with from_pretrained(folder)."
        )
    return FAMILIES[name](pipeline, "", Path(source))
