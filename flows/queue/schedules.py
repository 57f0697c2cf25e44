"""When a flow runs: cron lines and their time zone, checked before anything starts; what was missed runs once."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from zoneinfo import ZoneInfo, available_timezones

from fade.errors import ConfigError, nearest

logger = logging.getLogger(__name__)
MISSED = "its time was over when a later run began, which did its work"


def checked_cron(given: str) -> str:
    """A cron line as Prefect takes it, without space around it.

    Raises:
        ConfigError: it is none.
    """
    from prefect.client.schemas.schedules import CronSchedule
    from pydantic import ValidationError

    try:
        return CronSchedule(cron=given.strip()).cron
    except ValidationError:
        raise ConfigError(
            f"The schedule {given!r} is no cron line: expected five fields (minute, hour, day of month, month, day "
            "of week), e.g. '*/5 * * * *' for every five minutes. In a shell, put it in quotes."
        ) from None


def checked_zone(given: str) -> str:
    """A time zone by its name in the IANA's database, in which a cron line is read.

    Raises:
        ConfigError: there is none of this name; suggests the nearest.
    """
    try:
        return ZoneInfo(given.strip()).key
    except (KeyError, ValueError, OSError):
        alike = nearest(given, available_timezones())
        raise ConfigError(
            f"There is no time zone {given!r}: expected a name such as UTC or Europe/Berlin."
            + (f" {alike}" if alike.startswith("Did") else "")  # rather than six hundred names
        ) from None


def drop_missed() -> int:
    """Within a scheduled run, cancel the others of its deployment whose time is over as well; gives how many.

    After a long run, or a machine that was off, every minute missed would else begin a process of its own, one
    after the other, to do what this run does. Runs that were asked for with other parameters are left.
    """
    from prefect import runtime

    deployment = runtime.deployment.id
    return 0 if deployment is None else cancel_missed(str(deployment), besides=str(runtime.flow_run.id))


def cancel_missed(deployment: str, *, besides: str) -> int:
    """Cancel a deployment's runs, as its schedule makes them, that did not begin in time, but for one."""
    from uuid import UUID

    from prefect.client.orchestration import get_client
    from prefect.client.schemas import filters
    from prefect.client.schemas.objects import StateType
    from prefect.states import Cancelled

    overdue = filters.FlowRunFilter(
        state=filters.FlowRunFilterState(type=filters.FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
        expected_start_time=filters.FlowRunFilterExpectedStartTime(before_=datetime.now(UTC)),
        id=filters.FlowRunFilterId(not_any_=[UUID(besides)]),
    )
    mine = filters.DeploymentFilter(id=filters.DeploymentFilterId(any_=[UUID(deployment)]))
    count = offset = 0
    with get_client(sync_client=True) as client:
        usual = client.read_deployment(UUID(deployment)).parameters
        while page := client.read_flow_runs(flow_run_filter=overdue, deployment_filter=mine, limit=200, offset=offset):
            for run in page:
                if run.parameters == usual:
                    client.set_flow_run_state(run.id, Cancelled(message=MISSED), force=True)
                    count += 1
                else:
                    offset += 1
    if count:
        logger.info("%d runs that were missed are done by this one", count)
    return count
