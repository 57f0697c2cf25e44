"""Lineage: which code a step runs, which libraries, and whether the code is what git has."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import subprocess
import threading
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from fade.files import sha256_file

_PACKAGES = ("fade", "tasks", "flows")
_LIBRARIES = ("torch", "diffusers", "peft", "transformers", "safetensors", "numpy", "pandas", "pillow", "scipy")
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
ROOT = Path(__file__).resolve().parents[1]


def module_file(module: str) -> Path | None:
    """The source file of one of the project's modules."""
    path = ROOT / Path(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


_PARSING = threading.Lock()
"""Two threads that parse at once make Python 3.11 raise a SystemError (AST constructor recursion depth mismatch)."""


def module_closure(*modules: str | Path) -> list[Path]:
    """Source files of modules and of all the project's modules they import, sorted.

    Of a file that is none of the project's own, the project's modules that it imports.

    Left out is what changes no bytes: package ``__init__`` files, which hold docstrings only, and the
    errors' classes, since a step that raises one writes nothing.
    """
    found: dict[str, Path] = {}
    waiting = [name for one in modules for name in ([one] if isinstance(one, str) else _imports(one))]
    while waiting:
        name = waiting.pop()
        path = module_file(name)
        if path is None or name in found:
            continue
        found[name] = path
        waiting += _imports(path)
    return sorted(path for path in found.values() if path.name not in ("__init__.py", "errors.py"))


def _imports(path: Path) -> tuple[str, ...]:
    state = path.stat()
    return _imports_as_written(path, state.st_mtime_ns, state.st_size)


@cache
def _imports_as_written(path: Path, _written_ns: int, _size: int) -> tuple[str, ...]:
    """What a file imports; it is parsed once for as long as it is not written again."""
    names: list[str] = []
    with _PARSING:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(name for name in names if name.split(".")[0] in _PACKAGES)


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide an adapter's bytes."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in _LIBRARIES}}


def content_hash(decided_by: Mapping[str, Any], *, module: str) -> str:
    """SHA-256 of everything that decides a result, to keep the result under: equal hash, equal result.

    Args:
        decided_by: settings and hashes of inputs; JSON-ready.
        module: its code and all code it imports, and the libraries' versions, count too.
    """
    content = {
        **decided_by,
        "code": [sha256_file(path) for path in module_closure(module)],
        "libraries": library_versions(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def git_state(folder: Path = ROOT) -> dict[str, str]:
    """``commit`` and ``dirty`` (tracked files differ from it); ``unknown`` outside a git checkout."""

    def ask(*arguments: str) -> str | None:
        try:
            return subprocess.run(
                ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (FileNotFoundError, subprocess.CalledProcessError):
            return None

    commit = ask("rev-parse", "HEAD")
    changes = ask("status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return {"commit": "unknown", "dirty": "unknown"}
    return {"commit": commit, "dirty": str(bool(changes)).lower()}


def _processor(field: str) -> str:
    """A field of /proc/cpuinfo, of the first core; empty where there is none."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition("\t")[0].strip() == field), "")


def processor_kind() -> list[str]:
    """What decides which of a library's routines a processor runs, and so the last bits of what it computes."""
    return [platform.machine(), *(name for name in _INSTRUCTIONS if name in _processor("flags").split())]


def made_on() -> dict[str, Any]:
    """Commit, libraries and machine, for a result that is kept."""
    processor = _processor("model name") or platform.processor()
    return {
        "git": git_state(),
        "libraries": library_versions(),
        "machine": {"processor": processor, "cores": os.cpu_count(), "system": platform.system()},
    }
