"""Files: hashes, and writing to a temporary name that is renamed when it is whole."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import secrets
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

try:
    from yaml import CSafeLoader as SafeLoader
except ImportError:  # a PyYAML that was built without libyaml
    from yaml import SafeLoader  # type: ignore[assignment]

from fade.errors import ConfigError

_SWAP = threading.Lock()
"""Held while a folder takes another's place: that takes two renames, and only one thread may be between them."""


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` to write a file or folder to; renamed at the end.

    Each writer has a name of its own: whoever writes the same path meanwhile (a thread, a process of another
    container with the same number) is not disturbed, and the last to end is what is there.
    After an error ``path`` is as it was, and the temporary is gone. A folder cannot be replaced by one rename:
    the old one is moved aside first, so that whoever is killed at any moment leaves both, whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.partial{path.suffix}")
    try:
        yield temporary
        if temporary.is_dir():
            with _SWAP:
                _put_folder(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        elif temporary.exists():
            temporary.unlink()


def _put_folder(new: Path, path: Path) -> None:
    if path.is_dir():
        aside = path.with_name(f".{path.name}.{secrets.token_hex(6)}.old")
        os.rename(path, aside)
        try:
            os.rename(new, path)
        except OSError:
            os.rename(aside, path)
            raise
    else:
        os.replace(new, path)
    # With what writers that were killed had moved aside.
    for old in path.parent.glob(f".{glob.escape(path.name)}.*.old"):
        shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON with sorted keys, so that equal content gives equal bytes."""
    with writing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ConfigError: the file is missing or holds no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"Missing file {path}: expected a JSON object there. Run the step that writes it.") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}. Restore or remove the file and run its step again.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__}; expected a JSON object.")
    return content


def load_yaml(text: str | bytes) -> Any:
    """YAML of plain values, by the parser in C where there is one: many times faster on lock files.

    Raises:
        yaml.YAMLError: it is none.
    """
    return yaml.load(text, Loader=SafeLoader)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        ConfigError: the file is missing or holds no mapping.
    """
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"Missing file {path}: expected YAML parameters there.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__}; expected a mapping.")
    return content


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
