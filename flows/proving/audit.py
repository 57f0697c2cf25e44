"""Audit: an erasure made again from the recorded commit in a clean clone, every hash compared.

The recorded ``dvc.yaml`` and ``dvc.lock``, the request and the data they name are copied into a clone of the
code at the recorded commit, ``dvc repro --force --no-run-cache`` runs there, and the new lock file is held
against the recorded one. On the same kind of machine all is equal, bit for bit; elsewhere the report says
what differs, and by how much.

A catalog lives on: pictures are added, and those of other requests deleted. The splits that it gave then can
no longer be drawn from it. They, and what was said of them, are then taken as recorded: held against their hashes,
and each of their pictures against its own; all that is learnt from them is made again.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from safetensors.torch import load_file

from fade.errors import LineageError, ResourceError
from fade.files import sha256_file, write_json, writing
from fade.lineage import ROOT
from fade.pipeline import CATALOG_TABLE, STEPS
from fade.spec import load_spec
from fade.temporary import remove_abandoned, temporary_folder
from tasks.dvc import versioning
from tasks.mlflow import tracking
from tasks.mlflow.tracking import AdapterVersion

AUDITS = Path("data/audits")


def audit(version: AdapterVersion, folder: Path) -> dict[str, Any]:
    """Make the erasure again, and write ``data/audits/<id>/report.json`` and ``report.md``; gives the report.

    Raises:
        LineageError: no commit was recorded, the code at that commit does not run to the end, or the catalog has
            changed since and a picture that was learnt from is not there as it was.
        ResourceError: git cannot give the commit.
    """
    tags = tracking.run_tags(version)
    commit = tags.get("git.commit", "unknown")
    if commit == "unknown":
        raise LineageError(f"{version.model} was made outside a git checkout: no commit to go back to was recorded.")
    changed = _changed_since(folder)
    as_recorded = _of_the_catalog() if changed else []
    if changed:
        _check_pictures(folder)
    remove_abandoned()  # the clones, with pictures in them, of audits that were killed
    with temporary_folder("audit") as place:
        clone = place / "clone"
        _git("clone", "--quiet", "--no-checkout", str(_repository()), str(clone))
        _git("-C", str(clone), "checkout", "--quiet", commit)
        _lay_in(clone, folder, as_recorded)
        _repeat(clone, folder, as_recorded)
        recorded, made = _hashes(folder / "dvc.lock"), _hashes(clone / folder / "dvc.lock")
        # What was not made again: its hash as it is here, not the one that the copied lock file still holds.
        kept = [out["path"] for name in as_recorded for out in _stages(folder).get(name, {}).get("outs", [])]
        made |= {path: str(versioning.hash_of(Path(path))) for path in (*changed, *kept)}
        rows = [
            {
                "path": path,
                "recorded": recorded.get(path),
                "made": made.get(path),
                "equal": recorded.get(path) == made.get(path),
                **_difference(path, Path(), clone, equal=recorded.get(path) == made.get(path)),
            }
            for path in sorted({*recorded, *made})
        ]
    report = {
        "erasure": folder.name,
        "version": f"{version.model}/{version.version}",
        "adapter_sha256": version.adapter_sha256,
        "commit": commit,
        "commit_holds_all_the_code": tags.get("git.dirty") == "false",
        "libraries": {name.removeprefix("library."): tag for name, tag in tags.items() if name.startswith("library.")},
        "taken_as_recorded": as_recorded,
        "catalog_changed": changed,
        "compared": len(rows) - len(changed),
        "different": sum(not row["equal"] and row["path"] not in changed for row in rows),
        "equal": all(row["equal"] or row["path"] in changed for row in rows),
        "rows": rows,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(AUDITS / folder.name / "report.json", report)
    with writing(AUDITS / folder.name / "report.md") as temporary:
        temporary.write_text(_page(report), encoding="utf-8")
    return report


def _repository() -> Path:
    if not (ROOT / ".git").exists():
        raise ResourceError(f"{ROOT} is no git checkout: an audit needs the repository that the code came from.")
    return ROOT


def _git(*arguments: str) -> None:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ResourceError(f"git {arguments[0]} failed: {done.stderr.strip()}")


def _prefix() -> str:
    """How a project beside the code names the code in its lock files; empty where they are one."""
    found = Path(os.path.relpath(ROOT, Path.cwd())).as_posix()
    return "" if found == "." else found + "/"


def _stages(folder: Path) -> dict[str, dict[str, Any]]:
    """What the erasure's ``dvc.lock`` records, by stage."""
    return versioning.read_lock(folder / "dvc.lock")


def _of_the_catalog() -> list[str]:
    """The steps whose outputs depend on more of the catalog than on the erasure's own pictures."""
    return [step.name for step in STEPS if CATALOG_TABLE in step.inputs]


def _changed_since(folder: Path) -> list[str]:
    """The catalog's parts that the splits were drawn from and that are no longer as recorded."""
    catalog, stages = Path(load_spec(folder).catalog), _stages(folder)
    recorded = {dep["path"]: dep["md5"] for name in _of_the_catalog() for dep in stages.get(name, {}).get("deps", [])}
    return [
        path
        for path, md5 in recorded.items()
        if Path(path).is_relative_to(catalog) and versioning.hash_of(Path(path)) != md5
    ]


def _check_pictures(folder: Path) -> None:
    catalog = load_spec(folder).picture_catalog(folder)
    for split in sorted((folder / "splits").glob("*.parquet")):
        table = pd.read_parquet(split)
        for path, digest in zip(table.get("path", ()), table.get("sha256", ()), strict=True):
            found = sha256_file(catalog / path) if (catalog / path).is_file() else "none"
            if found != digest:
                raise LineageError(
                    f"The catalog has changed since, and picture {digest[:16]} of {split.name} is "
                    f"{'gone' if found == 'none' else 'another'}: the erasure cannot be made again. Fetch the catalog "
                    "as it was (`fade data pull`), or audit before data is purged."
                )


def _lay_in(clone: Path, folder: Path, as_recorded: Sequence[str]) -> None:
    """Copy the erasure's records and the data they name into the clone, under the names they have here."""
    (clone / folder).mkdir(parents=True, exist_ok=True)
    # What all erasures share is held against its hash, not made again: the base alone takes hours.
    (clone / "dvc.yaml").write_text("stages: {}\n", encoding="utf-8")
    for name in ("dvc.yaml", "dvc.lock", "spec.yaml"):
        text = (folder / name).read_text(encoding="utf-8")
        (clone / folder / name).write_text(text.replace(_prefix(), "") if _prefix() else text, encoding="utf-8")
    if (folder / "foreign").exists():
        shutil.copytree(folder / "foreign", clone / folder / "foreign", dirs_exist_ok=True)
    stages = _stages(folder)
    made = {out["path"] for name, stage in stages.items() if name not in as_recorded for out in stage.get("outs", [])}
    for path in sorted({dep["path"] for stage in stages.values() for dep in stage.get("deps", [])} - made):
        if path.endswith(".py") or not Path(path).exists():
            continue
        if Path(path).is_dir():
            shutil.rmtree(clone / path, ignore_errors=True)
            shutil.copytree(path, clone / path)
        else:
            (clone / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, clone / path)


def _repeat(clone: Path, folder: Path, as_recorded: Sequence[str]) -> None:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("FADE_ROOT", "MLFLOW_TRACKING_URI")
    }
    environment |= {"PYTHONPATH": str(clone), "DVC_NO_ANALYTICS": "1"}
    # What the steps and DVC put aside goes with the clone, also where this program is killed.
    aside = clone.with_name("aside")
    aside.mkdir()
    environment |= {"TMPDIR": str(aside), "DVC_SITE_CACHE_DIR": str(aside / "dvc")}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    pipeline = f"{folder.as_posix()}/dvc.yaml"
    targets = [pipeline]
    if as_recorded:  # one by one, in the order they are written in, which is the order they need
        names = yaml.safe_load((clone / pipeline).read_text(encoding="utf-8"))["stages"]
        targets = ["--single-item", *(f"{pipeline}:{name}" for name in names if name not in as_recorded)]
    command = [sys.executable, "-m", "dvc", "repro", "--force", "--no-run-cache", *targets]
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise LineageError(f"The recorded code does not run to the end: {' / '.join(lines[-3:])}")


def _hashes(lock: Path) -> dict[str, str]:
    """Path to recorded MD5, of all that went in and came out."""
    stages = versioning.read_lock(lock).values()
    return {
        part["path"].removeprefix(_prefix()): part["md5"]
        for stage in stages
        for part in (*stage.get("deps", []), *stage.get("outs", []))
    }


def _difference(path: str, here: Path, there: Path, *, equal: bool) -> dict[str, Any]:
    """By how much tensors and figures of an output differ; nothing for what is equal."""
    if equal:
        return {}
    largest = 0.0
    for ours in sorted((here / path).rglob("*")) if (here / path).is_dir() else [here / path]:
        theirs = there / ours.relative_to(here)
        if not theirs.is_file() or not ours.is_file():
            continue
        if ours.suffix == ".safetensors":
            mine, other = load_file(ours), load_file(theirs)
            pairs = [
                (mine[name], other[name]) for name in mine if name in other and mine[name].shape == other[name].shape
            ]
            largest = max([largest, *(float((a.double() - b.double()).abs().max()) for a, b in pairs if a.numel())])
        elif ours.suffix == ".json":
            mine_, other_ = _figures(json.loads(ours.read_text())), _figures(json.loads(theirs.read_text()))
            largest = max([largest, *(abs(mine_[name] - other_[name]) for name in mine_ if name in other_)])
    return {"largest_difference": largest if math.isfinite(largest) else None, "torch": torch.__version__}


def _figures(content: Any, name: str = "") -> dict[str, float]:
    if isinstance(content, Mapping):
        return {k: v for key, part in content.items() for k, v in _figures(part, f"{name}.{key}").items()}
    return {name: float(content)} if isinstance(content, int | float) and not isinstance(content, bool) else {}


def _page(report: Mapping[str, Any]) -> str:
    verdict = "every hash is equal" if report["equal"] else f"{report['different']} hashes differ"
    lines = [
        f"# Audit of {report['version']}: {verdict}",
        "",
        f"Made again at {report['at']} from the commit `{report['commit']}` in a clean clone, without run-cache.",
        "" if report["commit_holds_all_the_code"] else "The code had changes that this commit does not hold.",
        _AS_RECORDED if report["taken_as_recorded"] else "",
        "",
        "| path | recorded | made again | equal |",
        "|---|---|---|---|",
        *(f"| {row['path']} | {row['recorded']} | {row['made']} | {_verdict(row, report)} |" for row in report["rows"]),
    ]
    return "\n".join(lines) + "\n"


_AS_RECORDED = (
    "The catalog has changed since (pictures were added or deleted), so its splits cannot be drawn again. They and "
    "their validation were held against their recorded hashes, and each of their pictures against its own; the rest "
    "was made again from them."
)


def _verdict(row: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    if row["path"] in report["catalog_changed"]:
        return "changed since"
    return "yes" if row["equal"] else "NO"
