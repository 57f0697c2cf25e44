"""``fade doctor``: everything a newcomer can get wrong, a line each, with what to do.

A check looks and changes nothing: it makes no database, moves no table, starts no service.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

from fade.environment import FILE, environment, readable_by_others
from fade.errors import ConfigError, FadeError, RegistryError, listing
from fade.files import read_json
from fade.lineage import ROOT, processor_kind
from fade.models.source import is_hub_name
from fade.project import load_projects
from fade.requests import brokers, intake, sealing, tables
from fade.requests.records import clock, utc_now
from flows.operations import doctor_servers
from flows.operations.findings import Finding
from flows.services.local import HOST
from flows.settings import PREFECT_AUTH, STATE
from tasks.mlflow.embedded import SERVICES

PORTS = {"MLflow": 5000, "Prefect": 4200, "fade serve": 8080, "fade intake-http": 8700}
DISK_FAIL_BYTES, DISK_WARN_BYTES = 1_000_000_000, 5_000_000_000
"""A demo writes a few hundred megabytes; a full disk in the middle of a step costs the step."""
CLOCK_SECONDS = 5.0
PRIVATE = ("environment", "keys/signing.pem", "keys/ledger.key", PREFECT_AUTH.name, "intake-token", "native.env")
MUST = {"fastapi": "0.151", "sqlalchemy": "2.1"}
"""Versions from which on Prefect 3.8 starts no server (FastAPI) or never schedules (SQLAlchemy)."""


def python_version(found: tuple[int, int] | None = None) -> Finding:
    """The interpreter."""
    major, minor = found or sys.version_info[:2]
    said = f"Python {major}.{minor}"
    if (major, minor) in ((3, 11), (3, 12)):
        return Finding("python", "ok", said)
    return Finding(
        "python", "fail", f"{said}; expected 3.11 or 3.12", "Make the environment anew: make PYTHON=python3.12"
    )


def settings() -> Finding:
    """Variables and their file: known names, values that fit."""
    try:
        environment()
    except FadeError as error:
        return Finding("settings", "fail", str(error), "Correct or unset the variable")
    return Finding("settings", "ok", f"variables are known{f', {FILE} is read' if FILE.is_file() else ''}")


def pins(constraints: Path | None = None) -> Finding:
    """Installed versions against constraints.txt; those that break Prefect are a failure."""
    broken = [
        f"{name} {_version(name)} (must be below {limit})" for name, limit in MUST.items() if _breaks(name, limit)
    ]
    if broken:
        return Finding("pins", "fail", listing(broken), "pip install -c constraints.txt -e '.[pipeline]'")
    path = constraints or ROOT / "constraints.txt"
    if not path.is_file():
        return Finding("pins", "warn", f"no {path.name} beside the code, so versions were not compared")
    rows = re.findall(r"^([A-Za-z0-9_.\-]+)==(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    other = [
        f"{name} {found} (tried: {pinned})"
        for name, pinned in rows
        if (found := _version(name)) is not None and found.split("+")[0] != pinned
    ]
    if other:
        return Finding(
            "pins", "warn", f"not as tried: {listing(other)}", "pip install -c constraints.txt -e '.[pipeline]'"
        )
    return Finding("pins", "ok", f"all {len(rows)} versions that are installed are as tried")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _breaks(name: str, limit: str) -> bool:
    found = _version(name)
    return found is not None and _numbers(found) >= _numbers(limit)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def torch_build(version: str | None = None, precision: str | None = None) -> Finding:
    """Which build of torch, and in which precision it is fast here."""
    import torch

    from fade.hardware import fast_precision

    fast = precision or fast_precision()
    said = f"torch {version or torch.__version__}, fast in {fast}"
    if fast == "fp32":
        return Finding(
            "torch", "warn", said, "Nothing is wrong; without bfloat16 an erasure takes several times as long"
        )
    return Finding("torch", "ok", said)


def gpu() -> Finding:
    """Which GPU models compute on, and whether there is one that torch does not see."""
    import torch

    from fade.hardware import compute_device

    device = compute_device()
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
        return Finding("gpu", "ok", f"{device}: {name}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free")
    if torch.cuda.is_available():
        return Finding("gpu", "warn", "there is a GPU, and FADE_DEVICE is cpu", "Leave FADE_DEVICE out to use it")
    if shutil.which("nvidia-smi") and Path("/dev/nvidia0").exists():
        return Finding("gpu", "warn", "there is a GPU that torch does not see", "Install a CUDA build of torch")
    if torch.version.cuda:
        return Finding("gpu", "warn", "torch is a CUDA build and finds no GPU", "The CPU build is gigabytes smaller")
    return Finding("gpu", "ok", "none, and none is needed for the built-in base")


def disk(folder: Path = Path(), *, free: int | None = None) -> Finding:
    """Space for what an erasure writes."""
    left = shutil.disk_usage(folder).free if free is None else free
    said = f"{left / 1e9:.1f} GB free in {folder.resolve()}"
    if left < DISK_FAIL_BYTES:
        return Finding("disk", "fail", said, "Free at least 5 GB; old trials: data/trials, DVC's cache: dvc gc")
    if left < DISK_WARN_BYTES:
        return Finding("disk", "warn", said, "Free some: 5 GB is comfortable")
    return Finding("disk", "ok", said)


def permissions(state: Path = STATE) -> Finding:
    """The state can be written, and secrets are their owner's alone."""
    for folder in (Path(), Path("data"), state):
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
            return Finding("permissions", "fail", f"{folder.resolve()} cannot be written", "chown or chmod it")
    secret = [state / name for name in PRIVATE]
    url = tables.ledger_url(environment().ledger_url)
    if url.drivername == "sqlite" and url.database:
        secret.append(Path(url.database))  # names lie in it
    open_ = [str(path) for path in secret if path.is_file() and readable_by_others(path)]
    if open_:
        return Finding("permissions", "fail", f"others can read {listing(open_)}", f"chmod 600 {' '.join(open_)}")
    return Finding("permissions", "ok", "state can be written, secrets and the ledger are private")


def ports(wanted: dict[str, int] | None = None) -> Finding:
    """Ports that ``fade ui``, ``serve`` and ``intake-http`` take unless told otherwise."""
    taken = [f"{port} ({name})" for name, port in (wanted or PORTS).items() if _listens(port)]
    if not taken:
        return Finding("ports", "ok", f"{', '.join(str(port) for port in (wanted or PORTS).values())} are free")
    if SERVICES.is_file():
        return Finding("ports", "ok", f"services run: {listing(taken)}")
    return Finding(
        "ports", "warn", f"taken: {listing(taken)}", "Choose others with --port, --mlflow-port, --prefect-port"
    )


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((HOST, port)) == 0


def ledger(url: str | None = None) -> Finding:
    """The ledger's database answers, its tables are this version's, its key is here, and its clock is ours."""
    found = tables.ledger_url(url or environment().ledger_url)
    if found.drivername == "sqlite" and not Path(found.database or "").is_file():
        return Finding("ledger", "ok", f"{found.database} is made at first use")
    engine = tables.open_engine(found)
    try:
        revision = tables.revision(engine)
        if revision == tables.HEAD:
            with engine.connect().execution_options(fade_reading=True) as connection:
                sealing.fitting_key(connection)
                ahead = (utc_now() - clock(connection)).total_seconds()
    except ConfigError as error:
        return Finding("ledger", "fail", str(error), "Copy the key to this machine")
    finally:
        engine.dispose()
    said = f"{found.render_as_string()} has {'no tables' if revision is None else f'tables {revision}'}"
    if revision == tables.HEAD:
        if abs(ahead) > CLOCK_SECONDS:
            said += f"; this machine's clock differs from its by {abs(ahead):.0f} s"
            return Finding("ledger", "warn", said, "Set the clock (NTP): signed webhooks and hooks go by it")
        return Finding("ledger", "ok", said)
    if revision is not None and revision > tables.HEAD:
        return Finding("ledger", "fail", f"{said}; this version knows {tables.HEAD}", "Update fade")
    return Finding("ledger", "warn", f"{said}; this version has {tables.HEAD}", "fade ledger upgrade")


def queue(url: str | None = None) -> Finding:
    """The broker takes our user, password and virtual host; the folder can be made."""
    given = url or environment().queue_url
    if given is None:
        return Finding("queue", "ok", "the folder .fade/queue")
    parts = urlsplit(given)
    if parts.scheme not in ("amqp", "amqps", "redis", "rediss", "folder"):
        return Finding("queue", "warn", f"{parts.scheme or given!r}: addresses are not checked here")
    if parts.scheme == "folder":
        folder = Path(parts.path)
        good = os.access(next(one for one in (folder, *folder.resolve().parents) if one.exists()), os.W_OK)
        return Finding("queue", "ok" if good else "fail", f"folder {folder}", "" if good else "chown or chmod it")
    try:
        return Finding("queue", "ok", brokers.look(given, intake.QUEUE))
    except ConfigError as error:
        return Finding("queue", "fail", str(error), "Correct FADE_QUEUE_URL")
    except RegistryError as error:
        return Finding("queue", "fail", str(error), "Start the broker, or correct FADE_QUEUE_URL")


def recorded(root: Path = ROOT, here: list[str] | None = None) -> Finding:
    """Whether `dvc repro` can give the recorded hashes on this kind of processor."""
    path = root / "data/recorded-on.json"
    if not path.is_file():
        return Finding("recorded hashes", "ok", "none are kept here")
    there, here = read_json(path)["processor"], here or processor_kind()
    if there == here:
        return Finding("recorded hashes", "ok", f"made on a processor of this kind ({', '.join(here)})")
    return Finding(
        "recorded hashes",
        "warn",
        f"dvc.lock was made on {', '.join(there)}, this is {', '.join(here)}: other routines round the last bits "
        "otherwise, so `dvc repro` gives other hashes here",
        "Audit on a processor of that kind, or compare by `fade audit`, which says by how much they differ",
    )


def releases(url: str | None = None) -> Finding:
    """What is live is the same by the signed manifests, the ledger and MLflow."""
    from fade.adapters.manifest import MANIFEST_NAME
    from fade.requests import tables
    from flows.releasing.released import RELEASES

    if not list(RELEASES.glob(f"*/{MANIFEST_NAME}")):
        return Finding("release", "ok", "nothing was released yet")
    found = tables.ledger_url(url or environment().ledger_url)
    if found.drivername == "sqlite" and not Path(found.database or "").is_file():
        return Finding("release", "fail", "something is live, and there is no ledger", "fade restore DIR")
    from fade.requests.ledger import Ledger
    from flows.releasing.reconcile import compare

    with Ledger(url) as ledger:
        odd = [one for one in compare(ledger) if one.live]
    if odd:
        said = f"{len(odd)} differences of ledger, manifests and MLflow; the first: {odd[0].name}: {odd[0].said}"
        return Finding("release", "fail", said, "fade reconcile")
    return Finding("release", "ok", "ledger, manifests and MLflow say the same of what is live")


def files(given: Sequence[Path] | None = None) -> Finding:
    """Base, judges and catalog of every project that is served are there; what is on the hub is not asked for."""
    projects = load_projects(given or environment().projects).served
    missing = []
    for one in projects:
        models = [one.base] + ([one.clip] if one.clip is not None else [])
        wanted = [] if one.by_name else [one.judges] + [one.catalog] * (one.render is None)
        wanted += [place for place in models if not is_hub_name(place)]
        missing += [f"{place} of project {one.name}" for place in wanted if not Path(place).exists()]
    if missing:
        return Finding(
            "files",
            "fail",
            f"missing: {listing(missing)}",
            "Bring them back (git checkout -- data, dvc pull), or mend project: in params.yaml",
        )
    later = [one.catalog for one in projects if one.render is not None and not Path(one.catalog).exists()]
    said = f"what params.yaml names is there: {listing(one.name for one in projects)}"
    return Finding("files", "ok", said + (f"; rendered at first use: {listing(later)}" if later else ""))


def programs() -> Finding:
    """git, which lineage and audit call."""
    if shutil.which("git") is None:
        return Finding("programs", "warn", "git is not to be found", "Install it: lineage and fade audit need it")
    return Finding("programs", "ok", "git is there")


CHECKS: tuple[tuple[str, Callable[[], Finding]], ...] = (
    ("python", python_version),
    ("settings", settings),
    ("pins", pins),
    ("torch", torch_build),
    ("gpu", gpu),
    ("programs", programs),
    ("files", files),
    ("recorded hashes", recorded),
    ("disk", disk),
    ("permissions", permissions),
    ("ports", ports),
    ("ledger", ledger),
    ("queue", queue),
    ("release", releases),
    ("mlflow", doctor_servers.mlflow),
    ("prefect", doctor_servers.prefect),
)


def examine() -> Iterator[Finding]:
    """Every check in turn; one that ends in an error of FADE is a failure and stops no other."""
    for name, check in CHECKS:
        try:
            yield check()
        except FadeError as error:
            yield Finding(name, "fail", str(error))
