"""Temporary folders of the project's own, under ``.fade/tmp``: what a program that was killed left there is found.

What is copied for a while (an audit's clone, a sheet on its way to a server) may be personal data. In the machine's
folder for temporary files nobody would look for it.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

TEMPORARY = Path(".fade/tmp")


@contextmanager
def temporary_folder(what: str) -> Iterator[Path]:
    """A new folder, readable by its owner alone; gone with the block.

    Args:
        what: the beginning of its name, for people; no name of a person.
    """
    TEMPORARY.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder = (TEMPORARY / f"{what}-{secrets.token_hex(6)}").resolve()
    with FileLock(f"{folder}.lock"):
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder)
            Path(f"{folder}.lock").unlink(missing_ok=True)


def abandoned() -> list[Path]:
    """Temporary folders, and files in their place, that no running program owns any more."""
    return [path for path in sorted(TEMPORARY.glob("*")) if path.suffix != ".lock" and _free(path)]


def _free(path: Path) -> bool:
    """Whether its lock can be had: the system gives back the locks of whoever was killed."""
    try:
        with FileLock(f"{path}.lock", timeout=0):
            return True
    except Timeout:
        return False


def remove_abandoned() -> int:
    """Remove what no running program owns; gives how many."""
    found = abandoned()
    for path in found:
        remove(path)
    return len(found)


def remove(path: Path) -> None:
    """Remove one of ``abandoned``, and its lock."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    Path(f"{path}.lock").unlink(missing_ok=True)
