"""WebDataset: tar files whose members ``key.jpg``, ``key.json``, ``key.txt``, ``key.cls`` make one picture.

Nothing is unpacked: members are read from the stream, one sample at a time. A key ends at the first dot of a
member's name, and the members of one key stand next to each other, as ``tar --sort=name`` packs them.
"""

from __future__ import annotations

import json
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Self

from fade.concepts import PLAIN_STYLE
from fade.data.loaders.files import IGNORED, splits_of, words
from fade.data.pictures import MAX_BYTES, SUFFIXES
from fade.data.sets import Item, PictureSet, Rejected
from fade.errors import DataError, listing

_ENDINGS = (".tar", ".tar.gz", ".tgz")


class _Member(tarfile.TarInfo):
    """A member whose damaged header is an error: ``tarfile`` takes it for the end, and drops what follows unsaid."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if isinstance(error, tarfile.EOFHeaderError):  # type: ignore[attr-defined]  # the mark at the end
                raise
            raise tarfile.ReadError(str(error)) from None


def webdataset(root: Path) -> PictureSet:
    """One tar file, or all below a folder.

    What a picture shows is ``object`` or ``label`` in its json, else its ``cls``. Of a damaged shard the pictures
    before the damage are read. Shards in folders called ``train``, ``test`` ... are of that split.

    Raises:
        DataError: there is no tar file.
    """
    if root.is_file():
        return PictureSet(_items(root.parent, [root]), root.name)
    found = sorted(path for path in root.rglob("*") if path.name.endswith(_ENDINGS) and path.is_file())
    shards = [path for path in found if not _hidden(PurePosixPath(path.relative_to(root)))]
    if not shards:
        raise DataError(f"{root} holds no tar files: expected a shard such as {root / '000000.tar'}.")
    return PictureSet(_items(root, shards), root.name)


def _hidden(path: PurePosixPath) -> bool:
    """Whether a name is no member of the set: ``._0.jpg`` beside ``0.jpg`` is what a Mac adds."""
    return any((part.startswith(".") and part != "..") or part in IGNORED for part in path.parts)


def _items(root: Path, shards: list[Path]) -> Iterator[Item | Rejected]:
    splits = splits_of({part for shard in shards for part in shard.relative_to(root).parts[:-1]})
    for shard in shards:
        shown = PurePosixPath(shard.relative_to(root))
        split = next((splits[part] for part in shown.parts[:-1] if part in splits), None)
        place = shown.as_posix()
        for ending in (".gz", ".tgz", ".tar"):
            place = place.removesuffix(ending)
        read = 0
        try:
            with tarfile.open(shard, "r|*", tarinfo=_Member) as archive:
                for key, sample, wrong in _samples(archive):
                    name = f"{shown}/{key}"
                    yield Rejected(name, wrong) if wrong else _item(f"{place}/{key}", name, sample, split)
                    read += 1
                _check_end(archive)
        except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            lost = f"what follows its first {read} samples is lost. Fetch it again, and add it"
            yield Rejected(shown.as_posix(), f"is no whole tar file ({error}): {lost}")


def _check_end(archive: tarfile.TarFile) -> None:
    """Nothing but zeros may follow the mark at the end: a hole in a file looks like that mark."""
    stream: Any = archive.fileobj
    while rest := stream.read(2**16):
        if rest.strip(b"\0"):
            raise tarfile.ReadError("there is more after its end: a hole, or several files in one")


def _samples(archive: tarfile.TarFile) -> Iterator[tuple[str, dict[str, bytes], str]]:
    """Members with equal key, which stand next to each other, and what is wrong with them."""
    key, sample, wrong = "", dict[str, bytes](), ""
    for member in archive:
        archive.members.clear()  # type: ignore[attr-defined]  # each is remembered, and there may be millions
        path = PurePosixPath(member.name)
        if member.isdir() or _hidden(path):
            continue
        stem, _, suffix = path.name.partition(".")
        own = path.with_name(stem).as_posix() if stem else path.as_posix()
        if own != key and (sample or wrong):
            yield key, sample, wrong
            sample, wrong = {}, ""
        key, suffix = own, "." + suffix.lower()
        if suffix in sample:
            wrong = f"has two members {suffix}: which of them is meant cannot be told"
        elif not member.isfile():
            wrong = f"its member {suffix} is a link or no file; pack what it leads to (tar --hard-dereference)"
        elif member.size > MAX_BYTES:
            wrong = f"its member {suffix} has {member.size} bytes; at most {MAX_BYTES} are read"
        else:
            stream = archive.extractfile(member)
            sample[suffix] = stream.read() if stream is not None else b""
    if sample or wrong:
        yield key, sample, wrong


def _item(image_id: str, name: str, sample: dict[str, bytes], split: str | None) -> Item | Rejected:
    found = [suffix for suffix in sample if suffix in SUFFIXES]
    if len(found) != 1:
        return Rejected(
            name,
            f"has {len(found)} pictures and the members {listing(sample)}: expected one picture, next to its json, txt "
            "or cls (tar --sort=name); a key ends at the first dot",
        )
    try:
        told: dict[str, Any] = json.loads(sample[".json"]) if ".json" in sample else {}
        label = sample[".cls"].decode() if ".cls" in sample else ""
        caption = sample[".txt"].decode().strip() if ".txt" in sample else None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        return Rejected(name, f"its text cannot be read ({error})")
    if not isinstance(told, dict):
        return Rejected(name, f"its json holds {type(told).__name__}, expected an object")
    # Zero is a label: the first class of sets that number theirs.
    given = [one for one in (told.get("object"), told.get("label"), label) if one is not None and str(one).strip()]
    if not given:
        return Rejected(name, "has no label: expected object or label in its json, or a cls next to it")
    if isinstance(given[0], dict | list):
        return Rejected(
            name, f"its label is {type(given[0]).__name__}, expected a word: every picture shows one subject"
        )
    style = told.get("style")
    named = PLAIN_STYLE if style is None or not str(style).strip() else words(str(style))
    return Item(image_id, name, sample[found[0]], words(str(given[0])), named, split=split, caption=caption)
