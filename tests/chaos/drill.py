"""Restore drill: back up, purge, destroy, restore; what was purged stays purged, the rest is audited.

    python -m tests.chaos.drill FOLDER [--ledger postgresql+psycopg://HOST/NAME]

Takes an empty folder, makes a project with a tiny base there, and needs some minutes. Run it from a clean checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from fade.files import sha256_file
from fade.lineage import ROOT
from tests.tiny import make_workspace

LOST = (".fade", ".dvc/cache", "data/erasures", "data/catalog", "data/release", "data/combinations", "data/evidence")


def fade(folder: Path, *arguments: str) -> dict[str, object]:
    """A command as a user gives it, and its figures."""
    figures = folder.parent / "figures.json"
    figures.unlink(missing_ok=True)
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli.app", *arguments, "--json", str(figures)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "FADE_ROOT": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    print(f"{time.perf_counter() - begun:6.1f} s  fade {' '.join(arguments)}  -> {done.returncode}", flush=True)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
    content: dict[str, object] = json.loads(figures.read_text()) if figures.is_file() else {}
    return content


def destroy(folder: Path) -> None:
    """What a lost disk takes."""
    for name in LOST:
        shutil.rmtree(folder / name, ignore_errors=True)


def hashes(folder: Path) -> set[str]:
    """SHA-256 of every file of the project."""
    return {sha256_file(path) for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}


def main() -> None:
    """The drill."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ledger", help="FADE_LEDGER_URL; SQLite if left out")
    given = parser.parse_args()
    if given.ledger:
        os.environ["FADE_LEDGER_URL"] = given.ledger
    folder, copy, receipts = (given.folder.resolve() / name for name in ("project", "backup", "receipts"))
    make_workspace(folder)
    purged = Path(str(fade(folder, "erase", "--concept", "cat", "--surrogate", "horse")["folder"])).name
    kept = Path(str(fade(folder, "erase", "--concept", "coffee", "--surrogate", "rocket")["folder"])).name
    for name in (purged, kept):
        fade(folder, "approve", name)
    made = fade(folder, "backup", str(copy))
    print(f"backup: {made['files']} files, {int(str(made['bytes'])) / 1e6:.1f} MB")
    before = hashes(folder)
    fade(folder, "purge", purged)
    gone = before - hashes(folder)
    shutil.copytree(
        folder / "data/erasures" / purged, receipts / purged, ignore=lambda _, names: {*names} - {"purge.json"}
    )
    listed = json.loads((receipts / purged / "purge.json").read_text())["payload"]["receipts"]
    removed = {one["hash"] for one in listed if one["removed"] and len(one["hash"]) == 64} & gone
    if not removed:
        sys.exit("Nothing was purged: the drill would show nothing.")
    destroy(folder)
    restored = fade(folder, "restore", str(copy), "--receipts", str(receipts))
    back = removed & hashes(folder)
    print(f"restored: {restored['files']} files, {restored['rows']} rows, purged again: {restored['purged']}")
    print(f"of {len(removed)} purged contents {len(back)} are back")
    if back or restored["purged"] != 1:
        sys.exit("FAILED: purged data came back.")
    fade(folder, "ledger", "verify")
    report = fade(folder, "audit", kept)
    print(f"audit of {kept}: {report['compared']} hashes compared, {report['different']} differ")
    print("The drill passed.")


if __name__ == "__main__":
    main()
