"""Prometheus figures read from the ledger's log: durations of erasures and requests, and the number of dead letters.

Each reading takes only the log's new rows.
"""

from __future__ import annotations

import json
import threading
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from fade.requests.intake import DEAD_LETTERS
from fade.requests.ledger import Ledger
from fade.requests.states import State
from fade.requests.tables import head, log, requests

MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0
RUN_BOUNDS = (10.0, 30.0, MINUTE, 5 * MINUTE, 15 * MINUTE, 30 * MINUTE, HOUR, 3 * HOUR, 6 * HOUR, 12 * HOUR)
REQUEST_BOUNDS = (MINUTE, HOUR, 6 * HOUR, DAY, 3 * DAY, 7 * DAY, 14 * DAY, 30 * DAY, 90 * DAY)
REACHED = (State.CANDIDATE, State.LIVE)


@dataclass
class Histogram:
    """A histogram of seconds by upper bounds; the last bucket counts what exceeds every bound."""

    bounds: Sequence[float]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def add(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total += seconds

    def cumulative(self) -> list[tuple[str, float]]:
        """As Prometheus wants it: up to each bound, and up to ``+Inf``."""
        sums = [float(sum(self.counts[: i + 1])) for i in range(len(self.counts))]
        return list(zip([*map(str, self.bounds), "+Inf"], sums, strict=True))


class Durations:
    """Histograms of erasures and of requests. Read again from the log after a restart, they come out the same.

    Attributes:
        runs: by outcome, from the lease to the outcome of each attempt.
        requests: by state (``candidate``, ``live``), from the receipt of a request until it is reached.
        dead_letters: messages that were no requests.
    """

    def __init__(self) -> None:
        self.runs: dict[str, Histogram] = defaultdict(lambda: Histogram(RUN_BOUNDS))
        self.requests: dict[str, Histogram] = defaultdict(lambda: Histogram(REQUEST_BOUNDS))
        self.dead_letters = 0
        self._seq = self._dead_seq = 0
        self._begun: dict[str, datetime] = {}
        self._lock = threading.Lock()

    def read(self, ledger: Ledger) -> None:
        """Count what the log holds since the last reading."""
        columns = (log.c.seq, log.c.request_id, log.c.before, log.c.after, log.c.at, requests.c.received_at)
        asked = (
            sa.select(*columns)
            .join(requests, requests.c.id == log.c.request_id)
            .where(
                log.c.seq > self._seq,
                sa.or_(log.c.after.in_((State.RUNNING, *REACHED)), log.c.before == State.RUNNING),
            )
            .order_by(log.c.seq)
        )
        with self._lock, ledger.reading() as connection:
            for row in connection.execution_options(yield_per=1000).execute(asked):
                self._seq = row.seq
                if row.after == State.RUNNING:
                    self._begun[row.request_id] = row.at
                elif row.before == State.RUNNING:
                    self.runs[row.after].add((row.at - self._begun.pop(row.request_id)).total_seconds())
                if row.after in REACHED:
                    self.requests[row.after].add((row.at - row.received_at).total_seconds())
            self._count_dead(connection)

    def _count_dead(self, connection: Connection) -> None:
        end = connection.scalar(sa.select(head.c.seq)) or 0
        rounds = sa.select(log.c.details).where(
            log.c.seq > self._dead_seq, log.c.seq <= end, log.c.event == DEAD_LETTERS
        )
        self.dead_letters += sum(json.loads(details)["count"] for details in connection.scalars(rounds))
        self._dead_seq = end
