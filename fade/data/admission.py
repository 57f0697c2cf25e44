"""Which pictures of a set may enter a catalog, by ids, names and captions alone, before any is decoded.

Names are brought to one spelling here: the catalog's, else the first that a set gives. A catalog that held *cat*
and *Cat* would keep the one in its retain set while the other is erased.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

from fade.concepts import PLAIN_STYLE
from fade.data.duplicates import NearDuplicates
from fade.data.sets import Item, PictureSet, Rejected
from fade.names import mention, name_key, spelling

RESERVED = frozenset({"auto", "nothing", "scrambled"})
"""What requests say for a surrogate and judges for mush: no concept can be asked for by these."""


@dataclass(slots=True)
class Admission:
    """What is remembered while a catalog is written: ids by hash, names by key, and counts.

    Attributes:
        concepts: entries of concepts.json by the key of their name.
        spelled: the spelling and the kind of every name by its key.
    """

    ids: set[int] = field(default_factory=set)
    deleted_hashes: set[str] = field(default_factory=set)
    deleted_pictures: NearDuplicates = field(default_factory=NearDuplicates)
    pairs: Counter[tuple[str, str]] = field(default_factory=Counter)
    groups: dict[str, str] = field(default_factory=dict)
    concepts: dict[str, dict[str, Any]] = field(default_factory=dict)
    spelled: dict[str, tuple[str, str]] = field(default_factory=lambda: {PLAIN_STYLE: (PLAIN_STYLE, "style")})
    rejected: list[dict[str, str]] = field(default_factory=list)
    earlier: dict[tuple[str, str], None] = field(default_factory=dict)
    rows: int = 0

    def knows(self, entries: Iterable[dict[str, Any]]) -> None:
        """Take over entries of concepts.json; those that are there already stay. An alias stands for its concept."""
        for entry in entries:
            key = name_key(entry["name"])
            self.concepts.setdefault(key, entry)
            self.spelled[key] = self.concepts[key]["name"], self.concepts[key]["kind"]
        for entry in self.concepts.values():
            for alias in entry["aliases"]:
                self.spelled.setdefault(name_key(alias), (entry["name"], entry["kind"]))

    def takes(self, image_id: str) -> None:
        """Mark an id as used."""
        self.ids.add(_short(image_id))

    def set_aside(self, name: str, reason: str) -> None:
        """Record a picture that is not taken in, with the reason."""
        readable = name.encode("utf-8", "backslashreplace").decode()
        self.rejected.append({"name": readable, "reason": reason})

    def report(self) -> list[dict[str, str]]:
        """All that was ever set aside, each once: what earlier intakes left out is still not in the catalog."""
        pairs = self.earlier | dict.fromkeys((entry["name"], entry["reason"]) for entry in self.rejected)
        return [{"name": name, "reason": reason} for name, reason in pairs]


def admitted(pictures: PictureSet, state: Admission) -> Iterator[Item]:
    """Items whose id, labels and caption are valid, in the catalog's spelling; the others are set aside."""
    for given in pictures.items:
        if isinstance(given, Rejected):
            state.set_aside(given.name, given.reason)
            continue
        item = _spelled(given, state)
        if reason := _wrong_words(item, pictures, state):
            state.set_aside(item.name, reason)
        else:
            for kind, name in (("object", item.object), ("style", item.style)):
                state.spelled.setdefault(name_key(name), (name, kind))
            state.takes(item.image_id)
            yield item


def _spelled(item: Item, state: Admission) -> Item:
    def name(given: str) -> str:
        return state.spelled.get(name_key(given), (spelling(given), ""))[0]

    said = None if item.caption is None else unicodedata.normalize("NFC", item.caption)
    image_id = unicodedata.normalize("NFC", item.image_id)
    return replace(item, image_id=image_id, object=name(item.object), style=name(item.style), caption=said)


def _wrong_words(item: Item, pictures: PictureSet, state: Admission) -> str:
    """Why an item's id, labels or caption are not valid; empty if they are."""
    parts = item.image_id.split("/")
    if not item.image_id or any(part in ("", ".", "..") for part in parts) or "\\" in item.image_id:
        return "its name leaves the folder or has an empty part; rename it"
    for what, value in (("name", item.image_id), ("object", item.object), ("style", item.style)):
        if wrong := _wrong_text(value):
            return f"its {what} {wrong}"
    for what, value in (("object", item.object), ("style", item.style)):
        if wrong := _wrong_name(what, value, pictures, state):
            return wrong
    if _short(item.image_id) in state.ids:
        return f"the id {item.image_id} is taken: every picture needs one of its own"
    return _wrong_caption(item, pictures, state)


def _wrong_text(value: str) -> str:
    if not value.strip():
        return "is empty"
    if not value.isprintable():
        return "is no readable text; rename it in UTF-8 without control characters"
    return "is longer than 200 bytes" if len(value.encode()) > 200 else ""


def _wrong_name(kind: str, name: str, pictures: PictureSet, state: Admission) -> str:
    key = name_key(name)
    if not key:
        return f"its {kind} holds nothing but hyphens and blanks; rename it"
    if key in RESERVED:
        return f"its {kind} is called {key!r}, which stands for something else in requests and judges; rename it"
    known = state.spelled.get(key, ("", kind))[1]
    if known != kind:
        shown = "" if pictures.person else f" {name!r}"
        return f"its {kind}{shown} is called as a {known} of the catalog: one name is one concept; rename it"
    return ""


def _wrong_caption(item: Item, pictures: PictureSet, state: Admission) -> str:
    if pictures.own_captions and not (item.caption or "").strip():
        return "has no caption"
    if item.caption is None:
        return ""
    aliases = state.concepts.get(name_key(item.object), {}).get("aliases", ())
    if re.search(mention(item.object, *aliases), item.caption) is None:
        # A report of persons does not say who they are.
        return "its caption does not mention its concept" + ("" if pictures.person else f" {item.object!r}")
    return ""


def _short(text: str) -> int:
    """64 bits that stand for an id, so that a million ids take tens of megabytes, not hundreds."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")
