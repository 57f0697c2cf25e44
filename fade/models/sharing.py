"""One copy of a base for many erasures at once, in the threads of one process   (ours).

What an erasure changes is never the base's weights: adapters are modules beside them. So several erasures may read
the same weights, each through a network of its own whose parameters are the same memory.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fade.errors import BaseModelError
from fade.models.denoiser import weights_sha256

if TYPE_CHECKING:
    from fade.models.base import Base


class _Shelf:
    """Bases that were loaded, and the hash their weights had."""

    def __init__(self) -> None:
        self._loading = threading.Lock()
        self._bases: dict[Hashable, Base] = {}
        self._hashes: dict[Hashable, str] = {}
        self.gives_away = False

    def take(self, key: Hashable, load: Callable[[], Base]) -> Base:
        """A twin of the base of this key, which is loaded if nobody asked for it yet; or it itself, given away."""
        with self._loading:
            if key not in self._bases:
                base = load()
                if base.device.type == "cuda":
                    torch.cuda.synchronize(base.device)  # others read it in streams of their own
                self._bases[key], self._hashes[key] = base, weights_sha256(base.network)
            if self.gives_away:
                return self._bases.pop(key)
        return _twin(self._bases[key])

    def holds(self, key: Hashable) -> bool:
        """Whether somebody asked for the base of this key."""
        with self._loading:
            return key in self._bases

    def check(self) -> None:
        """Raise BaseModelError if somebody wrote into weights that all read."""
        for key, base in self._bases.items():
            if weights_sha256(base.network) != self._hashes[key]:
                raise BaseModelError(
                    f"The shared weights of {base.folder} were written into. What was made side by side is of no use: "
                    "make it again, a process each."
                )


_SHELF: ContextVar[_Shelf | None] = ContextVar("bases that are shared", default=None)


@contextmanager
def bases_shared() -> Iterator[None]:
    """Inside, ``load_base`` loads each base once and gives every caller a network of its own on the same weights.

    It holds for this thread and for those that are started with a copy of its context.

    Raises:
        BaseModelError: at the end, if shared weights were written into.
    """
    shelf = _Shelf()
    token = _SHELF.set(shelf)
    try:
        yield
    finally:
        _SHELF.reset(token)
    shelf.check()


def shared(key: Hashable, load: Callable[[], Base]) -> Base:
    """What ``load`` gives; inside ``bases_shared`` a twin of what it gave for this key."""
    shelf = _SHELF.get()
    return load() if shelf is None else shelf.take(key, load)


def give_bases_away() -> None:
    """From now on who asks for a shared base gets it itself, once; whoever asks next loads it.

    For a process that was forked to do one thing with what was loaded before: a twin takes a tenth of a picture's time.
    """
    if (shelf := _SHELF.get()) is not None:
        shelf.gives_away = True


def is_shared(key: Callable[[], Hashable]) -> bool:
    """Whether ``shared`` has a base of this key at hand; outside ``bases_shared`` the key is not asked for."""
    shelf = _SHELF.get()
    return shelf is not None and shelf.holds(key())


def own_stream(device: torch.device) -> Any:
    """A context in which this thread's work on a GPU queues up by itself, beside that of other threads."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


def _twin(base: Base) -> Base:
    """Another object with another denoiser on the same memory; encoders, which nobody changes, are the same ones."""
    network, pipeline = base.network, copy.copy(base.pipeline)
    # `data`, not `detach`: what torch notes of a tensor for its backward is then each twin's own.
    same: dict[int, Any] = {id(one): nn.Parameter(one.data, requires_grad=False) for one in network.parameters()}
    same |= {id(one): one for one in network.buffers()}
    setattr(pipeline, base.denoiser.component, copy.deepcopy(network, same))
    twin: Base = type(base)(pipeline, base.sha256, base.folder)
    twin.encoders, twin.read_before = base.encoders, base.read_before
    return twin
