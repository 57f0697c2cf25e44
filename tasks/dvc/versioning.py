"""DVC: the pipeline file of an erasure, what in it is current, and the hashes it recorded.

This folder holds the only files that import dvc. An erasure's folder has its own ``dvc.yaml`` and ``dvc.lock``, so that
concurrent erasures never meet in one lock file, and the lock file is the erasure's audit record.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("DVC_NO_ANALYTICS", "1")

import yaml
from dvc.exceptions import DvcException
from dvc.lock import make_lock
from dvc.repo import Repo, lock_repo
from dvc.rwlock import RWLOCK_FILE, RWLOCK_LOCK
from dvc.stage.serialize import to_lockfile
from dvc.utils.serialize import YAMLFileCorruptedError, dumps_yaml, modify_yaml
from dvc_data.hashfile.build import build
from filelock import FileLock

from fade import pipeline
from fade.config import load_settings
from fade.data.splits import NOTHING
from fade.errors import LineageError
from fade.files import load_yaml, sha256_file, write_json, writing
from fade.lineage import ROOT, library_versions, module_closure, processor_kind
from fade.methods.registry import method_code
from fade.models.source import is_hub_name
from fade.pipeline import LOSSES, TIMINGS, Step
from fade.project import Project, load_project
from fade.spec import Spec, make_spec

logging.getLogger("dvc").setLevel(logging.WARNING)
logging.getLogger("dvc_data").setLevel(logging.ERROR)  # it warns of each output that a stage has yet to make
logger = logging.getLogger(__name__)
FLOW_BASE = "data/base/canvas-flow"
"""The second built-in base: that of ``project`` is the first."""
RECORDED_ON = Path("data/recorded-on.json")
WIDE = Path("data/wide")
"""The project of the wide canvas (docs/how-to/wide-canvas.md)."""
STAMPS = "/usr/share/tuxpaint/stamps"
"""Where Debian's package lays the photographs."""
CANVAS_CLIP = "data/canvas-clip"
"""A CLIP of the built-in canvas, for what is erased there by name alone."""
SITE = Path(".fade/dvc")
"""What DVC remembers of files' hashes, by their names."""
MEND = "Take one side as a whole (`git checkout --ours FILE` or `--theirs FILE`), or run the erasure again without it."
LOCK_HEAD = "schema: '2.0'\nstages:\n"
"""How DVC begins a lock file."""


def _code(module: str, root: Path, *, method: str | None = None) -> list[str]:
    """Source files of a step's module, and of the method that it runs, if it runs one."""
    files = {*module_closure(module), *(method_code(method) if method is not None else ())}
    return [Path(os.path.relpath(path, root)).as_posix() for path in sorted(files)]


def stage_definition(step: Step, spec: Spec, folder: Path, root: Path) -> dict[str, Any]:
    """A step as dvc.yaml holds it; every path is relative to the project's root."""
    where = folder.as_posix()
    places = {name: getattr(spec, name) for name in ("catalog", "base")}
    places |= {"judges": spec.judges_folder(folder).as_posix(), "clip": spec.judges}
    places["pictures"] = spec.picture_catalog(folder).as_posix() if spec.data_free else spec.catalog

    def located(path: str) -> str:
        return path.format(**places) if path.startswith("{") else f"{where}/{path}"

    code = _code(step.module, root, method=spec.method if step.by_method else None)
    # A name on the hub is no file to depend on: the parameters base_sha256 and clip_sha256 stand for its bytes.
    nowhere = {"{base}"} if is_hub_name(spec.base) else set()
    nowhere |= {"{clip}"} if not spec.by_name or spec.clip_sha256 is None or is_hub_name(spec.judges) else set()
    inputs = [path for path in pipeline.inputs_of(step, spec) if path not in nowhere]
    said = spec.model_dump(mode="json")

    return {
        "cmd": f"python -m fade.pipeline {step.function} {where}",
        "deps": sorted([*(located(path) for path in inputs), *code]),
        "params": [{f"{where}/spec.yaml": sorted(name for name in step.parameters if name.partition(".")[0] in said)}],
        "outs": [located(path) for path in step.outputs],
    }


def write_pipeline(folder: Path, spec: Spec) -> None:
    """Write the erasure's ``dvc.yaml``: a stage for each of its steps."""
    up = Path(os.path.relpath(Path.cwd(), folder)).as_posix()
    steps = pipeline.steps_of(spec)
    stages = {step.name: {**stage_definition(step, spec, folder, Path.cwd()), "wdir": up} for step in steps}
    with writing(folder / "dvc.yaml") as temporary:
        plots = [_training_plot(LOSSES)] if any(LOSSES in step.outputs for step in steps) else []
        temporary.write_text(yaml.safe_dump({"stages": stages, "plots": plots}, sort_keys=False))
    with writing(folder / ".gitignore") as temporary:
        names = {name for step in steps for name in step.outputs}
        names |= {TIMINGS, *(name for step in pipeline.STEPS for name in step.unrecorded)}
        temporary.write_text("".join(f"/{name}\n" for name in sorted(names)))


def root_pipeline() -> dict[str, Any]:
    """The project's own ``dvc.yaml``: what all erasures share, and the example erasure of params.yaml.

    Bases and judges take hours: they are kept in git (``cache: false``) and frozen, so that DVC neither makes them
    again nor calls them stale when code changes. What made them is what ``dvc.lock`` names and their cards
    beside them say. All else follows its code.
    """

    def shared(name: str, out: str, *, kept: bool) -> dict[str, Any]:
        module = f"fade.steps.{name}"
        stage = {
            "cmd": f"python -m {module} --out {out}",
            "deps": _code(module, ROOT),
            "params": [name],
            "outs": [{out: {"cache": False}} if kept else out],
        }
        return stage | {"frozen": True} if kept else stage

    def report(built: str, out: str) -> dict[str, Any]:
        return {
            "cmd": f"python -m fade.steps.base_report --base {built} --judges {judges} --out {out}",
            "deps": sorted([built, judges, *_code("fade.steps.base_report", ROOT)]),
            "params": ["base_report"],
            "outs": [{out: {"cache": False}}],
        }

    folder = Path("data/erasures/example")
    project = load_project(ROOT)
    catalog, base, judges = project.catalog, project.base, project.judges
    spec = _example(project)
    flow = shared("flow_base", FLOW_BASE, kept=True)
    # Its autoencoder and tokenizer are those of the first base.
    flow |= {"cmd": f"{flow['cmd']} --like {base}", "deps": sorted([base, *flow["deps"]])}
    stages = {
        "catalog": shared("catalog", catalog, kept=False),
        "base": shared("base", base, kept=True),
        "judges": shared("judges", judges, kept=True),
        "canvas_clip": shared("canvas_clip", CANVAS_CLIP, kept=True),
        "base_report": report(base, "data/base/report"),
        "flow_base": flow,
        "flow_base_report": report(FLOW_BASE, "data/base/flow-report"),
        "example-request": {
            "cmd": f"python -m fade.asking.prepare {folder.as_posix()}",
            "deps": sorted(
                [f"{catalog}/catalog.parquet", f"{catalog}/concepts.json", base, *_code("fade.asking.prepare", ROOT)]
            ),
            "params": ["erasure", "example", "project"],
            "outs": [f"{folder.as_posix()}/spec.yaml"],
        },
    }
    steps = pipeline.steps_of(spec)
    stages |= {f"example-{step.name}": stage_definition(step, spec, folder, ROOT) for step in steps}
    return {"stages": stages, "plots": [_training_plot(f"{folder.as_posix()}/{LOSSES}"), *_kept_plots()]}


def wide_pipeline() -> dict[str, Any]:
    """The wide canvas' ``data/wide/dvc.yaml``: the documented commands that made it, frozen as base and judges are.

    A file of its own, which `dvc repro` at the root leaves alone: the catalog needs a package that few machines have.
    """
    project = load_project(ROOT / WIDE)
    base, given = project.section("base"), f"--project {WIDE.as_posix()}"
    steps = f"--autoencoder-steps {base['autoencoder']['steps']} --denoiser-steps {base['denoiser']['steps']}"
    commands = {
        "catalog": f"fade catalog build stamps {STAMPS} -o {project.catalog}",
        "judges": f"fade classifier train {given} --threads {project.section('judges')['threads']}",
        "base": f"fade base train {given} --threads {base['threads']} --judges {project.judges} "
        f"--start {base['start']} {steps}",
    }
    modules = {"catalog": "fade.data.loaders.stamps", "judges": "fade.steps.train", "base": "fade.steps.train"}
    inputs = {"catalog": [], "judges": [project.catalog], "base": [project.catalog, base["start"]]}
    stages = {}
    for name, command in commands.items():
        out = getattr(project, name)
        stages[name] = {
            "cmd": command,
            "wdir": "../..",
            "deps": sorted([*inputs[name], *_code(modules[name], ROOT)]),
            **({} if name == "catalog" else {"params": [{f"{WIDE.as_posix()}/params.yaml": [name]}]}),
            "outs": [out if name == "catalog" else {out: {"cache": False}}],
            "frozen": True,
        }
    return {"stages": stages}


def _example(project: Project) -> Spec:
    """Of the example in params.yaml what decides its stages; its concept and base are looked up by a stage itself."""
    asked = project.section("example")
    return make_spec(
        concept="example",
        kind="object",
        surrogate=NOTHING,
        data_free=asked.get("data_free", False),
        base=project.base,
        base_sha256="0" * 64,
        catalog=project.catalog,
        judges=project.judges,
        **load_settings(project.params).model_dump(),
    )


def _training_plot(curve: str) -> dict[str, Any]:
    """An erasure's training, for ``dvc plots show``; ``curve`` as seen from the dvc.yaml that holds it."""
    return {"training": {"x": {curve: "step"}, "y": {curve: ["forget_loss", "retain_loss"]}, "y_label": "loss"}}


def _kept_plots() -> list[dict[str, Any]]:
    """Plots of the benchmarks' kept results, as far as they are kept."""
    kept = "benchmarks/results"
    concepts, methods, sequence = (f"{kept}/{name}.json" for name in ("canvas", "contest", "sequence"))
    plots: dict[str, dict[str, Any]] = {
        concepts: {
            "concepts: drift and seconds": {"template": "scatter", "x": {concepts: "seconds"}, "y": {concepts: "drift"}}
        },
        methods: {
            "methods: UA and IRA": {"template": "scatter", "x": {methods: "ira"}, "y": {methods: "ua"}},
            "methods: UA and CRA": {"template": "scatter", "x": {methods: "cra"}, "y": {methods: "ua"}},
            "methods: seconds and memory": {
                "template": "scatter",
                "x": {methods: "method_seconds"},
                "y": {methods: "peak_mib"},
            },
        },
        sequence: {
            "erasures live at once": {"x": {sequence: "erased"}, "y": {sequence: ["ua", "ira", "cra"]}},
        },
    }
    return [{name: plot} for file, named in plots.items() if (ROOT / file).is_file() for name, plot in named.items()]


def write_root_pipeline() -> None:
    """Write the project's ``dvc.yaml``, and the wide canvas', after the code's imports have changed."""
    header = (
        "# Written by `python -m tasks.dvc.versioning` from the imports of each step; a test holds the two together.\n"
    )
    for folder, stages in ((ROOT, root_pipeline()), (ROOT / WIDE, wide_pipeline())):
        with writing(folder / "dvc.yaml") as temporary:
            temporary.write_text(header + yaml.safe_dump(stages, sort_keys=False))


@contextmanager
def open_repo() -> Iterator[Any]:
    """The DVC repository, one user at a time: DVC's own lock fails at once instead of waiting.

    What DVC remembers of files by name lies in the project too, not in a folder that the machine's users share.

    Raises:
        LineageError: there is none here, or a file of it (a lock file with marks of a merge) cannot be read.
    """
    _check_project()
    SITE.parent.mkdir(exist_ok=True)
    own = {"core": {"site_cache_dir": str(SITE.resolve())}}
    with FileLock(".fade/dvc.lock", timeout=600):
        try:
            with Repo(".", config=own) as repo:
                _mend_list_of_locks(repo)
                yield repo
        except YAMLFileCorruptedError as error:
            raise LineageError(_why(error)) from None


def _check_project() -> None:
    if not Path(".dvc").is_dir():
        raise LineageError(f"{Path.cwd()} is no DVC project: expected a folder .dvc. Run from the project's root.")


def forget_names() -> None:
    """Drop what DVC remembers of files by their names; it reads them again."""
    with FileLock(".fade/dvc.lock", timeout=600):
        shutil.rmtree(SITE, ignore_errors=True)


def _why(error: Exception) -> str:
    """DVC's words, or better ones for a lock file that a merge left in pieces."""
    return f"{_broken(Path(error.path))} {MEND}" if isinstance(error, YAMLFileCorruptedError) else f"{error}"


def _broken(path: Path) -> str:
    """What is wrong with a YAML file that DVC cannot read."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        return f"{path} cannot be read: {error}."
    number = next((n for n, line in enumerate(text.splitlines(), start=1) if line.startswith("<<<<<<<")), None)
    return f"{path} is not YAML." if number is None else f"{path} holds the marks of a merge, from line {number} on."


def read_lock(path: Path) -> dict[str, dict[str, Any]]:
    """The stages that a lock file records, by name; none if it is not there or empty.

    Raises:
        LineageError: it is no YAML, for instance after a merge, or no lock file.
    """
    if not path.is_file():
        return {}
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        raise LineageError(f"{_broken(path)} {MEND}") from None
    if content is None:
        return {}
    stages = content.get("stages", {}) if isinstance(content, dict) else None
    if not isinstance(stages, dict):
        raise LineageError(f"{path} is no lock file: expected a mapping with `stages`. {MEND}")
    return stages


def _mend_list_of_locks(repo: Any) -> None:
    """Remove DVC's list of locks if it is cut off: a DVC that was killed while it wrote it (not by way of a
    temporary name) leaves it so, and every later one refuses to work.

    The lock that guards the list is held meanwhile, so nobody is just writing it.
    """
    path = Path(repo.tmp_dir) / RWLOCK_FILE
    if not path.is_file():
        return
    try:
        guard = make_lock(str(path.with_name(RWLOCK_LOCK)), tmp_dir=repo.tmp_dir)
        with guard:
            try:
                json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                logger.warning("%s was cut off when a DVC was killed; it is begun anew", path)
                path.unlink()
    except DvcException as error:
        raise LineageError(f"DVC's list of locks is in use: {error}. Try again.") from error


def is_current(folder: Path, stage: str) -> bool:
    """Whether a stage's recorded hashes still match its code, parameters, inputs and outputs."""
    _check_project()
    if stage not in read_lock(folder / "dvc.lock"):
        return False
    with open_repo() as repo:
        try:
            return not repo.status(targets=[f"{folder.as_posix()}/dvc.yaml:{stage}"])
        except DvcException as error:
            raise LineageError(f"DVC cannot tell whether {stage} of {folder} is current: {_why(error)}") from error


def record(folder: Path, stage: str) -> None:
    """Record a stage that has just run: hashes into ``dvc.lock``, outputs into DVC's cache.

    As ``dvc commit --force`` does, but for the lock file: that is written by way of a temporary name, so that whoever
    is killed leaves it as it was, and what it says of other stages is not read and written again.

    Raises:
        LineageError: an output is missing, or DVC refuses.
    """
    with open_repo() as repo:
        try:
            with lock_repo(repo):
                found = repo.stage.load_one(f"{folder.as_posix()}/dvc.yaml", stage)
                # The run-cache would find the same outputs by the same inputs once more: half of the time this takes,
                # and one more place to purge.
                found.save(run_cache=False)
                found.commit()
                _put(folder / "dvc.lock", to_lockfile(found))
        except DvcException as error:
            raise LineageError(f"DVC did not record {stage} of {folder}: {_why(error)}") from error


def _put(lock: Path, entry: dict[str, Any]) -> None:
    """Put a stage's entry into a lock file, byte for byte as DVC does."""
    recorded = read_lock(lock)
    text = lock.read_text(encoding="utf-8") if recorded else LOCK_HEAD
    with writing(lock) as temporary:
        if text.startswith(LOCK_HEAD) and not entry.keys() & recorded.keys():
            temporary.write_text(text + dumps_yaml({"stages": entry}).removeprefix("stages:\n"), encoding="utf-8")
        else:
            temporary.write_text(text, encoding="utf-8")
            with modify_yaml(temporary) as content:
                content["stages"].update(entry)


def lock_record(folder: Path) -> dict[str, str]:
    """SHA-256 of ``dvc.lock``, and DVC's MD5 of every output it names."""
    path = folder / "dvc.lock"
    if not path.is_file():
        raise LineageError(f"{folder} has no dvc.lock: no step of this erasure was recorded. Run it again.")
    outputs = {
        out["path"].removeprefix(f"{folder.as_posix()}/"): out["md5"]
        for stage in read_lock(path).values()
        for out in stage["outs"]
    }
    return {"dvc.lock": sha256_file(path), **outputs}


def track(folder: Path) -> bool:
    """Put a folder of data under DVC (``<folder>.dvc``); false if it lies outside the project or a stage makes it.

    Raises:
        LineageError: DVC refuses.
    """
    inside = folder.resolve().is_relative_to(Path.cwd())
    if not inside or not Path(".dvc").is_dir():
        return False
    place = folder.resolve().relative_to(Path.cwd()).as_posix()
    with open_repo() as repo:
        if any(out.def_path == place and not stage.is_data_source for stage in repo.index.stages for out in stage.outs):
            return False
        try:
            repo.add(place)
        except DvcException as error:
            raise LineageError(f"DVC did not take {place} in: {_why(error)}") from error
    return True


def push(remote: str | None = None) -> int:
    """Send catalogs, splits, adapters and all else that DVC knows to a remote; gives how many files were sent.

    Raises:
        LineageError: there is no remote, or it cannot be reached.
    """
    with open_repo() as repo:
        _check_remote(repo, remote)
        try:
            return int(repo.push(remote=remote))
        except (DvcException, OSError) as error:
            raise LineageError(
                f"DVC could not push: {_why(error)}. Look at `dvc remote list` and the credentials."
            ) from error


def pull(remote: str | None = None) -> dict[str, int]:
    """Bring back what the ``.dvc`` and lock files name; what no store holds any more, as after a purge, stays away.

    Returns:
        Files ``fetched`` from the remote; ``added``, ``modified``, ``deleted`` in the work tree.

    Raises:
        LineageError: there is no remote, or it cannot be reached.
    """
    with open_repo() as repo:
        _check_remote(repo, remote)
        try:
            found = repo.pull(remote=remote, allow_missing=True)
        except (DvcException, OSError) as error:
            raise LineageError(
                f"DVC could not pull: {_why(error)}. Look at `dvc remote list` and the credentials."
            ) from error
    return {name: int(found["stats"].get(name, 0)) for name in ("fetched", "added", "modified", "deleted")}


def _check_remote(repo: Any, remote: str | None) -> None:
    known = sorted(repo.config["remote"])
    if remote is not None and remote not in known:
        raise LineageError(f"No DVC remote {remote!r}: known are {', '.join(known) or 'none'}. See `dvc remote add`.")
    if remote is None and not repo.config["core"].get("remote"):
        raise LineageError(
            "No DVC remote is the default. Add one: dvc remote add -d NAME URL (a folder, s3://, ssh://)."
        )


def hash_of(path: Path) -> str | None:
    """A file's or folder's hash as a lock file records it; None if it is not there."""
    if not path.exists():
        return None
    with open_repo() as repo:
        _, _, found = build(repo.cache.local, str(path.resolve()), repo.cache.local.fs, "md5", dry_run=True)
        return str(found.hash_info.value)


def record_machine() -> None:
    """Write beside the lock file on which kind of processor, with which libraries, its hashes were made."""
    write_json(ROOT / RECORDED_ON, {"processor": processor_kind(), "libraries": library_versions()})


if __name__ == "__main__":
    if sys.argv[1:] == ["--recorded-here"]:
        record_machine()
    else:
        write_root_pipeline()
