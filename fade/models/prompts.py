"""How a base reads prompts, asked of its tokenizers alone: before a network is loaded, and before training."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from fade.errors import BaseModelError, listing
from fade.models.base import Base
from fade.models.registry import family
from fade.models.source import BaseSource
from fade.models.supported import configurations, read_config, tokenizers
from fade.models.tensors import described

_TOKEN_STATES = ("token_embedding.weight", "shared.weight", "embed_tokens.weight")
UNSAID_LENGTH = 10**6
"""A tokenizer that was saved without a length says 10 ** 30; none reads as much as this."""


@dataclass(frozen=True, slots=True)
class Reader:
    """One tokenizer of a base, and how many tokens of a prompt its text encoder is given.

    Attributes:
        length: tokens, those of begin and end among them.
        states: for how many tokens the text encoder has a state.
        written: what the tokenizer is given for prompts, of it and them.
    """

    tokenizer: Any
    length: int
    states: int
    written: Callable[[Any, Sequence[str]], list[str]]

    def ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """What is read of each prompt."""
        rows: list[list[int]] = self.tokenizer(self.written(self.tokenizer, prompts), verbose=False).input_ids
        return [row if len(row) <= self.length else self._cut(row) for row in rows]

    def _cut(self, row: list[int]) -> list[int]:
        """Tokenizers keep the end where they write one."""
        end = [row[-1]] if row[-1] in self.tokenizer.all_special_ids else []
        return [*row[: self.length - len(end)], *end]


def readers(found: BaseSource) -> tuple[Reader, ...]:
    """The tokenizers of a base, one for each text encoder.

    Raises:
        BaseModelError: one cannot be read, or knows tokens for which its text encoder has no state.
    """
    loaded, kinds, kind = [], read_config(found.config / "model_index.json"), family(found.pipeline)
    for part, encoder in tokenizers(found.config, found.pipeline).items():
        try:
            tokenizer: Any = getattr(transformers, kinds[part][1]).from_pretrained(
                found.config / part, local_files_only=True
            )
        except ImportError as error:
            raise BaseModelError(
                f"{found.config}/{part} is a {kinds[part][1]}, which needs what is not installed: {error} A plain "
                "tokenizer, saved in its place and named in model_index.json, reads text as well."
            ) from error
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise BaseModelError(f"{found.config}/{part} cannot be read: {error}. Restore it.") from error
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor, which reads pictures too
        shapes = described(kind.parts[encoder], found.config / encoder)
        rows = next(shape[0] for name, shape in shapes.items() if name.endswith(_TOKEN_STATES))
        vocabulary = tokenizer.get_vocab()
        if without := sorted(token for token, number in vocabulary.items() if number >= rows):
            raise BaseModelError(
                f"The base in {found.path}: {part} knows {max(vocabulary.values()) + 1} tokens, and {encoder} has "
                f"states for {rows}: {listing(without, 3)} have none. Give each other the files they were saved with; "
                "a concept that was trained in (textual inversion) changes both."
            )
        config = read_config(found.config / encoder / "config.json")
        # A CLIP has learnt its positions; the others are given what their family's pipeline gives them.
        learnt = config.get("max_position_embeddings", 77) if kind.parts[encoder].startswith("CLIP") else None
        positions = kind.prompt_length(configurations(found.config)) if learnt is None else int(learnt)
        loaded.append(Reader(tokenizer, min(int(tokenizer.model_max_length), positions), rows, kind.written))
    return tuple(loaded)


def names_unread(found: Sequence[Reader], captions: Sequence[str], names: Sequence[str]) -> list[int]:
    """Which captions hold one of the names only after the end of what the text encoders read.

    Taught with such a caption, an erasure would change nothing, or what stands before.
    """
    pattern = re.compile(rf"(?i)\b({'|'.join(re.escape(name) for name in names)})\b")
    without = [pattern.sub("", caption) for caption in captions]
    read = [(reader.ids(captions), reader.ids(without)) for reader in found]
    return [
        i
        for i, (caption, other) in enumerate(zip(captions, without, strict=True))
        if caption != other and all(mine[i] == theirs[i] for mine, theirs in read)
    ]


_WORD = re.compile(r"[^\W\d_]+")
_LETTERS_A_TOKEN = 3
"""A word that takes more tokens than one for so many letters was met by no training that made its tokenizer."""


def spelt_out(found: Sequence[Reader], texts: Sequence[str]) -> list[bool]:
    """Which texts hold a word that a tokenizer only knows by its letters: what it stands for cannot be known."""
    return [any(_is_spelt(reader, word) for reader in found for word in _WORD.findall(text)) for text in texts]


def _is_spelt(reader: Reader, word: str) -> bool:
    return len(reader.tokenizer.tokenize(word)) > max(1, len(word) // _LETTERS_A_TOKEN)


def hardly_met(base: Base, texts: Sequence[str]) -> list[bool]:
    """Which texts hold a token that the base's training hardly met, though its tokenizer has it   (ours).

    Such a token's vector stays about as long as it was drawn, while training makes those it meets longer: it is
    shorter than half the median over these texts (of each the shortest). Of vectors of about one length none is.
    """
    shortest = []
    for part, encoder in base.tokenizers.items():
        tokenizer, network = getattr(base.pipeline, part), getattr(base.pipeline, encoder)
        if tokenizer is None or network is None:
            continue
        rows = tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
        lengths = network.get_input_embeddings().weight.detach().float().norm(dim=1).cpu()
        shortest.append(torch.stack([lengths[row].min() if row else lengths.max() for row in rows]))
    if not texts or not shortest:
        return [False] * len(texts)
    short = [one < one.median() / 2 for one in shortest]
    return [bool(found) for found in torch.stack(short).any(dim=0)]


def cut_short(found: Sequence[Reader], prompt: str) -> tuple[int, int] | None:
    """Tokens of a prompt and how many are read, of the first tokenizer that does not read it whole; None: all do."""
    for reader in found:
        (whole,) = reader.tokenizer([prompt], verbose=False).input_ids
        if len(whole) > reader.length:
            return len(whole), reader.length
    return None
