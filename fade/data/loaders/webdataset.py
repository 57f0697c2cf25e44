"""WebDataset: tar files whose members ``key.jpg``, ``key.json``, ``key.txt``, ``key.cls`` make one picture.

Nothing is unpacked: members are read from the stream, one sample at a time.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fade.concepts import PLAIN_STYLE
from fade.data.loaders.files import words
from fade.data.pictures import MAX_BYTES, SUFFIXES
from fade.data.sets import Item, PictureSet, Rejected
from fade.errors import DataError


def webdataset(root: Path) -> PictureSet:
    """One tar file, or all of a folder. What a picture shows is ``object`` or ``label`` in its json, else its ``cls``.

    Raises:
        DataError: there is no tar file, or one is damaged.
    """
    shards = [root] if root.is_file() else sorted(root.glob("*.tar"))
    if not shards:
        raise DataError(f"{root} holds no tar files: expected a shard such as {root / '000000.tar'}.")
    return PictureSet(_items(shards), root.name)


def _items(shards: list[Path]) -> Iterator[Item | Rejected]:
    for shard in shards:
        try:
            with tarfile.open(shard, "r|*") as archive:
                for key, sample in _samples(archive):
                    yield _item(shard, key, sample)
        except (tarfile.TarError, EOFError, OSError) as error:
            raise DataError(f"{shard} is no whole tar file ({error}). Fetch it again.") from None


def _samples(archive: tarfile.TarFile) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Members with equal key, which stand next to each other."""
    key, sample = "", dict[str, bytes]()
    for member in archive:
        if not member.isfile():
            continue
        place, _, name = member.name.rpartition("/")
        stem, _, suffix = name.partition(".")
        own = f"{place}/{stem}" if place else stem
        if own != key and sample:
            yield key, sample
            sample = {}
        key = own
        stream = archive.extractfile(member) if member.size <= MAX_BYTES else None
        sample["." + suffix.lower()] = stream.read() if stream is not None else b""
    if sample:
        yield key, sample


def _item(shard: Path, key: str, sample: dict[str, bytes]) -> Item | Rejected:
    name = f"{shard.name}/{key}"
    found = [suffix for suffix in sample if suffix in SUFFIXES]
    if len(found) != 1:
        return Rejected(name, f"has {len(found)} pictures: expected one beside its json, txt or cls")
    try:
        told: dict[str, Any] = json.loads(sample[".json"]) if ".json" in sample else {}
        label = sample[".cls"].decode() if ".cls" in sample else ""
        caption = sample[".txt"].decode().strip() if ".txt" in sample else None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        return Rejected(name, f"its text cannot be read ({error})")
    if not isinstance(told, dict):
        return Rejected(name, f"its json holds {type(told).__name__}, expected an object")
    shown = str(told.get("object") or told.get("label") or label).strip()
    if not shown:
        return Rejected(name, "has no label: expected object or label in its json, or a cls")
    style = words(str(told.get("style") or PLAIN_STYLE))
    return Item(f"{shard.stem}/{key}", name, sample[found[0]], words(shown), style, caption=caption)
