"""Textual inversion: what to tell a network so that it denoises given pictures best.

After Gal et al., arXiv:2208.01618, in two spaces. *States*: all that the denoiser reads of the text is free, at every
position, and the pooled state too where a family is told one, as an attacker who holds the weights would have it
(``Search``; also used by training against it). *Words*: new tokens before the text encoder, which stays as it is
(``WordSearch``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fade.errors import ConfigError
from fade.models.base import Base
from fade.models.denoiser import Denoiser, autocast
from fade.models.told import POOLED, Told

PLACEHOLDERS = ("thing", "image", "picture", "photo", "cat")
"""Words in whose place new tokens are put: the first that the tokenizers have as one token and the sentence lacks."""


@dataclass(frozen=True, slots=True)
class InversionStep:
    """One step: its number (from 1), the states reached, and the loss before it; of a search of prompts, these."""

    step: int
    states: Told
    loss: float
    prompts: tuple[str, ...] = ()


class Search:
    """Text states that are being optimised, each with Adam's moments of its own.

        min over E of || e_theta(z_t, t, E) - e ||^2,  z_0 from the pictures, t ~ U{0..T-1}

    Args:
        latents: z_0 of the pictures to bring back, (N, C, h, w).
        start: where to begin, K rows.
        pooled: search the pooled states besides, where the rows have one; else these stay as the start's prompts give
            them.
    """

    def __init__(
        self,
        latents: Tensor,
        start: Told,
        *,
        learning_rate: float,
        precision: str,
        device: torch.device,
        pooled: bool = False,
    ) -> None:
        self._latents, self._start, self._precision = latents, start.to(device), precision
        names = ["states", *[POOLED] * (pooled and POOLED in start.others)]
        self.prompts: tuple[str, ...] = ()
        self._free = {
            name: [row.detach().clone().requires_grad_(True) for row in self._start.tensors()[name]] for name in names
        }
        self._optimizer = torch.optim.Adam(self._parameters, lr=learning_rate)

    @property
    def _parameters(self) -> list[Tensor]:
        return [row for rows in self._free.values() for row in rows]

    @property
    def states(self) -> Told:
        """The states as they are now, K rows, cut off from the search."""
        return self._start.with_tensors(
            {name: torch.stack([row.detach() for row in rows]) for name, rows in self._free.items()}
        )

    def step(self, denoiser: Denoiser, *, batch: int, generator: torch.Generator) -> Tensor:
        """One step of Adam on every state, each on its own share of the batch; give the loss before it, unread.

        The network is left as it is: no gradient reaches its weights. ``batch`` should be a multiple of K.
        """
        told = self._start.with_tensors({name: torch.stack(rows) for name, rows in self._free.items()})
        loss = _loss(denoiser, self._latents, told, batch=batch, generator=generator, precision=self._precision)
        for row, gradient in zip(self._parameters, torch.autograd.grad(loss, self._parameters), strict=True):
            row.grad = gradient
        self._optimizer.step()
        return loss.detach()

    def restart(self, index: int, start: Told) -> None:
        """Put one state back to a beginning (one row), without its moments."""
        for name, rows in self._free.items():
            self._optimizer.state.pop(rows[index], None)
            with torch.no_grad():
                rows[index].copy_(start.tensors()[name][0])
        # What stands beside the states is the new beginning's too: a mask of another prompt would hide some of them.
        at = torch.arange(len(self._start)) == index
        self._start = self._start.replaced(at, start.to(self._start.states.device))


def _loss(
    denoiser: Denoiser, latents: Tensor, told: Told, *, batch: int, generator: torch.Generator, precision: str
) -> Tensor:
    """Mean squared error of a batch of noised pictures, shared among the K rows of ``told``."""
    asked = NoisedBatch.drawn(denoiser, latents, batch, generator)
    return asked.errors(denoiser, told[torch.arange(batch) % len(told)], precision).mean()


@dataclass(frozen=True, slots=True)
class NoisedBatch:
    """Noised pictures and what a network is to answer at them, (B, C, h, w) each; the times, (B,)."""

    noisy: Tensor
    timesteps: Tensor
    target: Tensor

    @classmethod
    def drawn(cls, denoiser: Denoiser, latents: Tensor, batch: int, generator: torch.Generator) -> NoisedBatch:
        """z_0 from the pictures, t ~ U{0..T-1}."""
        path = denoiser.path
        chosen = latents[torch.randint(len(latents), (batch,), generator=generator)]
        timesteps = torch.randint(path.steps, (batch,), generator=generator)
        noise = torch.randn(chosen.shape, generator=generator)
        noisy, target = path.noised(chosen, noise, timesteps), path.target(chosen, noise, timesteps)
        return cls(*(one.to(denoiser.device) for one in (noisy, timesteps, target)))

    def __getitem__(self, rows: Tensor) -> NoisedBatch:
        """Some of its rows."""
        return NoisedBatch(self.noisy[rows], self.timesteps[rows], self.target[rows])

    def errors(self, denoiser: Denoiser, told: Told, precision: str) -> Tensor:
        """Squared errors of the network's answers, (B, C, h, w) float32."""
        with autocast(precision, denoiser.device.type):
            answer = denoiser.predict(self.noisy, self.timesteps, told)
        return (answer.float() - self.target).square()


class NewTokens:
    """K prompts of one sentence, each with tokens of its own, as many, whose embeddings are free.

    Every CLIP that reads prompts for the base has embeddings of its own for them, and what it gives follows: the states
    and, where a family tells its denoiser one, the pooled state. Encoders of other kinds (T5) read the placeholder.

    Args:
        template: the sentence, with ``{}`` for the tokens.
        rows: how many prompts, K.
        count: new tokens of each.
        generator: draws the tokens of the vocabulary at whose embeddings they begin.

    Raises:
        ConfigError: the base has no CLIP, its encoders are not at hand, or a tokenizer knows no placeholder.
    """

    def __init__(self, base: Base, template: str, *, rows: int, count: int, generator: torch.Generator) -> None:
        self._base, self._rows = base, rows
        pipeline = base.pipeline
        pairs = [(getattr(pipeline, reads), getattr(pipeline, name)) for reads, name in base.tokenizers.items()]
        clips = [one for one in pairs if one[1] is not None and one[1].config.model_type == "clip_text_model"]
        if not clips or base.encoders is not None:
            raise ConfigError(
                "New tokens need a CLIP that reads prompts and stays loaded: "
                f"got {type(pipeline).__name__} with {', '.join(base.tokenizers.values())}. Search its states instead."
            )
        self.tokenizer: Any = clips[0][0]
        word = _placeholder([tokenizer for tokenizer, _ in clips], template)
        self._prompts = [template.format(" ".join([word] * count))] * rows
        self._layers: list[tuple[nn.Embedding, int]] = []
        self.values: list[Tensor] = []
        for tokenizer, encoder in clips:
            layer = encoder.get_input_embeddings()
            begin = torch.randint(layer.weight.shape[0], (rows, count), generator=generator)
            self._layers.append((layer, _alone(tokenizer, word)[0]))
            self.values.append(layer.weight.detach()[begin.to(layer.weight.device)].float().requires_grad_(True))

    @property
    def tables(self) -> list[Tensor]:
        """Each CLIP's embeddings of its whole vocabulary, (V, D)."""
        return [layer.weight.detach().float() for layer, _ in self._layers]

    def told(self) -> Told:
        """What the denoiser is told for the prompts, K rows; gradients reach the embeddings."""
        with ExitStack() as hooks:
            for (layer, placeholder), values in zip(self._layers, self.values, strict=True):
                hooks.callback(layer.register_forward_hook(partial(_put_in, placeholder, values)).remove)
            return self._base.encoded(self._prompts)


def _put_in(placeholder: int, values: Tensor, layer: nn.Module, inputs: tuple[Tensor], embedded: Tensor) -> Tensor:
    del layer
    return embedded.masked_scatter((inputs[0] == placeholder)[..., None], values.to(embedded.dtype))


def _alone(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def _placeholder(tokenizers: Sequence[Any], template: str) -> str:
    for word in PLACEHOLDERS:
        found = [(_alone(tokenizer, word), _alone(tokenizer, template.format(""))) for tokenizer in tokenizers]
        if all(len(ids) == 1 and ids[0] not in rest for ids, rest in found):
            return word
    raise ConfigError(
        f"No word of {', '.join(PLACEHOLDERS)} is one token of this base's tokenizers and no part of {template!r}: "
        "new tokens have no place. Search the states instead."
    )


class WordSearch:
    """Embeddings of new tokens that are being optimised by Adam, as ``Search`` optimises states."""

    def __init__(self, latents: Tensor, tokens: NewTokens, *, learning_rate: float, precision: str) -> None:
        self._latents, self._tokens, self._precision = latents, tokens, precision
        self.prompts: tuple[str, ...] = ()
        self._optimizer = torch.optim.Adam(tokens.values, lr=learning_rate)

    @property
    def states(self) -> Told:
        """What the denoiser is told with the tokens as they are now, K rows."""
        with torch.no_grad():
            return self._tokens.told()

    def step(self, denoiser: Denoiser, *, batch: int, generator: torch.Generator) -> Tensor:
        """As ``Search.step``."""
        told = self._tokens.told().to(denoiser.device)
        loss = _loss(denoiser, self._latents, told, batch=batch, generator=generator, precision=self._precision)
        for values, gradient in zip(self._tokens.values, torch.autograd.grad(loss, self._tokens.values), strict=True):
            values.grad = gradient
        self._optimizer.step()
        return loss.detach()


def invert(
    denoiser: Denoiser,
    latents: Tensor,
    *,
    start: Told,
    steps: int,
    batch: int,
    learning_rate: float,
    generator: torch.Generator,
    precision: str = "fp32",
    pooled: bool = False,
) -> Iterator[InversionStep]:
    """Search from K beginnings for a number of steps; yields after each. Arguments are those of ``Search``."""
    search = Search(
        latents, start, learning_rate=learning_rate, precision=precision, device=denoiser.device, pooled=pooled
    )
    yield from searched(search, denoiser, steps=steps, batch=batch, generator=generator)


class Searching(Protocol):
    """A search that takes steps."""

    @property
    def states(self) -> Told:
        """What the denoiser is told by now, a row for each beginning."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """What would be written to tell it so; nothing where nothing written does."""

    def step(self, denoiser: Denoiser, *, batch: int, generator: torch.Generator) -> Tensor:
        """Take one; give the loss before it."""


def searched(
    search: Searching, denoiser: Denoiser, *, steps: int, batch: int, generator: torch.Generator
) -> Iterator[InversionStep]:
    """Take so many steps of a search; yields after each."""
    for step in range(1, steps + 1):
        loss = search.step(denoiser, batch=batch, generator=generator)
        yield InversionStep(step, search.states, float(loss), search.prompts)
