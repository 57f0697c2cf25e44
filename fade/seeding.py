"""Seeds: every random draw comes from a seed in the parameters and the name of its purpose.

Naming the purpose keeps draws independent: adding one does not shift the others.
"""

from __future__ import annotations

import hashlib
import threading
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

GLOBAL_GENERATOR = threading.RLock()
"""Held by whoever lets a library draw from torch's one global generator, which all threads share."""


def derive_seed(seed: int, *purpose: object) -> int:
    """A 63-bit seed for one purpose, e.g. ``derive_seed(42, "distill", "noise")``."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def torch_generator(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator for one purpose; CPU, so that draws are the same on every device."""
    import torch  # who draws with NumPy alone, splits and validation, does not wait for it

    return torch.Generator("cpu").manual_seed(derive_seed(seed, *purpose))


def numpy_generator(seed: int, *purpose: object) -> np.random.Generator:
    """A NumPy generator for one purpose."""
    return np.random.default_rng(derive_seed(seed, *purpose))
