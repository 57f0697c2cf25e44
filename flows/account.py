"""Who gives a command."""

from __future__ import annotations

import os
import pwd


def this_user() -> str:
    """Who gives a command: the account of this process on this machine, and the one it has with MLflow's server."""
    uid = os.getuid()
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = "no name"
    server, user = os.environ.get("MLFLOW_TRACKING_URI", ""), os.environ.get("MLFLOW_TRACKING_USERNAME")
    return f"{name} (uid {uid})" + (f", MLflow user {user}" if user and server.startswith("http") else "")
