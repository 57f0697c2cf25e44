"""Discrete prompts: words of the vocabulary that bring the concept back, which anybody could write.

Greedy coordinate search (as GCG for language models, arXiv:2307.15043; of pictures PEZ, arXiv:2302.03668, searches the
same space): with g the gradient of the denoising loss by a token's embedding,

    loss with token v there instead of u  ~  loss + g' (E_v - E_u)

and of the single exchanges that are best by this, the best by the loss itself is made, if it lowers it at all. Tokens
are whole words, and not of the concept's own name: whether that is forgotten is asked otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fade.errors import ConfigError, DataError
from fade.models.base import Base
from fade.models.denoiser import Denoiser
from fade.models.inversion import InversionStep, NewTokens, NoisedBatch, searched
from fade.models.told import Told
from fade.seeding import torch_generator

CANDIDATES = 4
"""Exchanges that are tried a step and prompt."""


class PromptSearch:
    """Prompts of one sentence, each with tokens of its own in the place of ``{}``.

    Args:
        without: names no token of which may be used.
        candidates: exchanges that are tried a step and prompt; more of them cost more and find more.

    Raises:
        ConfigError: the base reads prompts by no CLIP (``NewTokens``), or its CLIPs have vocabularies of their own.
    """

    def __init__(
        self,
        base: Base,
        latents: Tensor,
        template: str,
        *,
        rows: int,
        count: int,
        without: Sequence[str],
        precision: str,
        generator: torch.Generator,
        candidates: int = CANDIDATES,
    ) -> None:
        self._latents, self._precision, self._template = latents, precision, template
        self._now = NewTokens(base, template, rows=rows, count=count, generator=generator)
        self._tables = self._now.tables
        if len({len(table) for table in self._tables}) > 1:
            raise ConfigError(
                "Prompts are searched where all CLIPs of a base have one vocabulary: got "
                f"{', '.join(str(len(table)) for table in self._tables)} tokens. Search new words instead."
            )
        self.allowed = allowed_tokens(self._now.tokenizer, len(self._tables[0]), without)
        self._candidates = min(candidates, count * len(self.allowed))
        self._tried = NewTokens(base, template, rows=rows * self._candidates, count=count, generator=generator)
        self.ids = self.allowed[torch.randint(len(self.allowed), (rows, count), generator=generator)]
        self._put(self._now, self.ids)

    @property
    def states(self) -> Told:
        """What the denoiser is told for the prompts."""
        with torch.no_grad():
            return self._now.told()

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts as they would be written."""
        tokenizer = self._now.tokenizer
        return tuple(self._template.format(" ".join(_word(tokenizer, one) for one in row)) for row in self.ids.tolist())

    def step(self, denoiser: Denoiser, *, batch: int, generator: torch.Generator) -> Tensor:
        """Exchange one token of each prompt, where that helps; give the loss before. ``batch``: a multiple of rows."""
        rows, asked = len(self.ids), NoisedBatch.drawn(denoiser, self._latents, batch, generator)
        whose = torch.arange(batch) % rows
        errors = asked.errors(denoiser, self._now.told().to(denoiser.device)[whose], self._precision).mean((1, 2, 3))
        gradients = torch.autograd.grad(errors.mean(), self._now.values)
        self.ids = self._best(asked, whose, errors.detach(), gradients, denoiser)
        self._put(self._now, self.ids)
        return errors.detach().mean()

    @torch.no_grad()
    def _best(
        self, asked: NoisedBatch, whose: Tensor, errors: Tensor, gradients: Sequence[Tensor], denoiser: Denoiser
    ) -> Tensor:
        """Each prompt's tokens after the best exchange that was tried, (rows, count)."""
        rows, count = self.ids.shape
        tried = exchanges(self.ids, self.allowed, gradients, self._tables, self._candidates)
        self._put(self._tried, tried.flatten(0, 1))
        told, each = self._tried.told().to(denoiser.device), tried.shape[1]
        # Exchange j of a prompt is asked on just the pictures that the prompt was asked on.
        found = torch.stack(
            [asked.errors(denoiser, told[whose * each + j], self._precision).mean((1, 2, 3)).cpu() for j in range(each)]
        )
        of_rows = torch.zeros(each + 1, rows).index_add_(1, whose, torch.cat([errors.cpu()[None], found]))
        best = of_rows.argmin(dim=0)  # of equal ones the first: the prompt as it is
        every = torch.cat([self.ids[:, None], tried], dim=1)
        return every[torch.arange(rows), best].view(rows, count)

    def _put(self, tokens: NewTokens, ids: Tensor) -> None:
        with torch.no_grad():
            for values, table in zip(tokens.values, self._tables, strict=True):
                values.copy_(table[ids.to(table.device)])


def allowed_tokens(tokenizer: Any, size: int, without: Sequence[str]) -> Tensor:
    """Tokens of a vocabulary that are words, so that what is found can be written, and of no such name; ascending.

    Raises:
        DataError: there are none.
    """
    ids = list(range(min(size, len(tokenizer))))
    words = [_word(tokenizer, one) for one in ids]
    read = tokenizer(words, add_special_tokens=False).input_ids
    named = {one for name in without for one in tokenizer(name, add_special_tokens=False).input_ids}
    refused = {*named, *tokenizer.all_special_ids}
    found = [one for one, back in zip(ids, read, strict=True) if back == [one] and one not in refused]
    if not found:
        raise DataError(f"The vocabulary has no word but of {', '.join(without)}: nothing can be searched.")
    return torch.tensor(found)


def _word(tokenizer: Any, token: int) -> str:
    word: str = tokenizer.decode([token])
    return word.strip()


def exchanges(ids: Tensor, allowed: Tensor, gradients: Sequence[Tensor], tables: Sequence[Tensor], most: int) -> Tensor:
    """For each prompt the single exchanges that lower the loss most to first order, (rows, most, count).

    Args:
        ids: (rows, count).
        gradients: of the loss by each CLIP's embeddings of them, (rows, count, D).
        tables: each CLIP's embeddings, (V, D).
    """
    rows, count = ids.shape
    change = torch.zeros(rows, count, len(allowed))
    for gradient, table in zip(gradients, tables, strict=True):
        gain = gradient.float() @ table[allowed.to(table.device)].T
        change += (gain - (gradient.float() * table[ids.to(table.device)]).sum(-1, keepdim=True)).cpu()
    change[ids[:, :, None] == allowed] = torch.inf
    best = change.flatten(1).topk(most, largest=False).indices
    found = ids[:, None].repeat(1, most, 1)
    found.scatter_(2, (best // len(allowed))[..., None], allowed[best % len(allowed)][..., None])
    return found


def invert_prompts(
    base: Base,
    latents: Tensor,
    *,
    template: str,
    tokens: int,
    without: Sequence[str],
    restarts: int,
    steps: int,
    batch: int,
    precision: str,
    seed: int,
) -> Iterator[InversionStep]:
    """Search prompts for the concept's pictures on the network as it is now; yields after each step, prompts with it.

    Raises:
        DataError: no pictures, or no token is left.
        ConfigError: as ``PromptSearch``.
    """
    if len(latents) == 0:
        raise DataError("An inversion needs pictures: got 0.")
    generator = torch_generator(seed, "prompt attack", tokens)
    search = PromptSearch(
        base,
        latents,
        template,
        rows=restarts,
        count=tokens,
        without=without,
        precision=precision,
        generator=generator,
    )
    yield from searched(search, base.denoiser, steps=steps, batch=batch, generator=generator)
