"""What this machine computes fast."""

from __future__ import annotations

import sys
from typing import Literal

Precision = Literal["bf16", "fp32"]
AUTO_PRECISION = "auto"


def fast_precision(device: str | None = None) -> Precision:
    """``bf16`` where the processor or the GPU multiplies bfloat16 itself, else ``fp32``.

    A CPU without AVX-512 has no such instructions: torch then computes bfloat16 a value at a time, and
    a product of matrices takes about 100 times as long as in float32.

    Args:
        device: ``cpu`` or ``cuda``; left out, the GPU where there is one.
    """
    import torch

    if device != "cpu" and torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"


def chosen_precision(name: str) -> str:
    """What a setting names; for ``auto`` the one that is fast on this machine."""
    return fast_precision() if name == AUTO_PRECISION else name


def peak_mib() -> float:
    """The most memory this process has held so far, in MiB, on the host."""
    import resource  # not on Windows, where nothing else here needs it

    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
