"""What Prefect prints: not the traceback of an error that is raised on purpose, since its message is printed anyway.

Prefect keeps it in the run's log, which its page shows.
"""

from __future__ import annotations

import logging

from prefect.logging.handlers import PrefectConsoleHandler

from fade import logs


class OneMessage(PrefectConsoleHandler):
    """Prefect's console, named to it by ``PREFECT_LOGGING_HANDLERS_CONSOLE_CLASS`` (``flows.settings.configure``)."""

    def handle(self, record: logging.LogRecord) -> bool:
        """Print a record unless the command says it itself."""
        return not logs.is_said_by_the_command(record) and bool(super().handle(record))
