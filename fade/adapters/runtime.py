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
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from numpy.typing import NDArray

from fade.adapters.integrity import Integrity, check_against_files
from fade.adapters.manifest import (
    MANIFEST_NAME,
    Manifest,
    Permission,
    check_base,
    parse_manifest,
    read_adapter,
    read_permission,
)
from fade.adapters.overlay import AdapterSet, Overlay, using
from fade.adapters.seen import Memory
from fade.errors import BaseModelError, FadeError, RefusedError, listing
from fade.models.base import Base
from fade.models.family import read_pipeline
from fade.models.generate import Solver, generate_batch
from fade.models.registry import FAMILIES, family
from fade.models.source import find_base
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
            must be the base's own: adapters, hooks, offloading and edited weights are refused.
        release: folder that ``fade.adapters.manifest.publish`` writes.
        public_key: the PEM file of the key that signs releases, or the key.
        state: file that remembers the highest counter seen, so that an older release is refused after a
            restart too, and the latest time; by default under ``$XDG_STATE_HOME/fade`` or ``~/.local/state/fade``.
            Runtimes of several bases may share it.

    Raises:
        RefusedError: the manifest cannot be established now; says why.
        BaseModelError: the pipeline is of an unsupported class, or is not what its files say.
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
        self._memory = Memory(None if state is None else Path(state), self.key)
        self._changing = threading.Lock()
        self._live: Live | None = None
        self._base_checked: Mapping[str, str] = {}
        self.refusal = "no manifest was read yet"
        check_against_files(self.pipeline, read_pipeline(find_base(self.base.folder)), origin=self.base.folder)
        self._overlay = Overlay(self.base.denoiser)
        self._tokenizers = _one_text_at_a_time(self.pipeline)
        self._plain = self._overlay.prepare([])
        self.base.settle()
        self._integrity = Integrity(self.pipeline)
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
            RefusedError: the manifest cannot be established, or the pipeline is not what it was at the start.
        """
        with self.serving():
            # Schedulers count their steps inside: each request has its own, so that several may run at once.
            call = copy.copy(self.pipeline)
            call.scheduler = copy.deepcopy(self.pipeline.scheduler)
            answer = call(*arguments, **options)
            self._integrity.check_parts(call)  # a callback between two steps is handed this copy
        return answer

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
        live = self._checked()
        with using(self._plain if base_only else live.adapters):
            pictures = generate_batch(
                self.base, list(prompts), list(seeds), steps=steps, guidance=guidance, solver=solver, precision="fp32"
            )
        self._integrity.check_modules(self.pipeline)  # nobody else's code ran inside that could write into weights
        return pictures, live.manifest

    @contextmanager
    def serving(self) -> Iterator[Manifest]:
        """A request: all that the pipeline computes inside, in this thread, is drawn under one manifest.

        Raises:
            RefusedError: the manifest cannot be established, or the pipeline is not what it was at the start:
                said before anything is drawn, and again at the end, when nothing drawn inside may be used.
        """
        live = self._checked()
        with using(live.adapters):
            yield live.manifest
        self._integrity.check(self.pipeline)

    def _checked(self) -> Live:
        """What a request that begins now is drawn with, on a pipeline that is what it was."""
        live = self.refresh()
        self._integrity.check(self.pipeline)
        return live

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
                else:
                    self._memory.check_age(self._live.manifest)
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
        adapters = self._prepared(manifest)
        self._memory.take_over(manifest, self._permission(manifest))
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

    def _permission(self, manifest: Manifest) -> Permission | None:
        """The signed permission for this manifest, if there is one."""
        permission = read_permission(self.release, self.key)
        return permission if permission is not None and permission.names(manifest) else None


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


def _as_base(pipeline: Any) -> Base:
    """A loaded base as it is; a stock pipeline as the base it was loaded from."""
    if hasattr(pipeline, "denoiser"):
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
    return family(name)(pipeline, "", Path(source))
