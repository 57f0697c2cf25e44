"""What stands in infra/ is checked by the tools that packages bring; no container engine is needed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from compose_spec import PyCompose
from prometheus_client import generate_latest
from prometheus_client.core import CollectorRegistry

from fade.environment import variables
from fade.lineage import ROOT
from fade.requests.durations import Durations
from fade.requests.ledger import Ledger
from fade.requests.states import State
from flows.services.intake_http import LedgerMetrics
from flows.services.runtime_http import RuntimeMetrics
from tests.databases import missing

INFRA = ROOT / "infra"
KUBERNETES = "1.32"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """The compose file, its variables filled in as compose does."""
    given = dict(re.findall(r"^(\w+)=(.*)$", (INFRA / "compose.example.env").read_text(), re.MULTILINE))
    text = (INFRA / "compose.yaml").read_text()
    asked = set(re.findall(r"\$\{(\w+)", text))
    assert asked == set(given), "compose.example.env names exactly what compose.yaml asks for"
    filled = re.sub(r"\$\{(\w+)(?::[?-][^}]*)?\}", lambda found: given[found[1]] or "x" * 16, text)
    content: dict[str, Any] = yaml.safe_load(filled)
    return content


def rendered(name: str) -> list[dict[str, Any]]:
    """The objects that a kustomization stands for."""
    if shutil.which("kubectl") is None:
        missing("kubectl")
    done = subprocess.run(
        ["kubectl", "kustomize", str(INFRA / "kubernetes" / name)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture(scope="module")
def objects() -> list[dict[str, Any]]:
    return rendered("base")


def workloads(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Name to pod specification."""
    found = {}
    for one in objects:
        spec = one.get("spec", {})
        spec = spec.get("jobTemplate", {}).get("spec", spec)
        if "template" in spec:
            found[one["metadata"]["name"]] = spec["template"]["spec"]
    return found


def test_the_compose_file_is_valid_by_the_specification(compose: dict[str, Any]) -> None:
    parsed = PyCompose.from_yaml(yaml.safe_dump(compose))
    parsed.validate()
    assert {"postgres", "rabbitmq", "store", "mlflow", "prefect", "intake", "release", "runtime"} <= set(
        parsed.service_names()
    )
    broken = json.loads(json.dumps(compose))
    broken["services"]["intake"]["imagee"] = "x"
    with pytest.raises(ValueError, match="imagee"):
        PyCompose.from_yaml(yaml.safe_dump(broken))


def test_compose_services_are_pinned_local_and_wait_for_what_is_there(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for name, one in services.items():
        assert re.search(r":[\w.-]+$", one["image"]), name
        assert not one["image"].endswith(":latest"), name
        assert one["networks"] == ["fade"], name
        assert all(port.startswith("127.0.0.1:") for port in one.get("ports", ())), name
        for other, how in one.get("depends_on", {}).items():
            assert other in services, f"{name} waits for {other}"
            if how["condition"] == "service_healthy":
                assert "healthcheck" in services[other], f"{name} waits for {other}, which says nothing of its health"


def test_only_known_variables_and_commands_are_used(compose: dict[str, Any], objects: list[dict[str, Any]]) -> None:
    import typer

    from flows.cli.app import app

    group = typer.main.get_command(app)
    containers = [*compose["services"].items()]
    containers += [(name, pod["containers"][0]) for name, pod in workloads(objects).items()]
    for line in (INFRA / "native/Procfile").read_text().splitlines():
        name, _, command = line.partition(": ")
        containers.append((name, {"command": command.rpartition("exec ")[2].replace('"', "").split()}))
    ran = set()
    for name, one in containers:
        environment = one.get("environment") or {}
        assert {key for key in environment if key.startswith("FADE_")} <= set(variables()), name
        command = one.get("args") or one.get("command") or []
        if command[:1] == ["fade"]:
            arguments = [
                "* * * * *" if part == "$NATIVE_CRON" else part.replace("$NATIVE_", "1") for part in command[2:]
            ]
            arguments = [re.sub(r"1\w+_PORT", "8000", part) for part in arguments]
            group.commands[command[1]].make_context(command[1], arguments)  # type: ignore[attr-defined]
            ran.add(command[1])
    assert {"intake", "intake-http", "drain", "release", "webhooks", "serve"} <= ran


def test_dockerfiles_pass_hadolint_and_run_as_nobody_in_particular() -> None:
    hadolint = shutil.which("hadolint")
    assert hadolint, "pip install -c constraints.txt -e '.[dev]'"
    path = INFRA / "docker/Dockerfile"
    done = subprocess.run([hadolint, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    text = path.read_text()
    assert text.count("FROM ") == 2
    assert "USER 10001" in text
    assert not re.search(r"(?i)(ARG|ENV)\s+\w*(TOKEN|SECRET|PASSWORD|KEY)", text)
    for source in re.findall(r"^COPY (?!--from)(?:--\S+ )*(.+) \S+$", text, re.MULTILINE):
        for name in source.split():
            assert (ROOT / name).exists(), name
            assert f"!{name}" in (ROOT / ".dockerignore").read_text(), name
    assert "sh" in (INFRA / "docker/start.sh").read_text().splitlines()[0]
    assert os.access(INFRA / "docker/start.sh", os.X_OK)
    assert subprocess.run(["sh", "-n", str(INFRA / "docker/start.sh")], check=False).returncode == 0


@pytest.mark.parametrize("name", ["base", "gpu"])
def test_kubernetes_objects_are_valid(name: str) -> None:
    found = rendered(name)
    assert len(found) > 15
    for one in found:
        kubernetes_validate.validate(one, KUBERNETES, strict=True)
    found[-1]["spec"]["nonsense"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(found[-1], KUBERNETES, strict=True)


def test_pods_are_restricted_limited_and_probed(objects: list[dict[str, Any]]) -> None:
    pods = workloads(objects)
    assert {"mlflow", "prefect", "intake", "drain", "release", "runtime", "backup", "prepare"} <= set(pods)
    for name, pod in pods.items():
        (container,) = pod["containers"]
        assert pod["enableServiceLinks"] is False, "service links would be unknown FADE_ variables"
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert container["securityContext"]["readOnlyRootFilesystem"] is True, name
        assert container["securityContext"]["allowPrivilegeEscalation"] is False, name
        assert container["resources"]["limits"]["memory"], name
        if name not in ("backup", "prepare"):
            assert "livenessProbe" in container, name
    for one in objects:
        if one["kind"] == "Service":
            pod = pods[one["spec"]["selector"]["app.kubernetes.io/name"]]
            assert "readinessProbe" in pod["containers"][0], one["metadata"]["name"]


def test_secrets_are_named_in_the_example_and_empty_there(objects: list[dict[str, Any]]) -> None:
    example = yaml.safe_load((INFRA / "kubernetes/base/secret.example.yaml").read_text())
    kubernetes_validate.validate(example, KUBERNETES, strict=True)
    assert not any(example["stringData"].values())
    asked = set()
    for name, pod in workloads(objects).items():
        for one in pod["containers"][0].get("env") or ():
            key = one.get("valueFrom", {}).get("secretKeyRef")
            if key:
                assert key["name"] == example["metadata"]["name"], name
                asked.add(key["key"])
        for one in pod.get("volumes") or ():
            asked |= {item["key"] for item in one.get("secret", {}).get("items", ())}
    assert asked
    assert asked == set(example["stringData"])
    assert not any(one["kind"] == "Secret" for one in objects)


def test_the_gpu_overlay_asks_for_a_gpu_where_pictures_are_drawn() -> None:
    pods = workloads(rendered("gpu"))
    for name, pod in pods.items():
        asks = "nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"]
        assert asks is (name in ("drain", "runtime")), name
        assert ("nodeSelector" in pod) is asks
        assert pod["containers"][0]["image"].endswith(":cuda")


def test_network_policies_deny_first_and_name_pods_that_exist(objects: list[dict[str, Any]]) -> None:
    policies = {one["metadata"]["name"]: one["spec"] for one in objects if one["kind"] == "NetworkPolicy"}
    assert policies["deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    names = set(workloads(objects))
    for name, spec in policies.items():
        for expression in spec["podSelector"].get("matchExpressions", ()):
            assert set(expression["values"]) <= names, name
        label = spec["podSelector"].get("matchLabels", {}).get("app.kubernetes.io/name")
        assert label is None or label in names


def secrets_of(pod: dict[str, Any]) -> set[str]:
    """Names of the secrets that a pod is given."""
    given = {one["valueFrom"]["secretKeyRef"]["key"] for one in _variables(pod) if "secretKeyRef" in one["valueFrom"]}
    return given.union(*({i["key"] for i in v.get("secret", {}).get("items", ())} for v in pod["volumes"]))


def _variables(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for one in pod["containers"][0]["env"] if "valueFrom" in one]


def test_what_faces_the_internet_holds_no_secret_but_what_it_needs(objects: list[dict[str, Any]]) -> None:
    pods = workloads(objects)
    assert {"FADE_SIGNING_KEY", "MLFLOW_TRACKING_PASSWORD", "FADE_LEDGER_URL"} <= secrets_of(pods["release"])
    assert secrets_of(pods["runtime"]) == {"FADE_SERVICE_TOKEN", "FADE_PUBLIC_KEY"}
    assert secrets_of(pods["intake-http"]) == {"FADE_INTAKE_TOKEN", "FADE_LEDGER_URL", "FADE_LEDGER_KEY"}
    assert "envFrom" not in pods["runtime"]["containers"][0]
    mounts = {one["mountPath"]: one for one in pods["runtime"]["containers"][0]["volumeMounts"]}
    assert {one["subPath"] for one in mounts.values() if one["name"] == "project"} == {"data/base", "data/release"}
    assert all(one["readOnly"] for one in mounts.values() if one["name"] in ("project", "public-key"))
    claims = {one["name"]: one.get("persistentVolumeClaim", {}).get("claimName") for one in pods["runtime"]["volumes"]}
    assert claims["state"] == "runtime-state", "counters that were seen outlive the pod"
    assert mounts["/state"]["name"] == "state"
    assert not any(one["name"] == "project" for one in pods["intake-http"]["volumes"])


def test_only_workers_reach_prefect_and_mlflow(objects: list[dict[str, Any]]) -> None:
    policies = {one["metadata"]["name"]: one["spec"] for one in objects if one["kind"] == "NetworkPolicy"}
    (rule,) = policies["servers"]["ingress"]
    (source,) = rule["from"]
    assert source["podSelector"]["matchExpressions"][0]["values"] == ["drain", "release"]
    assert policies["stores"]["podSelector"]["matchExpressions"] == [
        {"key": "app.kubernetes.io/name", "operator": "NotIn", "values": ["runtime"]}
    ]


def test_compose_gives_the_runtime_what_is_released_alone_and_starts_no_open_server(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert "FADE_LEDGER_URL" in services["drain"]["environment"]
    runtime = services["runtime"]
    words = ("LEDGER", "QUEUE", "MLFLOW", "PREFECT", "SIGNING")
    assert not [name for name in runtime["environment"] if any(word in name for word in words)]
    mounted = {one["target"]: one for one in runtime["volumes"]}
    state = runtime["environment"]["XDG_STATE_HOME"]
    assert not mounted.pop(state).get("read_only")
    assert not any(entry.startswith(state) for entry in runtime["tmpfs"]), "counters that were seen outlive it"
    assert all(one["read_only"] for one in mounted.values())
    assert {one["volume"]["subpath"] for one in mounted.values() if one["source"] == "project"} == {
        "data/base",
        "data/release",
    }
    # An empty password is refused, and so is one that nobody set.
    text = (INFRA / "compose.yaml").read_text()
    assert set(re.findall(r"\$\{(\w+):-", text)) == {"FADE_IMAGE", "FADE_PUBLIC_HOSTS"}
    assert "GRAFANA_PASSWORD:?" in text
    native = (INFRA / "native/Procfile").read_text()
    commands = [" ".join(services["prefect"]["command"]), native]
    assert all("flows.services.servers:prefect" in one and "prefect server start" not in one for one in commands)
    for one in (native, (INFRA / "docker/start.sh").read_text()):
        assert "--app-name fade-users" in one


def test_the_work_pools_job_is_valid_once_its_variables_are_filled_in() -> None:
    template = json.loads((INFRA / "kubernetes/work-pool.json").read_text())
    defaults = {name: one.get("default", {}) for name, one in template["variables"]["properties"].items()}
    defaults |= {"command": ["prefect", "flow-run", "execute"], "env": [{"name": "A", "value": "1"}]}
    text = json.dumps(template["job_configuration"]["job_manifest"])
    asked = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(template["job_configuration"])))
    assert asked == set(defaults)
    text = re.sub(r'"\{\{ (\w+) \}\}"', lambda found: json.dumps(defaults[found[1]]), text)
    text = re.sub(r"\{\{ (\w+) \}\}", lambda found: str(defaults[found[1]]), text)
    kubernetes_validate.validate(json.loads(text), KUBERNETES, strict=True)


def exported(folder: Path) -> set[str]:
    """Names of all time series that intake and runtime export."""

    class Idle:
        manifest = None

    registry = CollectorRegistry()
    with Ledger(f"sqlite:///{folder / 'ledger.db'}") as ledger:
        registry.register(LedgerMetrics(ledger, Durations()))
        text = generate_latest(registry).decode()
    figures = RuntimeMetrics(Idle())  # type: ignore[arg-type]
    figures.drawn.labels("live").inc()
    figures.seconds.observe(1)
    text += generate_latest(figures.registry).decode()
    return set(re.findall(r"^(fade_\w+)", text, re.MULTILINE))


def test_dashboard_and_alerts_use_what_the_code_exports(tmp_path: Path) -> None:
    known = exported(tmp_path)
    assert {"fade_requests", "fade_pictures_total", "fade_picture_seconds_bucket"} <= known
    board = json.loads((INFRA / "observability/dashboard.json").read_text())
    rules = yaml.safe_load((INFRA / "observability/alerts.yaml").read_text())["groups"][0]["rules"]
    used = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    used += [rule["expr"] for rule in rules]
    assert len(used) > 15
    for expression in used:
        for name in re.findall(r"\bfade_\w+", expression):
            assert name in known, expression
        for state in re.findall(r'state="(\w+)"', expression):
            assert state in set(State), expression
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_every_alert_is_in_the_runbook() -> None:
    runbook = (ROOT / "docs/operations.md").read_text()
    rules = yaml.safe_load((INFRA / "observability/alerts.yaml").read_text())["groups"][0]["rules"]
    for rule in rules:
        assert f"### {rule['alert']}" in runbook
        assert {"severity"} <= set(rule["labels"])


@pytest.mark.parametrize("name", ["requirements-build.lock", "requirements.lock", "requirements-dev.lock"])
def test_the_locks_hold_hashes_of_the_versions_that_were_tried_and_no_address(name: str) -> None:
    text = (ROOT / name).read_text()
    assert "://" not in text
    pinned = dict(re.findall(r"^([\w.-]+)==([^\s\\]+) \\\n    --hash=sha256:[0-9a-f]{64}", text, re.MULTILINE))
    assert len(pinned) == len(re.findall(r"^[\w.-]+==", text, re.MULTILINE)) > 2, "each has a hash"
    assert "torch" not in pinned, "its build is what pip is told"
    tried = {
        re.sub(r"[-_.]+", "-", one).lower(): version
        for one, version in re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    }
    assert not {one: version for one, version in pinned.items() if tried.get(one, version) != version}, "make lock"
    used = (ROOT / "Makefile").read_text() + (INFRA / "docker/Dockerfile").read_text()
    assert re.search(rf"--require-hashes --no-deps (--no-build-isolation )?-r {name}", used)
