"""DVC's stores: what its cache and remotes hold, asked and removed object by object.

An object is a file under its MD5, or the list of a folder's files under theirs (``.dir``). Beside them lie the
entries of the run-cache, which say with which parameters a stage gave which outputs. DVC is asked where all of it
lies: a cache may be shared between projects, on another disk (``dvc cache dir``).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvc.exceptions import DvcException

from fade.errors import LineageError
from fade.files import load_yaml, read_yaml
from tasks.dvc.versioning import open_repo, read_lock

CACHE = "dvc cache"
_OBJECT = re.compile(r"[0-9a-f]{30}(\.dir)?")
_RUN = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Run:
    """An entry of a run-cache: which outputs a stage gave, by path and MD5. None of them: one that was cut off."""

    place: str
    path: str
    bytes: int
    outputs: dict[str, str]


class Stores:
    """The cache and every remote of the repository that is open.

    Names of places are ``dvc cache`` and ``dvc remote NAME``.
    """

    def __init__(self, repo: Any) -> None:
        self._runs = {CACHE: (repo.cache.local.fs, repo.stage_cache.cache_dir)}
        self._stores = {CACHE: repo.cache.local}
        self._cache = repo.cache.local_cache_dir
        for name in repo.config["remote"]:
            place, store = f"dvc remote {name}", repo.cloud.get_remote_odb(name)
            legacy = repo.cloud.get_remote_odb(name, hash_name="md5-dos2unix")
            self._stores[place] = store
            self._runs[place] = (legacy.fs, legacy.fs.join(legacy.path, "runs"))

    def places(self, md5: str) -> list[tuple[str, int]]:
        """Where an object is, and its bytes there."""
        return [
            (place, int(store.fs.size(store.oid_to_path(md5)) or 0))
            for place, store in self._stores.items()
            if store.exists(md5)
        ]

    def delete(self, md5: str, place: str) -> None:
        """Remove an object from one place; one that is gone is no error."""
        store = self._stores[place]
        if store.exists(md5):
            store.delete(md5)

    def paths(self, md5: str) -> list[str]:
        """Where an object's file is on this machine, seen from the project; the remotes elsewhere are left out."""
        there = [store.oid_to_path(md5) for store in self._stores.values() if store.fs.protocol == "local"]
        return [_seen(Path(path)).as_posix() for path in there]

    def cached(self, md5: str) -> Path:
        """Where the cache has an object, or would have it."""
        return Path(self._stores[CACHE].oid_to_path(md5))

    def folders(self) -> list[Path]:
        """The cache and the remotes that are folders of this machine."""
        local = [store.path for store in self._stores.values() if store.fs.protocol == "local"]
        return [Path(self._cache), *(Path(path) for path in local)]

    def read(self, md5: str) -> bytes | None:
        """An object's bytes, from the first place that has it."""
        for store in self._stores.values():
            if store.exists(md5):
                content: bytes = store.fs.cat_file(store.oid_to_path(md5))
                return content
        return None

    def parts(self, md5: str) -> dict[str, str]:
        """Path and MD5 of the files that a folder's list names; empty if the list is nowhere."""
        content = self.read(md5) if md5.endswith(".dir") else None
        return {one["relpath"]: one["md5"] for one in json.loads(content)} if content else {}

    def lists(self) -> Iterator[tuple[str, dict[str, str]]]:
        """Every list of a folder that the cache holds: its MD5, and what it names."""
        for path in sorted(Path(self._stores[CACHE].path).glob("??/*.dir")):
            md5 = path.parent.name + path.name
            yield md5, self.parts(md5)

    def runs(self) -> Iterator[Run]:
        """Every entry of the run-caches."""
        for place, (fs, folder) in self._runs.items():
            for path in sorted(fs.find(folder)) if fs.exists(folder) else ():
                content = load_yaml(fs.cat_file(path)) if _RUN.fullmatch(fs.name(path)) else None
                outputs = content.get("outs", []) if isinstance(content, dict) else []
                found = {one["path"]: one["md5"] for one in outputs if "md5" in one}
                yield Run(place, path, int(fs.size(path) or 0), found)

    def delete_run(self, run: Run) -> None:
        """Remove an entry of a run-cache, and its folder once that is empty."""
        fs, _ = self._runs[run.place]
        if fs.exists(run.path):
            fs.remove(run.path)
        if run.place == CACHE and (folder := Path(run.path).parent).is_dir() and not any(folder.iterdir()):
            folder.rmdir()

    def unfinished(self) -> list[Path]:
        """Files of the cache that are no object: whoever copied them in was killed. Nobody else is at work now."""
        objects = (path for path in Path(self._stores[CACHE].path).glob("??/*") if path.is_file())
        return sorted(path for path in objects if not _OBJECT.fullmatch(path.name))


@contextmanager
def stores() -> Iterator[Stores]:
    """The project's stores, while nobody else works with DVC in it.

    Raises:
        LineageError: a remote cannot be reached.
    """
    with open_repo() as repo:
        try:
            yield Stores(repo)
        except DvcException as error:
            raise LineageError(f"DVC refuses: {error}. See `dvc remote list` and the credentials.") from error


def _seen(path: Path) -> Path:
    return path.resolve().relative_to(Path.cwd()) if path.resolve().is_relative_to(Path.cwd()) else path


def folders() -> list[Path]:
    """Folders of this machine that DVC keeps objects in: its cache, and remotes that are folders."""
    with stores() as opened:
        found = opened.folders()
    return [one for one in found if not any(one != other and one.is_relative_to(other) for other in found)]


def cache_folder() -> Path:
    """Where DVC's cache lies: in the project, or where ``dvc cache dir`` put it; its usual place without a project."""
    if not Path(".dvc/config").is_file():
        return Path(".dvc/cache")
    with open_repo() as repo:
        return _seen(Path(repo.cache.local_cache_dir))


def pointers() -> list[Path]:
    """The ``.dvc`` files of the project's data: ``data/NAME.dvc``, ``data/catalog/NAME.dvc``."""
    data = Path("data")
    return sorted(path for pattern in ("*.dvc", "*/*.dvc") for path in data.glob(pattern) if path.is_file())


def recorded_paths() -> list[Path]:
    """Files of the cache that this project's lock and ``.dvc`` files name, in a cache that others may share."""
    locks = [Path("dvc.lock"), *Path("data").glob("*/*/dvc.lock")]
    named = [out for path in locks for stage in read_lock(path).values() for out in stage.get("outs", [])]
    named += [out for path in pointers() for out in read_yaml(path).get("outs", [])]
    with stores() as opened:
        md5s = {out["md5"] for out in named if "md5" in out}
        md5s |= {md5 for one in list(md5s) for md5 in opened.parts(one).values()}
        return sorted(path for md5 in md5s if (path := opened.cached(md5)).is_file())


def objects_of(
    stages: Iterable[dict[str, Any]], found: Stores, folder: str, output: str, only: tuple[str, ...] = ()
) -> set[str]:
    """MD5 of the objects that an output of an erasure consists of, as some recorded stages name it.

    Args:
        folder: the erasure's, as lock files name it.
        only: of a folder, these files and folders alone; all of them, and the folder's own list, if empty.
    """
    named = {out["md5"] for stage in stages for out in stage.get("outs", []) if out["path"] == f"{folder}/{output}"}
    parts = {md5 for one in named for path, md5 in found.parts(one).items() if not only or is_part(path, only)}
    return parts if only else parts | named


def is_part(path: str, parts: Iterable[str]) -> bool:
    """Whether a path is one of these, or lies in one."""
    return any(Path(path).is_relative_to(part) for part in parts)


def md5_of(path: Path) -> str:
    """A file's hash as DVC records it."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
