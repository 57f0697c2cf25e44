"""The program ``fade``: asks a running ``fade up`` or ``fade serve`` to do a small command, else does it itself.

Most of what a small command takes is the time until Python has imported what it needs. A service that runs already has
done that (flows/services/commands.py). So before anything is imported here but the standard library, the command's
words, folder, environment and its three streams are handed to the service through a Unix socket in the project:
``.fade/run/commands.sock``, which its owner alone may use, as the files beside it. The service does the command with
the same code, for the same user, and tells how it ended. Where nobody answers, or one of another version, it is done
here.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import stat
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from fade import __version__

FOLDER, NAME = ".fade/run", "commands.sock"
ANSWERED = frozenset({"list", "show", "status", "live", "approve", "rollback", "generate"})
"""Commands that a service does; of these not what goes on until Ctrl-C."""
NOT_ANSWERED = frozenset({"--help", "--watch"})
LOADED = ("OMP_", "GOMP_", "MKL_", "KMP_", "OPENBLAS_", "ATEN_", "TORCH", "PYTORCH_", "CUDA_", "HF_", "TRANSFORMERS_")
"""Variables that libraries read as they are loaded, which is over in a service: it must have them as the caller has."""
COLLECTED = (10_000, 10, 10)
"""Of Python's collector of cycles: after how many new objects it looks, for 700. What is imported is never garbage, and
to look through it so often takes an eighth of the ten seconds in which a command that draws loads its libraries."""
LENGTH = struct.Struct("!I")
PACKAGES = ("fade", "tasks", "flows")


def main() -> None:
    """Run one command."""
    code = asked(sys.argv[1:])
    if code is not None:
        sys.exit(code)
    gc.set_threshold(*COLLECTED)
    from flows.cli.app import app

    ending_quickly(app)


def ending_quickly(work: Callable[[], object]) -> NoReturn:
    """Do this process' work, and end it with the status that it gives or exits with.

    Threads are waited for and what is registered for the end is done, as Python does it. But what was imported is not
    taken apart: of torch, MLflow and Great Expectations that takes seconds of a core, for which a person would wait,
    and so would the next command.
    """
    import atexit
    import threading
    import traceback

    status = status_of(work)
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # as multiprocessing ends its children
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def status_of(work: Callable[[], object]) -> int:
    """Do some work; the status with which a program that does nothing else would end."""
    try:
        status = work()
    except SystemExit as end:
        status = end.code
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    if isinstance(status, str):
        sys.stderr.write(f"{status}\n")
    return 0 if status is None else status if isinstance(status, int) else 1


def asked(words: list[str]) -> int | None:
    """Have a service do the command; its exit status, None if it is to be done here."""
    if not words or words[0] not in ANSWERED or NOT_ANSWERED.intersection(one.partition("=")[0] for one in words):
        return None
    root = os.environ.get("FADE_ROOT") or nearest_project(Path.cwd())
    connection = None if root is None else connected(Path(root) / FOLDER)
    if connection is None:
        return None
    with connection:
        return _end_of(connection) if _begun(connection, words) else None


def _begun(connection: socket.socket, words: list[str]) -> bool:
    """Hand the command over; whether it was begun. What was not begun is done here."""
    try:
        socket.send_fds(connection, [b"\0"], [0, 1, 2])
        send(connection, request(words))
        said = receive(connection)
    except OSError:
        return False  # the service ended just now
    if said is not None and "refused" in said:
        sys.stderr.write(f"{said['refused']} Done without it.\n")
    return said is not None and "begun" in said


def _end_of(connection: socket.socket) -> int:
    """Wait for the command's exit status."""
    try:
        said = receive(connection)
    except KeyboardInterrupt:
        return 130  # the service sees the closed socket, and stops what it does
    except OSError:
        said = None
    if said is None:
        sys.stderr.write(
            "Error: The service that did this command ended before it. Look whether it was done (`fade show`, "
            "`fade live`), and at .fade/commands.log.\n"
        )
        return 1
    return int(said["exit"])


def nearest_project(start: Path) -> Path | None:
    """The nearest folder upwards that holds params.yaml and dvc.yaml."""
    for folder in (start, *start.parents):
        if (folder / "params.yaml").is_file() and (folder / "dvc.yaml").is_file():
            return folder
    return None


def connected(folder: Path) -> socket.socket | None:
    """A connection to the service whose socket lies in a folder; None if there is none of this user's own."""
    # Where the kernel does not say who is at the other end (macOS), nothing is handed over.
    if not hasattr(socket, "SO_PEERCRED") or not is_own(folder):
        return None
    here = os.open(".", os.O_RDONLY)
    connection = socket.socket(socket.AF_UNIX)
    try:
        os.chdir(folder)  # a socket's address has 107 characters, which a project's place may exceed
        connection.connect(NAME)
        if peer_uid(connection) == os.getuid():
            return connection
    except OSError:
        pass
    finally:
        os.fchdir(here)
        os.close(here)
    connection.close()
    return None


def is_own(folder: Path) -> bool:
    """Whether a folder is this user's, and nobody else may enter it."""
    try:
        found = folder.stat()
    except OSError:
        return False
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IRWXG | stat.S_IRWXO)


def peer_uid(connection: socket.socket) -> int:
    """Which user is at the other end, as the kernel says."""
    size = struct.calcsize("3i")
    _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return int(uid)


def request(words: list[str]) -> dict[str, Any]:
    """All that a service has to know to do a command as it would be done here."""
    umask = os.umask(0)
    os.umask(umask)
    return {
        "words": words,
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "umask": umask,
        "version": __version__,
        "code": code_now(),
    }


def code_now() -> str:
    """Which code this is: where it lies, and when it was changed last."""
    root = Path(__file__).resolve().parents[2]
    newest = max(
        (path.stat().st_mtime_ns for package in PACKAGES for path in (root / package).rglob("*.py")), default=0
    )
    return f"{root}:{newest}"


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """One message: its length, then JSON."""
    content = json.dumps(message).encode("utf-8", "surrogateescape")
    connection.sendall(LENGTH.pack(len(content)) + content)


def receive(connection: socket.socket) -> dict[str, Any] | None:
    """One message; None if the other end closed before it was whole."""
    head = _read(connection, LENGTH.size)
    content = _read(connection, LENGTH.unpack(head)[0]) if head is not None else None
    return None if content is None else dict(json.loads(content))


def _read(connection: socket.socket, count: int) -> bytes | None:
    found = b""
    while len(found) < count:
        part = connection.recv(count - len(found))
        if not part:
            return None
        found += part
    return found


if __name__ == "__main__":
    main()
