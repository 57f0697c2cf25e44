"""Flow ``deadlines``: tells of each request whose deadline is near or over, once."""

from __future__ import annotations

import logging

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.events import emit_event

from fade.requests.deadlines import DeadlineWarning, alert_url, warn
from fade.requests.ledger import Ledger
from fade.requests.overview import near_deadlines
from flows.queue.schedules import drop_missed

logger = logging.getLogger(__name__)
NEAR_DAYS = 7.0


@flow(name="deadlines")
def deadlines(days: float = NEAR_DAYS) -> list[DeadlineWarning]:
    """Warn of what is due within ``days``: a row of the log, a Prefect event, a webhook to FADE_ALERT_URL.

    The artifact ``deadlines`` shows all that is near or over, told before or not. An automation of Prefect can
    send mail on the events ``fade.deadline.near`` and ``fade.deadline.over``.
    """
    drop_missed()
    with Ledger() as ledger:
        told = warn(ledger, days=days, url=alert_url())
        near = near_deadlines(ledger, days=days)
    for one in told:
        asked = one.request
        logger.warning(
            "%s: request %s of %s is %s, due %s", one.event, asked.id, asked.project, asked.state, asked.due_at
        )
        emit_event(
            event=f"fade.{one.event}",
            resource={"prefect.resource.id": f"fade.request.{one.request.id}"},
            payload={
                "project": one.request.project,
                "due_at": one.request.due_at.isoformat(),
                "state": str(one.request.state),
            },
        )
    rows = [
        {
            "request": one.id,
            "project": one.project,
            "state": str(one.state),
            "due (UTC)": f"{one.due_at:%Y-%m-%d %H:%M}",
        }
        for one in near
    ]
    create_table_artifact(rows, key="deadlines", description=f"Open, and due within {days:g} days or before now")
    return told
