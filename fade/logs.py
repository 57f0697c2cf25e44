"""Logs: plain lines, or a JSON object a line with the id of the request they are about.

The id travels with the work in a context variable: whoever takes up a request names it once. Names of people,
prompts and secrets are logged nowhere.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from fade.errors import FadeError

_request: ContextVar[str | None] = ContextVar("fade_request", default=None)


@contextmanager
def about(request_id: str | None) -> Iterator[None]:
    """Everything logged inside is about this request; restores what was before."""
    token = _request.set(request_id)
    try:
        yield
    finally:
        _request.reset(token)


class _StandardError(logging.StreamHandler[Any]):
    """Writes to what standard error is at the time."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stderr


class _WithRequest(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = getattr(record, "request_id", None) or _request.get()
        return True


def is_said_by_the_command(record: logging.LogRecord) -> bool:
    """Whether a record of Prefect is about an error raised on purpose, which ends the command with its own message.

    Nothing is, at FADE_LOG_LEVEL=DEBUG: a traceback is asked for then.
    """
    from fade.environment import environment

    if not record.name.startswith(("prefect.flow_runs", "prefect.task_runs")) or environment().log_level == "DEBUG":
        return False
    raised = record.exc_info[1] if record.exc_info else None
    # A run's end is logged a second time, without its error; the first line of one that was not meant has it.
    return isinstance(raised, FadeError) or (raised is None and str(record.msg).startswith("Finished in state"))


class _SaidOnce(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not is_said_by_the_command(record)


def set_up(service: str) -> logging.Handler | None:
    """Log to standard error as FADE_LOG_FORMAT and FADE_LOG_LEVEL say; called by a program's entry, once counts.

    Args:
        service: which program this is: ``drain``, ``serve`` ...

    Returns:
        The root logger's handler; None if it is all as Python has it (plain warnings).
    """
    from fade.environment import environment  # late, so that `fade --help` does not wait for it

    chosen = environment()
    if chosen.log_format == "plain" and chosen.log_level == "WARNING":
        return None
    for present in logging.getLogger().handlers:
        if isinstance(present, _StandardError):
            return present
    handler = _StandardError()
    handler.addFilter(_WithRequest())
    if chosen.log_format == "json":
        from pythonjsonlogger.json import JsonFormatter

        handler.setFormatter(
            JsonFormatter(
                "{asctime}{levelname}{name}{message}{request_id}",
                style="{",
                rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
                static_fields={"service": service},
                datefmt="%Y-%m-%dT%H:%M:%S%z",
            )
        )
    else:
        handler.addFilter(_SaidOnce())
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    for name in ("fade", "tasks", "flows"):
        logging.getLogger(name).setLevel(chosen.log_level)
    return handler
