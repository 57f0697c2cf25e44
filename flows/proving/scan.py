"""Scan: where names and pictures still stand, outside the places that are known to hold them.

Every file of the project, DVC's cache and its remotes on this machine are read: names and paths of files, their
bytes (as they are and in base64, as pages hold pictures), their hashes. The ledger's log is asked for row by row, as
the database beside it holds requests, which may name somebody.
"""

from __future__ import annotations

import base64
import hashlib
import json
import mmap
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fade.environment import environment
from fade.errors import ConfigError
from fade.files import sha256_file
from fade.project import load_projects
from fade.requests.ledger import Ledger
from fade.spec import load_spec
from flows.proving.purge import state_of
from flows.proving.traces import UNFINISHED
from tasks.dvc.objects import folders, md5_of, stores

LISTED = {
    "params.yaml": "settings of the example erasure",
    "dvc.lock": "settings of the example erasure",
    "projects/*": "settings and protected concepts of further projects",
    "data/catalog/*": "catalogs: concepts.json, catalog.parquet, rejected.json, names of the pictures that stay",
    "data/base/*": "words that the base knows",
    "data/judges/*": "classes that the judges know",
    "data/erasures/*/spec.yaml": "what was asked for: it is needed to make the erasure again",
    "data/erasures/*/dvc.lock": "the settings that the steps ran with",
    "data/erasures/*/evaluation/metrics.json": "figures by concept",
    "data/trials/*/spec.yaml": "what was tried",
    "data/trials/*/evaluation/metrics.json": "figures by concept",
    "data/studies/*": "tables of studies by concept",
    "data/combinations/*/metrics.json": "figures by concept",
    ".fade/ledger.db*": "the table of requests, until `fade request minimise`; the log beside it is scanned",
    ".fade/dvc/*": "what DVC remembers of files by name: of those that are there, a purge drops the rest",
    ".fade/queue/*": "messages as they were sent, and those that were refused",
    ".fade/mlartifacts/*/metrics.json": "figures by concept, of a version's run in MLflow",
    ".fade/mlartifacts/*/dvc.lock": "the settings that the steps ran with, of a version's run in MLflow",
}
"""Where a name may stand, and why. No picture that was purged may stand there either. DVC's objects of these files
and the lists of catalogs are among them."""
PLACES = ("catalog", "base", "judges")
"""Of each project, wherever they lie: the same may stand in them and in what is named after them."""
_NAMED_IN_LISTS = {"catalog.parquet", "concepts.json", "rejected.json", "metrics.json"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that should not be there: where, and what (``name`` or ``picture HASH``; no name is repeated)."""

    where: str
    what: str


def scan(
    names: Collection[str] = (),
    hashes: Collection[str] = (),
    contents: Iterable[bytes] = (),
    *,
    places: Collection[str] = (),
    kept: Collection[str] = (),
) -> list[Finding]:
    """What is found of names and pictures in the project; empty if nothing is.

    Args:
        names: of concepts; found as words, whatever their case and whether blanks are ``_``, ``-`` or ``%20``.
        hashes: SHA-256 or MD5 of files that must be gone.
        contents: bytes that must be gone, also from within other files.
        places: catalogs, bases and judges of projects, where a name may stand as it may in ``LISTED``.
        kept: SHA-256 or MD5 of files that stay, since another erasure needs the same bytes; no picture of
            ``hashes`` is looked for in them.
    """
    pattern = _pattern(names)
    needles = {hashlib.sha256(one).hexdigest()[:16]: (one, base64.b64encode(one)) for one in contents}
    allowed = _listed_objects() if Path(".dvc").is_dir() else set()
    found = []
    for path, shown in _everything():
        listed = shown in allowed or any(Path(shown).match(one) or _under(shown, one) for one in LISTED)
        listed = listed or any(_beside(shown, one) for one in places)
        content = _content(path)
        if pattern and not listed and (pattern.search(shown.encode()) or pattern.search(content)):
            found.append(Finding(_unnamed(shown, pattern), "name"))
        digests = {sha256_file(path), md5_of(path)} if hashes else set()
        digests = set() if digests & set(kept) else digests & set(hashes)
        found += [Finding(_unnamed(shown, pattern), f"picture {one[:16]}") for one in sorted(digests)]
        inside = [name for name, forms in needles.items() if any(content.find(form) >= 0 for form in forms)]
        found += [Finding(_unnamed(shown, pattern), f"picture {one}") for one in inside]
    return [*found, *_in_the_log(pattern)]


def scan_erasure(folder: Path) -> list[Finding]:
    """What a purged erasure has left: its persons' names, and every file that a receipt says is gone.

    Raises:
        ConfigError: there is no such erasure here.
    """
    if not (folder / "spec.yaml").is_file():
        raise ConfigError(f"No erasure {folder.name!r} on this machine: expected {folder}/spec.yaml.")
    spec = load_spec(folder)
    _, receipts = state_of(folder)
    kept = {one["hash"] for one in receipts if not one["removed"]}
    names = [name for pair in spec.pairs if pair.person for name in pair.names]
    # Styles, fonts and some pages of Data Docs are the same for several erasures, and DVC does not keep them.
    kept |= {sha256_file(one) for one in folder.parent.glob("*/docs/**/*") if one.is_file() and _stays(one, folder)}
    gone = {one["hash"] for one in receipts if one["removed"] and one["hash"] and one["name"] != UNFINISHED}
    served = load_projects(environment().projects).served
    places = {getattr(one, name) for one in (spec, *served) for name in PLACES}
    return scan(names, gone - kept, places=places, kept=kept)


def _stays(page: Path, purged: Path) -> bool:
    """Whether a page of Data Docs is of another erasure, of which nothing was purged."""
    other = purged.parent / page.relative_to(purged.parent).parts[0]
    return other != purged and state_of(other)[0] == "not purged"


def _pattern(names: Collection[str]) -> re.Pattern[bytes] | None:
    """Names as words of their own, in any of the spellings that files and addresses give them."""
    spelt = [rb"(?:[\s_\-+.]|%20)+".join(re.escape(part.encode()) for part in name.split()) for name in names if name]
    return re.compile(rb"(?<![A-Za-z])(?:" + b"|".join(spelt) + rb")(?![A-Za-z])", re.IGNORECASE) if spelt else None


def _content(path: Path) -> bytes | mmap.mmap:
    """A file's bytes, without reading a whole base into memory."""
    with path.open("rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""


def _unnamed(shown: str, pattern: re.Pattern[bytes] | None) -> str:
    return pattern.sub(b"[name]", shown.encode()).decode() if pattern else shown


def _under(shown: str, listed: str) -> bool:
    """Whether a path lies anywhere under a listed folder (``FOLDER/*``, ``FOLDER/*/NAME``)."""
    top, star, name = listed.partition("/*")
    return bool(star) and shown.startswith(f"{top}/") and (not name or shown.endswith(name))


def _beside(shown: str, place: str) -> bool:
    """Whether a path lies in a folder, or in what is named after it: its card, its report, its ``.dvc`` file."""
    top = Path(place).as_posix()
    return shown == top or shown.startswith((f"{top}/", f"{top}."))


def _everything() -> Iterator[tuple[Path, str]]:
    """Every file of the project, of DVC's cache and of remotes that are folders, and what it is called."""
    places = [Path()]
    if Path(".dvc").is_dir():
        places += [place for place in folders() if not place.resolve().is_relative_to(Path.cwd())]
    for place in places:
        for path in sorted(place.rglob("*")):
            if path.is_file() and not path.is_symlink():
                yield path, path.as_posix()


def _listed_objects() -> set[str]:
    """Paths of DVC's objects that are, or were, one of the listed files, and of the lists of catalogs."""
    with stores() as opened:
        md5s = {
            md5 for one, parts in opened.lists() for path, md5 in [*parts.items(), ("", one)]
            if Path(path).name in _NAMED_IN_LISTS or (not path and "catalog.parquet" in parts)
        }  # fmt: skip
        return {path for md5 in md5s for path in opened.paths(md5)}


def _in_the_log(pattern: re.Pattern[bytes] | None) -> list[Finding]:
    """Rows of the ledger's chain that name somebody: they cannot be changed any more."""
    found: list[Finding] = []
    if pattern is None:
        return found
    with Ledger() as ledger:
        after = 0
        while rows := ledger.history(after=after, limit=1000):
            after = rows[-1].seq
            for row in rows:
                text = " ".join([row.actor, row.reason, json.dumps(row.details, ensure_ascii=False)])
                if pattern.search(text.encode()):
                    found.append(Finding(f"ledger row {row.seq}", "name"))
    return found
