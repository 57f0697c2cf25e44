"""Databases and a file of settings for the services as processes: python infra/native/prepare.py PROJECT.

PostgreSQL and RabbitMQ must run on loopback. Writes PROJECT/.fade/native.env, with secrets of its own, readable by
its owner alone; one that is there is kept.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
from pathlib import Path

import psycopg
from psycopg import sql

PORTS = {"S3": 9000, "MLFLOW": 5000, "PREFECT": 4200, "INTAKE": 8700, "RUNTIME": 8080}


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("project", type=Path)
    parser.add_argument("--postgresql", default="postgresql://postgres@127.0.0.1:5432", help="server and user")
    parser.add_argument("--queue", default="amqp://guest:guest@127.0.0.1:5672//")
    parser.add_argument("--prefix", default="fade", help="of the databases' names")
    parser.add_argument("--ports", type=int, default=0, help="added to every port, if the usual ones are taken")
    parser.add_argument("--cron", default="*/5 * * * *", help="when the drain looks")
    given = parser.parse_args()
    databases = {name: f"{given.prefix}_{name}" for name in ("ledger", "mlflow", "prefect")}
    with psycopg.connect(f"{given.postgresql}/postgres", autocommit=True) as admin:
        have = {row[0] for row in admin.execute("SELECT datname FROM pg_database")}
        for name in sorted(set(databases.values()) - have):
            admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    path = given.project / ".fade" / "native.env"
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        private(path, "".join(f"{name}={shlex.quote(value)}\n" for name, value in variables(given, databases).items()))
        # MLflow reads the address of its users' database from a file alone.
        auth = "[mlflow]\ndefault_permission = NO_PERMISSIONS\n"
        auth += f"database_uri = {address(given.postgresql, 'psycopg', databases['mlflow'])}\n"
        auth += "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        private(path.parent / "mlflow-auth.ini", auth)
    print(f"honcho --env {path} --procfile infra/native/Procfile start")


def private(path: Path, text: str) -> None:
    """Write a file that its owner alone may read: addresses may hold passwords."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(text)


def address(server: str, driver: str, database: str) -> str:
    """A database for SQLAlchemy."""
    return f"{server.replace('postgresql://', f'postgresql+{driver}://')}/{database}"


def variables(given: argparse.Namespace, databases: dict[str, str]) -> dict[str, str]:
    """The file's content."""
    ports = {f"NATIVE_{name}_PORT": str(port + given.ports) for name, port in PORTS.items()}
    password, prefect = secrets.token_urlsafe(24), f"fade:{secrets.token_urlsafe(24)}"
    return {
        **ports,
        "NATIVE_CRON": given.cron,
        "FADE_ROOT": str(given.project.resolve()),
        "FADE_LOG_FORMAT": "json",
        "FADE_LOG_LEVEL": "INFO",
        "FADE_LEDGER_URL": address(given.postgresql, "psycopg", databases["ledger"]),
        "FADE_QUEUE_URL": given.queue,
        **{
            f"FADE_{name}": secrets.token_urlsafe(24)
            for name in ("LEDGER_KEY", "INTAKE_TOKEN", "SERVICE_TOKEN", "WEBHOOK_SECRET", "MLFLOW_WEBHOOK_SECRET")
        },
        "PREFECT_API_URL": f"http://127.0.0.1:{ports['NATIVE_PREFECT_PORT']}/api",
        "PREFECT_API_DATABASE_CONNECTION_URL": address(given.postgresql, "asyncpg", databases["prefect"]),
        "PREFECT_API_AUTH_STRING": prefect,
        "PREFECT_SERVER_API_AUTH_STRING": prefect,
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://127.0.0.1:{ports['NATIVE_PREFECT_PORT']}",
        "PREFECT_UI_API_URL": "/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{ports['NATIVE_MLFLOW_PORT']}",
        "MLFLOW_TRACKING_USERNAME": "admin",
        "MLFLOW_TRACKING_PASSWORD": password,
        "MLFLOW_AUTH_ADMIN_USERNAME": "admin",
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_AUTH_CONFIG_PATH": str((given.project / ".fade" / "mlflow-auth.ini").resolve()),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_urlsafe(24),
        "MLFLOW_BACKEND_STORE_URI": address(given.postgresql, "psycopg", databases["mlflow"]),
        "MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{ports['NATIVE_S3_PORT']}",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "AWS_ACCESS_KEY_ID": "fade",
        "AWS_SECRET_ACCESS_KEY": "fade-native",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }


if __name__ == "__main__":
    main()
