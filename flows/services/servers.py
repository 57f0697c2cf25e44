"""Prefect's and MLflow's servers as FADE starts them, each behind the check of Host and Origin.

    uvicorn --factory flows.services.servers:prefect --port 4200
    mlflow server --app-name fade ...           loopback, one person
    mlflow server --app-name fade-users ...     with MLflow's users and passwords

MLflow finds the last two by this package's entry points. By itself Prefect checks neither Host nor Origin and answers
any page; MLflow takes every page on loopback, and any name that begins with ``10.``, for its own.
"""

from __future__ import annotations

import os
from typing import Any

from fade.errors import ConfigError
from flows.services.own_origin import OwnOrigin

AUTH_VARIABLE = "PREFECT_SERVER_API_AUTH_STRING"


def prefect() -> Any:
    """Prefect's API and pages.

    Raises:
        ConfigError: there is no string to log in with: who reaches the API runs code where its flows run.
    """
    if not os.environ.get(AUTH_VARIABLE):
        raise ConfigError(
            f"{AUTH_VARIABLE} is not set: Prefect's API would run code for whoever reaches it. "
            "Set it to USER:PASSWORD, and PREFECT_API_AUTH_STRING to the same for all that use it. "
            "`fade up` and `fade ui` do so by themselves."
        )
    from prefect.server.api.server import create_app

    return OwnOrigin(create_app(final=True))


def mlflow() -> Any:
    """MLflow's API and pages, without users."""
    from tasks.mlflow.client import server

    return OwnOrigin(server())


def mlflow_users() -> Any:
    """The same with MLflow's users and passwords."""
    from tasks.mlflow.client import server

    return OwnOrigin(server(users=True))
