"""What the trainings share: what each step does, which captions it draws, and how one that was cut off goes on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from fade.errors import ConfigError, DataError
from fade.files import writing
from fade.models.training import networks

CHECKPOINT_EVERY = 250
CANONICAL_CAPTION_SHARE = 0.7
EMPTY_CAPTION_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class StepStats:
    """One training step of a ``part``: ``step`` of ``steps`` (from 1) and its loss."""

    part: str
    step: int
    steps: int
    loss: float


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a training is kept, how often, and of what.

    Attributes:
        made_of: names pictures, captions and settings; a checkpoint of others is refused.
    """

    path: Path
    every: int
    made_of: str


class Training:
    """All that changes from step to step, so that it can be written and read back whole."""

    def __init__(
        self, modules: Mapping[str, nn.Module], generator: torch.Generator, *, learning_rate: float, weight_decay: float
    ) -> None:
        self.parameters = [parameter for module in modules.values() for parameter in module.parameters()]
        self.averages = [parameter.detach().clone() for parameter in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.99), fused=True
        )
        self._generator = generator

    def save(self, checkpoint: Checkpoint, step: int) -> None:
        """Write all of it, after so many steps."""
        tensors = {"generator": self._generator.get_state(), "step": torch.tensor(step)}
        for i, parameter in enumerate(self.parameters):
            tensors |= {f"{i}.value": parameter.detach(), f"{i}.average": self.averages[i]}
            tensors |= {f"{i}.{name}": state for name, state in self.optimizer.state[parameter].items()}
        with writing(checkpoint.path) as temporary:
            save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, {"made_of": checkpoint.made_of})

    @torch.no_grad()
    def load(self, checkpoint: Checkpoint) -> int:
        """Steps that were done; 0 if nothing is kept.

        Raises:
            ConfigError: what is kept was made of other pictures or settings.
        """
        if not checkpoint.path.is_file():
            return 0
        with safe_open(checkpoint.path, "pt") as file:
            if file.metadata()["made_of"] != checkpoint.made_of:
                raise ConfigError(
                    f"{checkpoint.path} was made of other pictures or settings. Remove it to begin anew, or train with "
                    "what it was made of."
                )
            state = self.optimizer.state_dict()
            for i, parameter in enumerate(self.parameters):
                parameter.copy_(file.get_tensor(f"{i}.value"))
                self.averages[i].copy_(file.get_tensor(f"{i}.average"))
                state["state"][i] = {n: file.get_tensor(f"{i}.{n}") for n in ("step", "exp_avg", "exp_avg_sq")}
            self.optimizer.load_state_dict(state)
            self._generator.set_state(file.get_tensor("generator"))
            return int(file.get_tensor("step"))

    def descend(self, loss: Tensor, step: int, *, ema_decay: float, checkpoint: Checkpoint, steps: int) -> None:
        """One step down a loss, then the exponential average of the weights, with a short memory at first.

        Kept where the checkpoint asks for it, and at the end.
        """
        descend(loss, self.optimizer, self.parameters)
        decay = min(ema_decay, step / (step + 9))
        torch._foreach_lerp_(self.averages, [parameter.detach() for parameter in self.parameters], 1 - decay)
        if step % checkpoint.every == 0 or step == steps:
            self.save(checkpoint, step)

    @torch.no_grad()
    def take_averages(self) -> None:
        """Leave the averages in the place of the weights."""
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            parameter.copy_(average)


def learning_rate_at(step: int, steps: int, peak: float) -> float:
    """100 steps of warm-up, then a cosine to 2 % of the peak; ``step`` counts from 1."""
    return peak * min(1.0, step / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """For the steps that follow."""
    for group in optimizer.param_groups:
        group["lr"] = value


def descend(loss: Tensor, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> None:
    """One step down a loss, its gradient cut to norm 1."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


class Captions:
    """Which sentence each picture of a batch carries: 10 % none, else 70 % its first, else any of its own."""

    def __init__(self, tokenizer: CLIPTokenizer, captions: Sequence[Sequence[str]]) -> None:
        sentences = sorted({caption for variants in captions for caption in variants} | {""})
        number = {sentence: i for i, sentence in enumerate(sentences)}
        self._ids = networks.tokenize(tokenizer, sentences)
        self._empty = number[""]
        self._variants = [[number[caption] for caption in group] for group in captions]

    def draw(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Token ids (B, L) for the pictures ``rows``."""
        chosen = []
        for row, (kind, which) in zip(rows.tolist(), torch.rand(len(rows), 2, generator=generator), strict=True):
            group = self._variants[row]
            if kind < EMPTY_CAPTION_SHARE:
                chosen.append(self._empty)
            elif kind < EMPTY_CAPTION_SHARE + (1 - EMPTY_CAPTION_SHARE) * CANONICAL_CAPTION_SHARE:
                chosen.append(group[0])
            else:
                chosen.append(group[min(int(which * len(group)), len(group) - 1)])
        return self._ids[chosen]


def check_side(pictures: NDArray[np.uint8], factor: int) -> None:
    """Raise DataError for pictures (N, H, W, 3) that are no squares, or whose side is no multiple of ``factor``."""
    height, width = pictures.shape[1:3]
    if height != width or height % factor:
        raise DataError(
            f"The pictures are {width} x {height}: a base of this shape draws squares whose side is a multiple of "
            f"{factor}. Build the catalog with such a --size."
        )


def made_of_hash(
    pictures: NDArray[np.uint8],
    captions: Sequence[Sequence[str]],
    params: Mapping[str, Any],
    others: Sequence[str] = (),
) -> str:
    """What a training is made of, for ``Checkpoint.made_of``; ``others``: hashes of what it begins with."""
    content = [hashlib.sha256(pictures.tobytes()).hexdigest(), list(captions), dict(params), *others]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def kept_beside(out: Path) -> Path:
    """The folder of what is under way of a base that will be written to ``out``."""
    return out.with_name(f".{out.name}.training.partial")
