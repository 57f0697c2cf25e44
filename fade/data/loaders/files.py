"""Walking a folder of pictures that someone else made."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path

from fade.data.pictures import SUFFIXES
from fade.data.sets import Rejected
from fade.errors import DataError, listing

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(
        ("test", "testing", "eval", "evaluation", "val", "valid", "validation", "dev", "holdout"), "holdout"
    ),
}
"""What sets call their parts (as Hugging Face's loaders know them), and which split that is."""


def splits_of(names: Iterable[str]) -> dict[str, str]:
    """The split of each of a set's parts; none if all are ``train``: then the intake keeps some back as holdout."""
    found = {name: SPLITS[name.lower()] for name in names if name.lower() in SPLITS}
    return found if set(found.values()) != {"train"} else {}


IGNORED = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found"})
"""Folders that archivers, disks and systems add beside the pictures."""


def folder_of(path: Path, what: str) -> Path:
    """The folder itself.

    Raises:
        DataError: it is missing or a file.
    """
    if not path.is_dir():
        kind = "is a file" if path.exists() else "is missing"
        raise DataError(f"{path} {kind}: expected the folder {what}.")
    return path


def subfolders(folder: Path, what: str, *, least: int = 1) -> list[Path]:
    """The folders within, sorted, without hidden ones.

    Raises:
        DataError: there are fewer than ``least``.
    """
    found = sorted(path for path in folder.iterdir() if path.is_dir() and not is_added(path.name))
    if len(found) < least:
        present = listing(sorted(readable(path.name) for path in folder.iterdir())) or "nothing"
        raise DataError(f"{folder} holds no folders: expected {what}, found {present}.")
    return found


def loose_pictures(folder: Path) -> list[Path]:
    """Picture files right in a folder, not below it, in order."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def pictures_below(root: Path, folder: Path) -> Iterator[Path | Rejected]:
    """Picture files below a folder in order; set aside: other files, and links that leave ``root``."""
    inside = root.resolve()
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_added(name))
        for name in sorted(files):
            path = Path(place) / name
            shown = path.relative_to(root).as_posix()
            if name.startswith(".") or name == "Thumbs.db":
                continue
            if "\\" in name or not name.isprintable():
                yield Rejected(shown, "its name is not UTF-8, or holds control characters; rename it")
            elif path.suffix.lower() not in SUFFIXES:
                yield Rejected(shown, f"is no picture by its name: expected {', '.join(sorted(SUFFIXES))}")
            elif not _lies_in(path, inside):
                yield Rejected(shown, "is a link that leaves the folder or leads nowhere")
            else:
                yield path


def is_added(name: str) -> bool:
    """Whether a folder is hidden, or one that an archiver, a disk or a system added."""
    return name.startswith(".") or name in IGNORED


def _lies_in(path: Path, inside: Path) -> bool:
    try:
        return path.resolve(strict=True).is_relative_to(inside)
    except (OSError, RuntimeError):
        return False


def words(name: str) -> str:
    """A folder's name as words: ``Pop_Art`` -> ``pop art``."""
    return " ".join(name.replace("_", " ").replace("-", " ").lower().split())


def readable(name: str) -> str:
    """A name with undecodable bytes written out."""
    return name.encode("utf-8", "backslashreplace").decode()


def opaque(kind: str, name: str) -> str:
    """A reference that does not say a name: twelve hexadecimal digits of its hash."""
    return sha256(f"{kind}/{name}".encode("utf-8", "surrogateescape")).hexdigest()[:12]


def picture_id(root: Path, path: Path) -> str:
    """A file's id: its path below the root, with the suffix kept so that a.png and a.jpg differ."""
    relative = path.relative_to(root)
    stem, suffix = relative.with_suffix(""), relative.suffix.lower().removeprefix(".")
    return stem.as_posix() if suffix in ("jpg", "jpeg") else f"{stem.as_posix()}.{suffix}"
