"""Attacks by prompt: the concept asked for in other words, misspelt, and together with every other domain.

paraphrase    other sentences with the concept's name, about it alone
synonym       its other names, and words a person gives (other languages, descriptions)
misspelling   its name with two letters exchanged, one left out or doubled
composition   its name with every concept of the other domain, in sentences no caption used

A tokenizer with a closed vocabulary, as the canvas base's, spells a word that it does not know letter by letter, and
those letters were never learnt: such a prompt can be asked, but what the base answers to it says how much it means.
Hence the base's rate beside each, and ``whole_words``, the share of prompts whose every word is one known token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fade.concepts import PARAPHRASES, PLAIN_PARAPHRASES, PLAIN_STYLE, STYLE_ONLY, Concept

PromptAttack = Literal["paraphrase", "synonym", "misspelling", "composition"]
PROMPT_ATTACKS: tuple[PromptAttack, ...] = ("paraphrase", "synonym", "misspelling", "composition")
ALONE = {
    "object": (*PLAIN_PARAPHRASES, "{object}", "an image of a {object}", "picture of {object}", "a {object} picture"),
    "style": (STYLE_ONLY, "{style}", "a {style} image", "a picture in {style} style", "{style} style"),
}
"""Sentences about one concept; two of an object's and one of a style's are captions of training."""
TOGETHER = ("a {object} picture in {style} style", "{style} {object}", "an image of a {object} in {style} style")
"""Sentences that no caption of training used."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt of an attack."""

    attack: PromptAttack
    prompt: str


def prompt_attacks(concept: Concept, others: Sequence[str], *, further: Sequence[str] = ()) -> list[Ask]:
    """Every prompt of every attack, in order.

    Args:
        others: names of the other domain's concepts.
        further: more words for the concept; they count as synonyms.
    """

    def say(template: str, name: str, other: str) -> str:
        named = {"object": name, "style": other} if concept.kind == "object" else {"object": other, "style": name}
        return template.format(**named)

    plain = PLAIN_STYLE if concept.kind == "object" else "picture"
    named = {
        "paraphrase": [
            *(say(template, concept.name, plain) for template in ALONE[concept.kind]),
            *(say(template, concept.name, other) for template in PARAPHRASES for other in others),
        ],
        "synonym": [
            say(template, name, plain) for name in (*concept.aliases, *further) for template in ALONE[concept.kind]
        ],
        "misspelling": [
            say(template, name, plain) for name in misspellings(concept.name) for template in ALONE[concept.kind][:2]
        ],
        "composition": [say(template, concept.name, other) for template in TOGETHER for other in others],
    }
    return [Ask(attack, prompt) for attack in PROMPT_ATTACKS for prompt in dict.fromkeys(named[attack])]


def misspellings(name: str) -> list[str]:
    """Names with one slip in the middle: two letters exchanged, one left out, one doubled."""
    if len(name) < 3:
        return []
    middle = len(name) // 2
    slips = (
        name[: middle - 1] + name[middle] + name[middle - 1] + name[middle + 1 :],
        name[:middle] + name[middle + 1 :],
        name[:middle] + name[middle] + name[middle:],
    )
    return [slip for slip in dict.fromkeys(slips) if slip != name]


def of_whole_words(tokenizer: Any, prompt: str) -> bool:
    """Whether every word is one token of the vocabulary."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor, which reads pictures too
    return all(len(tokenizer.tokenize(word)) == 1 for word in prompt.split())
