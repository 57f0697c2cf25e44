"""Words that ship: what a model may know, sentences to draw with, and what it shall go on drawing.

Three text files in ``wordlists/``, all written for this project: ``vocabulary.txt`` (by group: roles, names, animals,
things, places, media, artists, notions), ``templates.txt`` and ``keep.txt``. A section begins with its name in
brackets; ``#`` begins a remark.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal, get_args

from fade.errors import ConfigError
from fade.names import name_key

Kind = Literal["style", "person", "object", "notion"]
KINDS: tuple[str, ...] = get_args(Kind)
SCENE, PLAIN = "(scene)", "(plain)"
"""In the place of an object where a sentence names a style alone, and of a style where it names an object alone."""
_AN = re.compile(r"(?!eu|ewe|once|one\b|ufo|uk|uni(?![dmn])|us[aeu]|ute|uto)[aeiou]|heir|honest|hono|hour")
"""Beginnings of words before which "a" is "an": vowels, but for those that are spoken otherwise, and a silent h."""


@dataclass(frozen=True, slots=True)
class Word:
    """A line of the vocabulary.

    Attributes:
        group: its section, e.g. ``animals``.
        variants: words that bring up the same.
        instead: what its prompts give instead, where the nearest of its group would not do.
    """

    name: str
    kind: Kind
    group: str
    variants: tuple[str, ...] = ()
    instead: str | None = None

    @property
    def keys(self) -> frozenset[str]:
        """All its spellings, as they are compared."""
        return frozenset(name_key(name) for name in (self.name, *self.variants))


def domain_of(kind: Kind) -> Literal["object", "style"]:
    """Which of a catalog's two domains a kind belongs to."""
    return "style" if kind == "style" else "object"


@cache
def vocabulary() -> tuple[Word, ...]:
    """Every word, in the file's order."""
    found = []
    for head, lines in _sections("vocabulary.txt").items():
        group, kind = head.split()
        for line in lines:
            named, _, instead = line.partition("->")
            name, _, variants = named.partition(":")
            others = tuple(one.strip() for one in variants.split(",") if one.strip())
            found.append(Word(name.strip(), as_kind(kind), group, others, instead.strip() or None))
    return tuple(found)


def known_word(name: str) -> Word | None:
    """The word of a name or of a variant, in any spelling."""
    key = name_key(name)
    by_name = next((word for word in vocabulary() if name_key(word.name) == key), None)
    return by_name or next((word for word in vocabulary() if key in word.keys), None)


@cache
def templates(section: str) -> tuple[str, ...]:
    """Sentences of a section: ``both``, or one of the kinds."""
    return tuple(_sections("templates.txt")[section])


@cache
def kept_prompts() -> tuple[tuple[str, str], ...]:
    """Section and prompt of what a base shall go on drawing as it does; the sections take turns."""
    sections = _sections("keep.txt")
    longest = max(map(len, sections.values()))
    return tuple((name, lines[i]) for i in range(longest) for name, lines in sections.items() if i < len(lines))


def sentence(template: str, *, object: str = "", style: str = "") -> str:
    """A template filled in: without the article before a proper name, ``an`` before a vowel."""
    said = template
    for field, name in (("{object}", object), ("{style}", style)):
        if name[:1].isupper():
            said = said.replace(f"a {field}", name).replace(f"the {field}", name).replace(f"my {field}", name)
        elif _AN.match(name):
            said = said.replace(f"a {field}", f"an {name}")
        said = said.replace(field, name)
    return said


def spoken(object_name: str, style_name: str, template: str) -> str:
    """What ``fade.concepts.caption`` says, with the articles of ``sentence``: as erasures by name are drawn and judged.

    The canvas' own captions, and UnlearnCanvas', say "a" before every name.
    """
    return sentence(template, object=object_name, style=style_name)


def _sections(name: str) -> dict[str, list[str]]:
    sections: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in (files("fade") / "wordlists" / name).read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if text.startswith("["):
            lines = sections.setdefault(text.strip("[]"), [])
        elif text and not text.startswith("#"):
            lines.append(text)
    return sections


def as_kind(name: str) -> Kind:
    """A kind by its name.

    Raises:
        ConfigError: there is none of this name.
    """
    for kind in get_args(Kind):
        if kind == name:
            return kind
    raise ConfigError(f"A concept's kind is one of {', '.join(KINDS)}: got {name!r}.")
