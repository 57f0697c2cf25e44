"""When a flow runs: cron lines, checked before anything starts."""

from __future__ import annotations

from fade.errors import ConfigError


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
