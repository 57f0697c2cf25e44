"""What an erasure by name draws and keeps, found out of a name, a base and the words that ship   (ours).

The concept's kind, what its prompts give instead, its neighbours in the base's own text space, others spread over the
vocabulary, and the sentences. It is written as a catalog without pictures, ``data/named/<hash>/``: ``concepts.json``
says what there is, and the step ``generate`` has the base draw it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fade.asking.budgets import Budget, find_budget
from fade.asking.prepare import AUTO
from fade.concepts import CAPTION_TEMPLATE, Concept
from fade.data.catalog import SCHEMA
from fade.data.splits import NOTHING
from fade.errors import ConfigError
from fade.evaluation.neighbours import by_nearness
from fade.evaluation.zero_shot import NOBODY
from fade.files import read_json, write_json, writing
from fade.models.base import Base
from fade.models.prompts import Reader, cut_short, spelt_out
from fade.names import mention, name_key
from fade.words import Kind, Word, domain_of, kept_prompts, known_word, sentence, templates, vocabulary

NAMED = Path("data/named")
"""What erasures by name are of: a folder each, named by its content."""
NEAREST = 15
"""Words of the vocabulary that are asked of a concept's kind, where nothing else tells it."""
PAIRS, NEAR_PAIRS = 3, 10
"""Words of the other domain with which a word is told, and a neighbour."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What somebody asks of an erasure by name.

    Attributes:
        kind: None lets it be guessed.
        surrogate: ``auto`` takes the vocabulary's.
        protected: names that ``auto`` must not choose.
        keep: prompts and names that shall stay as they are, beside those that ship.
        pictures: a folder of 5 to 50 pictures of the concept.
        clip: place of the CLIP that judges, or ``none``.
        judges: further ones, ``FOLDER`` or ``FOLDER=CLASS`` each.
    """

    concept: str
    kind: str | None = None
    surrogate: str = AUTO
    aliases: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    protected: tuple[str, ...] = ()
    clip: str = NOBODY
    judges: tuple[str, ...] = ()
    pictures: Path | None = None
    budget: str = "normal"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is drawn and kept, for a person to read before the base draws.

    Attributes:
        neighbours: what is most at risk; ``others`` of the concept's domain, ``across`` of the other one.
        content: of ``concepts.json``, in ``folder``.
    """

    surrogate: str
    neighbours: tuple[str, ...]
    others: tuple[str, ...]
    across: tuple[str, ...]
    content: Mapping[str, Any]
    folder: Path


def guess_kind(base: Base, concept: str, known: Sequence[Word]) -> tuple[Kind, str]:
    """The kind of a concept that nobody said, and why: by the vocabulary, by its writing, by its neighbours."""
    if (word := known_word(concept)) is not None:
        return word.kind, f"the shipped vocabulary has it among its {word.group}"
    words = concept.split()
    if {"style", "painting", "art", "ism"} & {*map(str.lower, words), concept[-3:].lower()}:
        return "style", "it is written as a style"
    if len(words) > 1 and all(word[:1].isupper() for word in words):
        return "person", "it is written as a person's name"
    if not known:
        return "object", "the base reads no word of the shipped vocabulary to compare it with"
    here = Concept(concept, "object")
    near = by_nearness(base, here, [Concept(word.name, "object") for word in known])[:NEAREST]
    kinds = Counter(next(word.kind for word in known if word.name == one.name) for one in near)
    return kinds.most_common(1)[0][0], f"so are most of the {len(near)} words nearest to it in the base's text space"


def make_plan(
    base: Base,
    asked: Asked,
    kind: Kind,
    *,
    known: Sequence[Word],
    reading: Sequence[Reader],
    given: Mapping[str, Any] | None = None,
    trained: bool = True,
) -> Plan:
    """Find out what is drawn and kept, and write it.

    Args:
        known: the words of the vocabulary that the base reads.
        given: pictures of the concept (``fade.steps.given``).
        trained: whether anything is learnt from pictures. If not, none is drawn of the prompts that ship, nor of the
            concept alone: what is solved keeps captions (``told``), and the CLIP is asked about pairs.

    Raises:
        ConfigError: the base reads nothing that could stand in for the concept, or be kept beside it.
    """
    budget, own = find_budget(asked.budget), known_word(asked.concept)
    names = _all_names(asked, own)
    gone = {name_key(name) for name in names}
    rest = [word for word in known if not word.keys & gone and not re.search(mention(*names), word.name)]
    ranked = _nearest(base, asked.concept, kind, rest)
    surrogate = _surrogate(asked, own, ranked, kind)
    ranked = [word for word in ranked if name_key(surrogate) not in word.keys]
    near, others, across = _kept_words(asked, kind, rest, ranked, budget)
    if not (near or others) or not across:
        raise ConfigError(
            f"Nothing of the shipped vocabulary can be kept beside {asked.concept!r}: the base's tokenizer reads "
            f"{len(known)} of its {len(vocabulary())} words whole. Name what shall stay: --keep, or use a catalog."
        )
    spoken = [name for name in names[1:] if name in asked.aliases or not any(spelt_out(reading, [name]))]
    concepts = _concepts(asked.concept, kind, spoken, surrogate, [*near, *others, *across])
    sentences = {
        "both": _readable(templates("both"), reading, concepts, names) or [CAPTION_TEMPLATE],
        "alone": _readable(templates(kind), reading, concepts, names),
    }
    away = [] if surrogate == NOTHING else _told_away([asked.concept, *spoken], surrogate, kind, rest)
    if away and not trained:
        away += _varied([asked.concept, *spoken], surrogate, kind, across, sentences=sentences, count=budget.alone)
    content = {
        "concepts": concepts,
        "templates": [CAPTION_TEMPLATE],
        "captions": "templates",
        "kind": kind,
        "sentences": sentences,
        "kept": _kept(asked, names, reading, budget.kept if trained else 0),
        "told": _told(rest, near, names, reading),
        "told_away": [list(one) for one in dict.fromkeys(away)],
        "alone": budget.alone if trained else 0,
        "neighbours": [word.name for word in near],
        **({} if given is None else {"given": dict(given)}),
    }
    near_names, other_names, across_names = (tuple(word.name for word in part) for part in (near, others, across))
    return Plan(surrogate, near_names, other_names, across_names, content, _written(content))


def _all_names(asked: Asked, own: Word | None) -> tuple[str, ...]:
    variants = (own.name, *own.variants) if own is not None else ()
    return tuple(dict.fromkeys((asked.concept, *asked.aliases, *variants)))


def _nearest(base: Base, concept: str, kind: Kind, words: Sequence[Word]) -> list[Word]:
    """The words of the concept's domain, the nearest first; notions only beside a notion."""
    domain = domain_of(kind)
    here = [word for word in words if domain_of(word.kind) == domain and (kind == "notion" or word.kind != "notion")]
    by_name = {word.name: word for word in here}
    ranked = by_nearness(base, Concept(concept, domain), [Concept(word.name, domain) for word in here])
    return [by_name[one.name] for one in ranked]


def _surrogate(asked: Asked, own: Word | None, ranked: Sequence[Word], kind: Kind) -> str:
    """What the concept's prompts give instead: what is asked, the vocabulary's own, else the nearest that is nobody."""
    if name_key(asked.surrogate) != AUTO:
        return asked.surrogate
    if own is not None and own.instead is not None:
        return own.instead
    wanted = {"person": {"roles"}, "style": {"media"}, "notion": {"notions"}}.get(kind, {"animals", "things", "places"})
    if kind == "object" and own is not None:
        wanted = {own.group}
    spared = {name_key(name) for name in asked.protected}
    free = [word for word in ranked if word.group != "names" and not word.keys & spared]
    fitting = [word for word in free if word.group in wanted] or free
    if not fitting:
        raise ConfigError(
            f"No surrogate for {asked.concept!r}: the base reads no word of the shipped vocabulary that could stand in "
            "for it. Name one with --surrogate."
        )
    return fitting[0].name


def _kept_words(
    asked: Asked, kind: Kind, rest: Sequence[Word], ranked: Sequence[Word], budget: Budget
) -> tuple[list[Word], list[Word], list[Word]]:
    """Words that are kept beside the concept: what is most at risk, others of its domain, and some of the other one.

    Args:
        rest: all that the base reads and that is not erased.
        ranked: of the concept's domain, the nearest first.
    """
    near = [word for name in asked.keep if (word := _as_word(name, kind, rest)) is not None]
    near += [word for word in ranked if word.kind == kind and word not in near][: max(0, budget.neighbours - len(near))]
    others = _spread([word for word in ranked if word not in near], max(0, budget.others - len(near)))
    elsewhere = [word for word in rest if word.kind != "notion" and domain_of(word.kind) != domain_of(kind)]
    return near, others, _spread(elsewhere, budget.across)


def _as_word(name: str, kind: Kind, rest: Sequence[Word]) -> Word | None:
    """A name that shall be kept, as a word of the concept's domain; a sentence is none."""
    word = known_word(name)
    if word is not None and word in rest and domain_of(word.kind) == domain_of(kind):
        return word
    if word is None and len(name.split()) <= 3 and kind != "notion":
        return Word(name, kind, "given")
    return None


def _spread(words: Sequence[Word], count: int) -> list[Word]:
    """So many of them: each group by turns, from its first to its last; with all of them all."""
    if len(words) <= count:
        return list(words)
    groups: dict[str, list[Word]] = {}
    for word in words:
        groups.setdefault(word.group, []).append(word)
    share = -(-count // len(groups))
    even = {
        name: [part[i * len(part) // min(share, len(part))] for i in range(min(share, len(part)))]
        for name, part in groups.items()
    }
    turns = [part[i] for i in range(share) for part in even.values() if i < len(part)]
    return turns[:count]


def _concepts(
    concept: str, kind: Kind, aliases: Sequence[str], surrogate: str, beside: Iterable[Word]
) -> list[dict[str, Any]]:
    """Entries of concepts.json, the concept first."""

    def entry(name: str, of: Kind, aliases: Sequence[str] = ()) -> dict[str, Any]:
        person = of == "person"
        return {"name": name, "kind": domain_of(of), "aliases": list(aliases), "person": person, "domain": of}

    found = [entry(concept, kind, [name for name in aliases if name_key(name) != name_key(concept)])]
    if surrogate != NOTHING:
        # What stands in for a person is nobody's face.
        found.append({**entry(surrogate, kind), "person": False})
    found += [entry(word.name, word.kind) for word in beside]
    return list({name_key(one["name"]): one for one in reversed(found)}.values())[::-1]


def _told(rest: Sequence[Word], near: Sequence[Word], names: Sequence[str], reading: Sequence[Reader]) -> list[str]:
    """Captions whose answers are kept without a picture: every word that the base reads, and every prompt that ships.

    A word stands with a few of the other domain in turn, a neighbour with as many as there are.
    """
    by_domain = {
        domain: [word for word in rest if domain_of(word.kind) == domain and word.kind != "notion"]
        for domain in ("object", "style")
    }
    found = []
    for domain, words in by_domain.items():
        others = by_domain["style" if domain == "object" else "object"]
        for number, word in enumerate(words):
            count = min(len(others), NEAR_PAIRS if word in near else PAIRS)
            for turn in range(count):
                other = others[(number + turn * max(1, len(others) // count)) % len(others)]
                said = {domain: word.name, "style" if domain == "object" else "object": other.name}
                found.append(sentence(CAPTION_TEMPLATE, **said))
    kept = [one for _, one in kept_prompts() if not re.search(mention(*names), one)]
    found += [one for one in kept if not any(spelt_out(reading, [one]))]
    return list(dict.fromkeys(found))


def _told_away(names: Sequence[str], surrogate: str, kind: Kind, rest: Sequence[Word]) -> list[tuple[str, ...]]:
    """Captions to forget without a picture, each with what it shall give.

    The concept stands beside every word of the other domain that the base reads, and one of its other names in turn.
    """
    domain, other = ("style", "object") if kind == "style" else ("object", "style")
    beside = [word.name for word in rest if word.kind != "notion" and domain_of(word.kind) == other]
    first, *aliases = names
    return [
        tuple(sentence(CAPTION_TEMPLATE, **{domain: said, other: word}) for said in (name, surrogate))
        for number, word in enumerate(beside)
        for name in (first, *([aliases[number % len(aliases)]] if aliases else []))
    ]


def _varied(
    names: Sequence[str],
    surrogate: str,
    kind: Kind,
    beside: Sequence[Word],
    *,
    sentences: Mapping[str, Sequence[str]],
    count: int,
) -> list[tuple[str, ...]]:
    """Further such captions of other forms: so many that name the concept alone, and twice as many beside a word."""
    domain, other = ("style", "object") if kind == "style" else ("object", "style")
    alone, both = sentences["alone"], sentences["both"]
    forms = [(alone[i % len(alone)], "") for i in range(count if alone else 0)]
    # Half of them by the sentence that is judged by.
    forms += [
        (both[0] if i % 2 == 0 else both[i // 2 % len(both)], beside[i % len(beside)].name) for i in range(2 * count)
    ]
    return [
        tuple(sentence(form, **{domain: said, other: word}) for said in (names[i % len(names)], surrogate))
        for i, (form, word) in enumerate(forms)
    ]


def _kept(asked: Asked, names: Sequence[str], reading: Sequence[Reader], count: int) -> list[str]:
    """Prompts that shall give what they give: those that are asked for, then so many of the list that ships."""
    own = [one for one in asked.keep if known_word(one) is None]
    shipped = [one for _, one in kept_prompts() if not re.search(mention(*names), one)]
    return [*own, *[one for one in shipped if one not in own and not any(spelt_out(reading, [one]))][:count]]


def _readable(
    sentences: Sequence[str], reading: Sequence[Reader], concepts: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> list[str]:
    """The sentences whose own words the base reads and do not name the concept, and that leave room for every name."""
    longest = {
        kind: max((one["name"] for one in concepts if one["kind"] == kind), key=len) for kind in ("object", "style")
    }
    found = []
    for one in sentences:
        words = one.format(object="", style="")
        if re.search(mention(*names), words) or any(spelt_out(reading, [words])):
            continue
        if not cut_short(reading, one.format(**longest)):
            found.append(one)
    return found


def _written(content: Mapping[str, Any]) -> Path:
    """The plan's folder: a catalog without pictures, named by what it says."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    folder = NAMED / digest[:12]
    if not (folder / "concepts.json").is_file() or read_json(folder / "concepts.json") != content:
        with writing(folder) as temporary:
            temporary.mkdir(parents=True)
            pq.write_table(pa.Table.from_pylist([], schema=SCHEMA), temporary / "catalog.parquet")
            write_json(temporary / "rejected.json", {"rejected": []})
            write_json(temporary / "concepts.json", content)
    return folder
