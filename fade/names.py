"""Names as people write them: one key for all spellings of a name, and how a sentence mentions it.

``Roh_Moo-hyun``, ``roh moo hyun`` and ``ROH MOO\N{EN DASH}HYUN`` are one concept. Catalogs, requests, messages
and judges compare names by ``name_key`` alone; what is shown, and what captions say, is the spelling that was
given first.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

_APOSTROPHES = "'\N{LEFT SINGLE QUOTATION MARK}\N{RIGHT SINGLE QUOTATION MARK}\N{MODIFIER LETTER APOSTROPHE}`"
_MINUS = "\N{MINUS SIGN}"
_BETWEEN = rf"[\s_\-\u2010-\u2015{_MINUS}]+"
"""What may stand between the words of a name: blanks, underscores, hyphens and dashes."""


def spelling(name: str) -> str:
    """A name as it is shown: NFC, underscores as blanks, single blanks; case and hyphens as they were given."""
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").split())


@lru_cache(maxsize=4096)
def name_key(name: str) -> str:
    """Equal for all spellings of a name: without regard to case, blanks, hyphens, underscores and Unicode's forms.

    Accents and letters count: *Beyonce* is another name than *Beyoncé*. Empty for a name without anything else.
    """
    # Soft hyphens, joiners and marks of direction are not seen, so they tell no names apart.
    seen = "".join(letter for letter in name if unicodedata.category(letter) != "Cf")
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKD", seen).casefold())
    return " ".join("".join(_plain(letter) for letter in folded).split())


def _plain(letter: str) -> str:
    if letter in ("_", _MINUS) or unicodedata.category(letter) == "Pd":
        return " "
    return "'" if letter in _APOSTROPHES else letter


def respelled(names: Iterable[str], known: Iterable[str]) -> tuple[str, ...]:
    """Names as ``known`` spells them, where it has them; the others as they are."""
    spelled = {name_key(name): name for name in known}
    return tuple(spelled.get(name_key(name), name) for name in names)


@lru_cache(maxsize=4096)
def mention(*names: str) -> str:
    """A regular expression of one group that finds any of some names in a sentence, in any spelling.

    As whole words, also with the ending *s*, which stays outside the group: a concept's name gives way within
    *two cats* too. Scripts without blanks (Chinese, Japanese) and Korean, whose particles follow at once, have no
    whole words to look for.
    """
    longest_first = sorted(dict.fromkeys(names), key=len, reverse=True)
    return rf"(?i:({'|'.join(_as_written(name) for name in longest_first)}))"


def _as_written(name: str) -> str:
    parts = [part for part in re.split(_BETWEEN, spelling(name)) if part] or [name]
    apostrophe = f"[{_APOSTROPHES}]"
    words = [re.sub(apostrophe, apostrophe, re.escape(part)) for part in parts]
    before = "" if _wide(parts[0][0]) else r"(?<!\w)"
    after = "" if _wide(parts[-1][-1]) else r"(?=s?(?!\w))"
    return before + _BETWEEN.join(words) + after


def _wide(letter: str) -> bool:
    return unicodedata.east_asian_width(letter) in "WF"
