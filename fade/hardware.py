"""What this machine computes fast."""

from __future__ import annotations

import sys
from typing import Literal

Precision = Literal["bf16", "fp32"]


def fast_precision() -> Precision:
    """``bf16`` where the processor or the GPU multiplies bfloat16 itself, else ``fp32``.

    A CPU without AVX-512 has no such instructions: torch then computes bfloat16 a value at a time, and
    a step of distillation takes about 15 times as long as in float32.
    """
    import torch

    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"


def peak_mib() -> float:
    """The most memory this process has held so far, in MiB, on the host."""
    import resource  # not on Windows, where nothing else here needs it

    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
