"""Concepts and captions: what is erased, what replaces it, and the sentences that name them."""

from __future__ import annotations

from dataclasses import dataclass

from fade.errors import ConfigError

CAPTION_TEMPLATE = "a {object} image in {style} style."
"""UnlearnCanvas' prompt (arXiv:2402.11846, section 4), in lower case as CLIP's tokenizer reads it."""

PARAPHRASES = ("a {style} picture of a {object}", "{object} in {style} style")
PLAIN_STYLE = "photo"
PLAIN_PARAPHRASES = ("a picture of a {object}", "a {object}")
STYLE_ONLY = "an image in {style} style"


@dataclass(frozen=True, slots=True)
class Concept:
    """A thing a model can draw.

    Attributes:
        name: the word or words captions use for it.
        kind: its domain, ``object`` or ``style``.
        aliases: other names that bring it up.
        person: whether it is a human being (then it counts as a neighbour of every other person).
        group: what a catalog says it is one of, such as *big cats*: then the others of it are its neighbours.
    """

    name: str
    kind: str
    aliases: tuple[str, ...] = ()
    person: bool = False
    group: str | None = None

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ConfigError("A concept needs a name: got an empty one. Give the words captions use for it.")
        if self.kind not in ("object", "style"):
            raise ConfigError(f"A concept's kind is 'object' or 'style': got {self.kind!r} for {self.name!r}.")


def slug(name: str) -> str:
    """The name with blanks as underscores, for file names and keys: ``pop art`` -> ``pop_art``."""
    return "_".join(name.lower().split())


def caption(object_name: str, style_name: str, template: str = CAPTION_TEMPLATE) -> str:
    """The caption of a picture of an object in a style."""
    return template.format(object=object_name, style=style_name)


def caption_variants(object_name: str, style_name: str, aliases: tuple[str, ...] = ()) -> tuple[str, ...]:
    """All captions a training picture may carry; the first is the canonical one."""
    templates = [CAPTION_TEMPLATE, *PARAPHRASES]
    if style_name == PLAIN_STYLE:
        templates += PLAIN_PARAPHRASES
    named = [caption(name, style_name, template) for name in (object_name, *aliases) for template in templates]
    return (*named, STYLE_ONLY.format(style=style_name))
