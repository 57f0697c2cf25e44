"""Where models compute on this machine, and what it computes fast."""

from __future__ import annotations

import os
import platform
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Literal

from fade.errors import ConfigError

if TYPE_CHECKING:
    import torch

Precision = Literal["bf16", "fp32"]
AUTO_PRECISION = "auto"


def compute_device() -> torch.device:
    """Where bases and classifiers compute: what FADE_DEVICE names, else the GPU where there is one.

    Of several GPUs the current one, which a launcher of several processes sets. On a GPU the same inputs give the
    same bytes, as on a CPU: torch takes its deterministic algorithms where it has any, and warns where not; products
    of float32 use TensorFloat-32.

    Raises:
        ConfigError: FADE_DEVICE is no device, or a GPU that torch does not see.
    """
    import torch

    from fade.environment import environment  # late: what only names a precision does not wait for it

    asked = environment().device
    if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    index = int(asked.partition(":")[2] or (torch.cuda.current_device() if torch.cuda.is_available() else 0))
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"FADE_DEVICE is {asked!r}, and torch sees {torch.cuda.device_count()} GPUs. `fade doctor` says why it "
            "sees none; FADE_DEVICE=cpu does without."
        )
    _reproducible_on_gpus()
    return torch.device("cuda", index)


@contextmanager
def threads_at_most(count: int) -> Iterator[None]:
    """Inside, torch computes on no more than ``count`` threads of the processor."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(min(count, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


_busy: Counter[int] = Counter()
_choosing = threading.Lock()


@contextmanager
def card_for_a_process() -> Iterator[dict[str, str]]:
    """Which GPU a process that is started now computes on, as its environment; held until the block ends.

    Of several GPUs the one that the fewest of this process's others are on. Nothing is said where FADE_DEVICE names a
    device already, or there are not several.
    """
    import torch

    from fade.environment import environment

    count = torch.cuda.device_count() if environment().device in ("auto", "cuda") else 0
    if count < 2:
        yield {}
        return
    with _choosing:
        card = min(range(count), key=lambda number: _busy[number])
        _busy[card] += 1
    try:
        yield {"FADE_DEVICE": f"cuda:{card}"}
    finally:
        with _choosing:
            _busy[card] -= 1


@cache
def _reproducible_on_gpus() -> None:
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is computed
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


def fast_precision(device: str | None = None) -> Precision:
    """``bf16`` where the processor or the GPU multiplies bfloat16 itself, else ``fp32``.

    An x86 processor has such instructions with AVX512-BF16 or AMX. With AVX-512 alone oneDNN widens every value to
    float32 and back, and a product of matrices takes three to four times as long as in float32 (measured on an Ice
    Lake); without AVX-512 torch computes a value at a time, about 100 times as long.

    Args:
        device: ``cpu`` or ``cuda``; left out, where models compute.
    """
    import torch

    if (device or compute_device().type) == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if _multiplies_bfloat16() else "fp32"


def _multiplies_bfloat16() -> bool:
    import torch

    if platform.machine().lower() in ("x86_64", "amd64"):
        # oneDNN's own answer is yes wherever there is AVX-512, which is enough to emulate it.
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def chosen_precision(name: str) -> str:
    """What a setting names; for ``auto`` the one that is fast on this machine."""
    return fast_precision() if name == AUTO_PRECISION else name


def peak_mib() -> float:
    """The most memory this process has held so far, in MiB, on the host."""
    import resource  # not on Windows, where nothing else here needs it

    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
