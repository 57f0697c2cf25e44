"""Does small commands for the command line (flows/cli/main.py), asked through a socket of the project.

This program imports what small commands need, once. For each that comes it forks: the child has all of that already,
takes the caller's folder, environment and streams, and does the command with the code of the command line itself. So
commands that come at once do not disturb each other, and one that fails takes nothing with it. Who may ask is whoever
runs as the same user, by the rights of the folder (0700) and the socket (0600) and by what the kernel says of the other
end; that user may run the command anyway.

The parent computes nothing and has no threads of its own, as a fork of a process in the middle of something may hang.
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from fade import __version__
from fade.environment import environment
from fade.errors import FadeError, listing
from fade.project import load_projects
from flows.cli.main import (
    FOLDER,
    LOADED,
    NAME,
    code_now,
    ending_quickly,
    is_own,
    peer_uid,
    receive,
    send,
    status_of,
)
from flows.services.local import stop
from flows.settings import DEFAULTS, STATE, configure

PRELOADED = (
    "sqlalchemy.dialects.sqlite",
    *("typer.rich_utils", "rich.table", "rich.live", "mlflow", "mlflow.tracking.request_header.registry"),
    *("fade.requests.overview", "fade.steps.combine"),
    *("flows.erasing.together", "flows.releasing.pictures", "flows.releasing.release"),
)
LOG = STATE / "commands.log"
MOST = 8
"""Commands at once; more wait."""
MOST_BYTES = 500 * 2**20
"""Of a base that is kept in memory."""
LOOK_SECONDS, REQUEST_SECONDS = 0.5, 30.0
logger = logging.getLogger(__name__)


def serve() -> None:
    """Answer until the program that started this one ends, or SIGTERM.

    Raises:
        SystemExit: the socket's folder is another user's, or open to others.
    """
    parent, me, folder = os.getppid(), os.getpid(), Path(FOLDER)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not is_own(folder):
        raise SystemExit(
            f"{folder} must be yours and closed to others: expected mode 0700. Mend it: chmod 700 {folder}"
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    code, loaded = code_now(), dict(os.environ)
    threads, children = preload(), set[int]()
    command = described()
    lock = os.open(folder / "commands.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    while not _held(lock):  # a second service of a project waits until the first has ended
        time.sleep(LOOK_SECONDS)
        if os.getppid() != parent:
            return
    with base_at_hand():
        # What is here stays until the end: a child that looks for garbage need not go through it, nor copy it so.
        gc.collect()
        gc.freeze()
        listener = listening(folder)
        try:
            while os.getppid() == parent:
                reap(children)
                if len(children) >= MOST:
                    time.sleep(0.05)
                elif select.select([listener], [], [], LOOK_SECONDS)[0]:
                    connection = listener.accept()[0]
                    if (child := os.fork()) == 0:
                        listener.close()
                        ending_quickly(partial(answer, connection, command, code, loaded, threads))
                    connection.close()
                    children.add(child)
        finally:
            if os.getpid() == me:  # a child that ends leaves them
                (folder / NAME).unlink(missing_ok=True)


def reap(children: set[int]) -> None:
    """Forget the children that have ended."""
    for child in list(children):
        if os.waitpid(child, os.WNOHANG)[0]:
            children.discard(child)


def _held(lock: int) -> bool:
    # No FileLock: one that is copied by a fork lets go for both.
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def preload() -> int:
    """Import what commands need; how many threads torch computes with where nobody says otherwise."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what is computed here leaves no threads behind
    for name in PRELOADED:
        importlib.import_module(name)
    return threads


def described() -> Callable[..., Any]:
    """The command line as a whole, whose hundreds of options take as long to describe as a small command to be done."""
    from typer.main import get_command

    from flows.cli.app import app

    return get_command(app)


@contextmanager
def base_at_hand() -> Iterator[None]:
    """Inside, the only project's base is in memory, if it is small and lies where a fork can use it: not on a GPU.

    A command that draws takes its fork's, as long as the base's files are the same.
    """
    from fade.hardware import compute_device
    from fade.models.family import load_base
    from fade.models.sharing import bases_shared
    from fade.models.source import deciding_files, find_base

    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # so that asking for a GPU does not begin to use it
    with bases_shared():
        try:
            place = load_projects(environment().projects).served
            files = deciding_files(find_base(place[0].base)).values() if len(place) == 1 else ()
            small = sum(path.stat().st_size for path in files) <= MOST_BYTES
            if files and small and compute_device().type == "cpu":
                load_base(place[0].base)
        except FadeError as error:
            logger.warning("no base is kept in memory: %s", error)
        yield


def listening(folder: Path) -> socket.socket:
    """The project's socket, in place of one that a service left that is gone."""
    (folder / NAME).unlink(missing_ok=True)
    listener, here, umask = socket.socket(socket.AF_UNIX), os.getcwd(), os.umask(0o177)
    try:
        os.chdir(folder)  # as flows.cli.main.connected
        listener.bind(NAME)
    finally:
        os.chdir(here)
        os.umask(umask)
    listener.listen(64)
    return listener


def answer(
    connection: socket.socket, command: Callable[..., Any], code: str, loaded: Mapping[str, str], threads: int
) -> int:
    """In a process of its own: take one request, do the command, say how it ended; the process' exit status."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        asked, streams = request(connection)
        if why := refusal(asked, code, loaded):
            send(connection, {"refused": why})
            return 0
        send(connection, {"begun": os.getpid()})
    except (OSError, ValueError, KeyError, TypeError):
        return 1  # nobody that can be answered
    take_over(asked, streams, threads)
    ended = threading.Event()
    threading.Thread(target=_interrupt_without, args=(connection, ended), daemon=True).start()
    status = done(command, asked["words"])
    let_go()
    ended.set()
    with suppress(OSError):
        send(connection, {"exit": status})
    return status


def request(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """What is asked, and the caller's three streams.

    Raises:
        ValueError: another user asks, or it is no request.
        OSError: it did not come in time.
    """
    connection.settimeout(REQUEST_SECONDS)
    if peer_uid(connection) != os.getuid():
        raise ValueError("another user asks")
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    asked = receive(connection)
    if asked is None or len(streams) != 3:
        raise ValueError("no whole request")
    connection.settimeout(None)
    return asked, streams


def refusal(asked: Mapping[str, Any], code: str, loaded: Mapping[str, str]) -> str:
    """Why a command is not done here; empty if it is.

    Args:
        loaded: the environment with which this program imported its libraries.
    """
    if (asked["version"], asked["code"]) != (__version__, code):
        return (
            f"The `fade up` or `fade serve` that runs here is of other code (version {__version__}) than this command "
            f"(version {asked['version']}): start it again."
        )
    given = {**DEFAULTS, **asked["environment"]}
    odd = sorted(name for name in {*given, *loaded} if name.startswith(LOADED) and given.get(name) != loaded.get(name))
    if odd:
        return f"The `fade up` or `fade serve` that runs here was started with another value of {listing(odd)}."
    return ""


def take_over(asked: Mapping[str, Any], streams: list[int], threads: int) -> None:
    """Take the caller's streams, folder, environment and rights for new files."""
    import torch

    from fade.models.sharing import give_bases_away

    give_bases_away()  # this process does one command, and ends
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = os.fdopen(0, "r", closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.environ.clear()
    os.environ.update(asked["environment"])
    time.tzset()
    os.umask(asked["umask"])
    os.chdir(asked["folder"])
    torch.set_num_threads(threads)


def _interrupt_without(connection: socket.socket, ended: threading.Event) -> None:
    """Ctrl-C for a command whose caller is gone."""
    with suppress(OSError):
        connection.recv(1)
    if not ended.is_set():
        os.kill(os.getpid(), signal.SIGINT)


def done(command: Callable[..., Any], words: list[str]) -> int:
    """Do a command; its exit status."""
    from flows.cli.console import look_at_streams

    sys.argv = ["fade", *words]
    look_at_streams()
    status = status_of(partial(command, prog_name="fade"))
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    return status


def let_go() -> None:
    """Close the caller's streams: whoever reads them waits for their end, and Python takes seconds to its own."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nothing, number)
    os.close(nothing)


@contextmanager
def answering() -> Iterator[None]:
    """Run such a service beside this program, until the end of the block."""
    with LOG.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield
    finally:
        stop(process)


def main() -> None:
    """The service of the project in which this is started."""
    configure()
    serve()


if __name__ == "__main__":
    main()
