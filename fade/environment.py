"""What the environment says about services, in one typed place; unknown ``FADE_`` names are errors.

Values come from environment variables, or from a file of them (``.fade/environment``) that the command line reads
first; variables win. The settings of the method itself are not here but in ``params.yaml``.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from fade.errors import ConfigError, listing, nearest

PREFIX = "FADE_"
TEST_PREFIX = "FADE_TEST_"
"""Names that tests alone read."""
INFRA_NAMES = ("FADE_IMAGE",)
"""Names that infra/ and prefect.yaml alone read, from the environment that a command runs in as well."""
FILE = Path(".fade/environment")
_SECRET, _DIFFERENT = 16, 8


class Environment(BaseSettings):
    """Every variable that FADE reads. A field's name is the variable's, in capitals after ``FADE_``."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, env_ignore_empty=True, hide_input_in_errors=True)

    root: Path | None = Field(None, description="The workspace, if a command is not given inside it")
    project: str = Field(
        "params.yaml",
        description="params.yaml of the project that commands are about, or its folder; with commas all that a worker "
        "serves",
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="Where models compute: `cpu`, `cuda`, `cuda:1`; `auto`: on a GPU where there is one",
    )
    ledger_url: str | None = Field(
        None,
        repr=False,
        description="The ledger's database: `postgresql+psycopg://HOST/NAME`; if unset, `.fade/ledger.db`",
    )
    queue_url: str | None = Field(
        None,
        repr=False,
        description="The queue: `amqp://`, `redis://`, `sqs://` or `folder:PATH`; if unset, `.fade/queue`",
    )
    intake_token: SecretStr | None = Field(
        None, description="Bearer token of `fade intake-http`, 16 characters or more"
    )
    service_token: SecretStr | None = Field(None, description="Bearer token of `fade serve`, 16 characters or more")
    webhook_secret: SecretStr | None = Field(None, description="Signs webhooks to senders, 16 characters or more")
    mlflow_webhook_secret: SecretStr | None = Field(
        None, description="Shared with MLflow's webhooks (`fade release --watch`), 16 characters or more"
    )
    mlflow_artifacts: str | None = Field(
        None,
        description="Places (`s3://BUCKET/PREFIX`, by spaces) where MLflow's runs may keep files; if unset, its server "
        "hands them out, or they lie in `.fade/mlartifacts`",
    )
    alert_url: str | None = Field(None, description="Where warnings of near deadlines are sent, as webhooks")
    allowed_hosts: str = Field(
        "",
        pattern=r"^[A-Za-z0-9.,:_\-\[\] ]*$",
        description="Names under which the servers are reached, with commas: `fade.example.org,mlflow:5000`; "
        "IP addresses and localhost are allowed without",
    )
    webhook_networks: str = Field(
        "",
        description="Private networks that webhooks may be sent to, with commas: `10.1.0.0/16,127.0.0.1/32`; "
        "public addresses need none",
    )
    signing_key: SecretStr | None = Field(
        None,
        description="Ed25519 private key as PEM text; if unset, `.fade/keys/signing.pem`, made when something is first "
        "signed and no `public.pem` is there",
    )
    ledger_key: SecretStr | None = Field(
        None,
        description="Seals the ledger's requests, 16 characters or more, the same for all that share the ledger; if "
        "unset, `.fade/keys/ledger.key`, made with the ledger",
    )
    drain_lease_seconds: float = Field(120.0, gt=0, description="Without a sign of life for so long a worker is dead")
    drain_attempts: int = Field(5, ge=1, description="After so many attempts a request is `failed`")
    drain_retry_seconds: float = Field(60.0, ge=0, description="Before the second attempt; doubles, an hour at most")
    drain_running: int = Field(1, ge=1, description="Erasures at once, over all workers")
    log_format: Literal["plain", "json"] = Field(
        "plain", description="`json`: one object a line, with the request's id"
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("WARNING", description="What is logged at least")

    @property
    def allowed_host_names(self) -> tuple[str, ...]:
        """FADE_ALLOWED_HOSTS, one by one."""
        return tuple(one.strip() for one in self.allowed_hosts.split(",") if one.strip())

    @property
    def projects(self) -> tuple[Path, ...]:
        """FADE_PROJECT, one by one."""
        return tuple(Path(one.strip()) for one in self.project.split(",") if one.strip())

    @property
    def networks(self) -> tuple[IPv4Network | IPv6Network, ...]:
        """FADE_WEBHOOK_NETWORKS, one by one."""
        return tuple(ip_network(one.strip()) for one in self.webhook_networks.split(",") if one.strip())

    @field_validator("webhook_networks")
    @classmethod
    def _are_networks(cls, given: str) -> str:
        for one in filter(None, (part.strip() for part in given.split(","))):
            try:
                ip_network(one)
            except ValueError:
                raise ValueError("must be networks with commas, e.g. 10.1.0.0/16,127.0.0.1/32") from None
        return given

    @field_validator("intake_token", "service_token", "webhook_secret", "mlflow_webhook_secret", "ledger_key")
    @classmethod
    def _hard_to_guess(cls, given: SecretStr | None) -> SecretStr | None:
        if given is None:
            return None
        secret = given.get_secret_value()
        make = "Make one: python -c 'import secrets; print(secrets.token_urlsafe(24))'"
        # Blanks add nothing, and at the ends a header does not carry them.
        if (length := len("".join(secret.split()))) < _SECRET:
            raise ValueError(f"must hold at least {_SECRET} characters: got {length}, blanks not counted. {make}")
        if (different := len(set(secret))) < _DIFFERENT:
            raise ValueError(f"must hold at least {_DIFFERENT} different characters: got {different}. {make}")
        if not secret.isascii() or not secret.isprintable() or secret != secret.strip():
            raise ValueError(f"must hold printable ASCII alone and no blanks at its ends. {make}")
        return given


def environment() -> Environment:
    """The settings in force, read anew, so that a change of the environment is seen.

    Raises:
        ConfigError: a ``FADE_`` name is unknown or a value is not what its variable takes; all faults are said
            at once, and no value is shown, since it may be a secret.
    """
    faults = unknown(os.environ)
    try:
        found = Environment()
    except ValidationError as error:
        faults += [f"{_name(fault)} {_said(fault)}" for fault in error.errors(include_input=False)]
    if faults:
        raise ConfigError(listing(faults, 10) + (f" See the table in docs/settings.md, and {FILE}."))
    return found


def unknown(names: Mapping[str, Any]) -> list[str]:
    """A sentence for each ``FADE_`` name that no setting has."""
    known = variables()
    return [
        f"{name} is no setting. {nearest_variable(name)}"
        for name in sorted(names)
        if name.upper().startswith(PREFIX)
        and name.upper() not in known
        and not name.startswith(TEST_PREFIX)
        and name not in INFRA_NAMES
    ]


def nearest_variable(name: str) -> str:
    """A suggestion, without what all names have in common."""
    options = [field.upper() for field in Environment.model_fields]
    said = nearest(name.upper().removeprefix(PREFIX).lower(), [option.lower() for option in options])
    if said.startswith("Did"):
        return said.upper().replace("DID YOU MEAN", "Did you mean").replace(" OR ", " or ").replace("'", "")
    return "No name is like it."


def variables() -> dict[str, str]:
    """Variable to its description."""
    return {f"{PREFIX}{name.upper()}": field.description or "" for name, field in Environment.model_fields.items()}


def load_file(path: Path = FILE) -> None:
    """Put the variables of a file into the environment; those set already win. A missing file is an empty one.

    Raises:
        ConfigError: a line is no ``NAME=VALUE``, or a ``FADE_`` name is unknown.
    """
    if not path.is_file():
        return
    from dotenv import dotenv_values

    values = dotenv_values(path, interpolate=False)
    if wrong := [name for name, value in values.items() if value is None]:
        raise ConfigError(f"{path}: {listing(wrong)}: expected NAME=VALUE on each line.")
    if faults := unknown(values):
        raise ConfigError(f"{path}: {listing(faults, 10)}")
    for name, value in values.items():
        if value:
            os.environ.setdefault(name, value)


def readable_by_others(path: Path) -> bool:
    """Whether anyone but its owner may read a file."""
    return bool(path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO))


def table() -> str:
    """All variables as a Markdown table, for the documentation."""
    rows = ["| variable | default | what it is |", "|---|---|---|"]
    for name, field in Environment.model_fields.items():
        default = (
            "" if field.default in (None, "") else f"`{field.default:g}`" if _number(field) else f"`{field.default}`"
        )
        rows.append(f"| `{PREFIX}{name.upper()}` | {default} | {field.description} |")
    return "\n".join(rows) + "\n"


def _number(field: Any) -> bool:
    return isinstance(field.default, int | float)


def _name(fault: Any) -> str:
    return PREFIX + str(fault["loc"][0]).upper()


def _said(fault: Any) -> str:
    return str(fault["msg"]).removeprefix("Value error, ") + ("" if fault["msg"].endswith((".", "'")) else ".")


if __name__ == "__main__":
    sys.stdout.write(table())
