"""Backup and restore: databases first, then the files they name, each with its hash; a restore repeats every purge.

A file that a database names is written before its row is, and never changed after: so databases are copied first,
and nothing need be stopped. Object stores (an S3 bucket of MLflow or DVC) have their own versions and copies; what
was purged is purged there by the replay as well.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy.engine import URL

from fade.environment import environment
from fade.errors import ConfigError, LineageError, ResourceError, listing
from fade.files import read_json, sha256_file, write_json, writing
from fade.requests.ledger import Ledger
from fade.requests.tables import ledger_url
from flows.proving.purge import purge as purge_erasure
from flows.proving.purge import purged_before
from flows.proving.traces import BEGUN_NAME, RECEIPTS_NAME
from flows.settings import ERASURES
from tasks.dvc.objects import cache_folder, recorded_paths
from tasks.mlflow import tracking

MANIFEST, VERSION = "backup.json", 1
SQLITE = (Path(".fade/mlflow.db"), Path(".fade/prefect/prefect.db"))
TREES = tuple(
    Path(name)
    for name in (
        ".fade/keys",
        ".fade/environment",
        ".fade/queue",
        ".fade/mlartifacts",
        ".dvc/config",
        "data/catalog",
        "data/erasures",
        "data/combinations",
        "data/release",
        "data/audits",
        "data/evidence",
        "params.yaml",
        "projects",
    )
)
"""What is copied as it is. Bases and judges are not: git, DVC or a hub holds them, and their hashes are recorded."""
CACHE = Path(".dvc/cache")
"""Where a backup has DVC's cache, wherever DVC keeps it."""
_IN_FORCE = {".fade/environment", "params.yaml", "projects"}
"""A restore does not overwrite these: they belong to the machine and the code, and lie in the backup to compare."""


@dataclass(frozen=True, slots=True)
class Backup:
    """A finished backup.

    Attributes:
        cache: where DVC's cache was found; of one outside the project, the objects of this project were copied.
        cached: how many of its files.
    """

    folder: str
    files: int
    bytes: int
    head: str
    cache: str
    cached: int


@dataclass(frozen=True, slots=True)
class Restored:
    """A finished restore: files, length and head of the ledger's chain, and erasures that were purged again."""

    files: int
    rows: int
    head: str
    purged: int


def backup(folder: Path, *, databases: Iterable[str] = ()) -> Backup:
    """Write a backup into a new folder, readable by its owner alone.

    Args:
        databases: further PostgreSQL databases, for instance MLflow's and Prefect's, as addresses.

    Raises:
        ConfigError: the folder is there and not empty.
        ResourceError: ``pg_dump`` is missing or failed.
        LineageError: the ledger's chain does not hold; a broken ledger is not backed up as if it were whole.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty: give a new folder, one for each backup.")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.chmod(0o700)
    with Ledger() as ledger:
        chain = ledger.verify()
    _dump_ledger(folder)
    for path in SQLITE:
        if path.is_file():
            _copy_sqlite(path, folder / "files" / path)
    for address in databases:
        url = ledger_url(address)
        _pg("pg_dump", url, "--format=custom", "--file", str(folder / f"database-{url.database}.dump"))
    for path in TREES:
        if path.is_dir():
            shutil.copytree(path, folder / "files" / path, symlinks=True)
        elif path.is_file():
            (folder / "files" / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, folder / "files" / path)
    cache = _copy_cache(folder / "files" / CACHE)
    hashes = {path.relative_to(folder).as_posix(): sha256_file(path) for path in _all_files(folder)}
    size = sum((folder / name).stat().st_size for name in hashes)
    write_json(
        folder / MANIFEST,
        {
            "version": VERSION,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "ledger": {"rows": chain.rows, "head": chain.head},
            "files": hashes,
        },
    )
    cached = sum(name.startswith(f"files/{CACHE.as_posix()}/") for name in hashes)
    return Backup(str(folder), len(hashes), size, chain.head, str(cache), cached)


def _copy_cache(to: Path) -> Path:
    """Copy DVC's cache into the backup; of one shared outside the project only this project's objects."""
    cache = cache_folder()
    if not cache.is_absolute():
        if cache.is_dir():
            shutil.copytree(cache, to, symlinks=True)
        return cache
    for path in recorded_paths():
        target = to / path.relative_to(cache)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    return cache


def _restore_cache(source: Path) -> None:
    """Copy DVC's cache from the backup to where DVC keeps it now; objects in a shared cache stay."""
    cache = cache_folder()
    if not source.is_dir():
        return
    if not cache.is_absolute():
        with writing(cache) as temporary:
            shutil.copytree(source, temporary, symlinks=True)
        return
    for path in _all_files(source):
        target = cache / path.relative_to(source)
        if not target.exists():
            with writing(target) as temporary:
                shutil.copy2(path, temporary)


def restore(
    folder: Path, *, force: bool = False, receipts: Path | None = None, databases: Iterable[str] = ()
) -> Restored:
    """Restore a backup, then repeat every purge, also those made after the backup.

    Args:
        force: replace state that is there.
        receipts: folder with newer ``*/purge.json``, if the machine that had them is lost.
        databases: where to restore the further databases to; matched by their names.

    Raises:
        ConfigError: it is no backup, or state lies here already and ``force`` is not given.
        LineageError: a file of the backup is damaged, or the restored chain does not end as recorded.
    """
    manifest = _checked(folder)
    there = [str(path) for path in _state() if path.exists()]
    if there and not force:
        raise ConfigError(f"State lies here already: {listing(there)}. Move it away, or replace it with --force.")
    kept = {
        Path(path.parent.name, path.name): path.read_bytes()
        for place in (ERASURES, receipts)
        for path in _receipts(place)
    }
    _restore_databases(folder, [ledger_url(address) for address in databases])
    for path in (*SQLITE, *TREES):
        source = folder / "files" / path
        if path.as_posix() in _IN_FORCE or not source.exists():
            continue
        with writing(path) as temporary:
            if source.is_dir():
                shutil.copytree(source, temporary, symlinks=True)
            else:
                shutil.copy2(source, temporary)
    _restore_cache(folder / "files" / CACHE)
    for name, content in kept.items():
        _keep_receipts(ERASURES / name, content)
    with Ledger() as ledger:
        chain = ledger.verify()
        if not ledger.ended_at(manifest["ledger"]["rows"], manifest["ledger"]["head"]):
            raise LineageError(
                f"The restored ledger ends at row {chain.rows} ({chain.head[:16]}); the backup recorded "
                f"{manifest['ledger']['rows']} ({manifest['ledger']['head'][:16]}). Restore again from another copy."
            )
        purged = _purge_again(ledger)
    return Restored(len(manifest["files"]), chain.rows, chain.head, purged)


def _purge_again(ledger: Ledger) -> int:
    found = purged_before()
    for name in found:
        purge_erasure(tracking.find_version(name), ERASURES / name, ledger)
    return len(found)


def _receipts(folder: Path | None) -> list[Path]:
    """Receipts of purges, and the intents of those that were cut off."""
    names = (RECEIPTS_NAME, BEGUN_NAME)
    return sorted(path for name in names for path in folder.glob(f"*/{name}")) if folder else []


def _keep_receipts(path: Path, content: bytes) -> None:
    """Write receipts unless longer ones are there: receipts only grow, so the longer file is the newer."""
    if not path.parent.is_dir() or (path.is_file() and path.stat().st_size >= len(content)):
        return
    with writing(path) as temporary:
        temporary.write_bytes(content)


def _state() -> list[Path]:
    url = ledger_url(environment().ledger_url)
    ledger = [Path(url.database)] if url.drivername == "sqlite" and url.database else []
    return [*ledger, *SQLITE, *(path for path in TREES if path.parts[0] == ".fade" and path.name != "environment")]


def _dump_ledger(folder: Path) -> None:
    url = ledger_url(environment().ledger_url)
    if url.drivername == "sqlite":
        _copy_sqlite(Path(url.database or ""), folder / "ledger.db")
    else:
        _pg("pg_dump", url, "--format=custom", "--file", str(folder / "ledger.dump"))


def _restore_databases(folder: Path, further: list[URL]) -> None:
    url = ledger_url(environment().ledger_url)
    name = "ledger.db" if url.drivername == "sqlite" else "ledger.dump"
    if not (folder / name).is_file():
        raise ConfigError(
            f"The backup's ledger is of another kind of database than FADE_LEDGER_URL ({url.drivername}). "
            "Restore into the kind it was made from."
        )
    if url.drivername == "sqlite":
        place = Path(url.database or "")
        for extra in ("-wal", "-shm"):
            place.with_name(place.name + extra).unlink(missing_ok=True)
        _copy_sqlite(folder / name, place)
    else:
        _pg_restore(url, folder / name)
    for one in further:
        dump = folder / f"database-{one.database}.dump"
        if not dump.is_file():
            raise ConfigError(f"The backup holds no database {one.database!r}: expected {dump.name} in {folder}.")
        _pg_restore(one, dump)


def _copy_sqlite(source: Path, target: Path) -> None:
    """A consistent copy, also while others write (SQLite's own backup)."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with writing(target) as temporary:
        temporary.touch(mode=0o600)  # the ledger holds names
        with closing(sqlite3.connect(source)) as read, closing(sqlite3.connect(temporary)) as written:
            read.backup(written)


def _pg_restore(url: URL, dump: Path) -> None:
    _pg("pg_restore", url, "--clean", "--if-exists", "--no-owner", "--single-transaction", str(dump))


def _pg(program: str, url: URL, *arguments: str) -> None:
    """One of PostgreSQL's own programs; the password goes by the environment, where no list of processes shows it."""
    if shutil.which(program) is None:
        raise ResourceError(f"{program} is not to be found. Install PostgreSQL's client, no older than the server.")
    where = URL.create("postgresql", url.username, None, url.host, url.port, url.database, url.query)
    secret = {"PGPASSWORD": str(url.password)} if url.password else {}
    command = [program, "--dbname", where.render_as_string(), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **secret})
    if done.returncode:
        raise ResourceError(f"{program} failed on {url.database}: {' / '.join(done.stderr.strip().splitlines()[:3])}")


def _checked(folder: Path) -> dict[str, Any]:
    if not (folder / MANIFEST).is_file():
        raise ConfigError(f"{folder} is no backup: it holds no {MANIFEST}. A backup that was cut off has none either.")
    manifest = read_json(folder / MANIFEST)
    if manifest.get("version") != VERSION:
        raise ConfigError(f"{folder} is a backup of version {manifest.get('version')}; this one knows {VERSION}.")
    there = {path.relative_to(folder).as_posix() for path in _all_files(folder)} - {MANIFEST}
    if there != set(manifest["files"]):
        raise LineageError(f"{folder}: missing or added: {listing(sorted(there ^ set(manifest['files'])))}.")
    damaged = [name for name, digest in manifest["files"].items() if sha256_file(folder / name) != digest]
    if damaged:
        raise LineageError(f"{folder}: changed since it was made: {listing(damaged)}. Take another copy.")
    return manifest


def _all_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
