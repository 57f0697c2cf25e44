"""Adapters that are live together: judged together before they are, and distilled into one where they fail."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fade.config import load_request
from fade.errors import ConfigError
from fade.evaluation.gate import strictest
from fade.files import read_json, sha256_file
from fade.lineage import module_closure
from fade.steps.combine import combine
from fade.steps.evaluate import judge_gate
from flows.approval import Approved, named
from flows.settings import ERASURES
from tasks._tracking import MODEL_PREFIX, AdapterVersion

COMBINATIONS = Path("data/combinations")


@dataclass(slots=True)
class Board:
    """What is said on the versions' pages at the end; ``together`` is how a version did with everything live."""

    refused: dict[str, str] = field(default_factory=dict)
    waiting: dict[str, str] = field(default_factory=dict)
    together: dict[str, str] = field(default_factory=dict)


def fitting_together(
    live: Sequence[Approved], new: Sequence[Approved], board: Board, between: Callable[[], None] | None
) -> list[Approved]:
    """What goes live; what a wider adapter takes over waits, and says so."""
    chosen = _fitting(live, new, board, between)
    for one in (*live, *new):
        if one not in chosen and one.name not in board.waiting:
            board.waiting[one.name] = _clash(one, chosen)
    return chosen


def _fitting(
    live: Sequence[Approved], new: Sequence[Approved], board: Board, between: Callable[[], None] | None
) -> list[Approved]:
    """Everything if it holds together, else as much as holds, one after the other."""
    chosen = list(live)
    fitting: list[Approved] = []
    for one in new:
        if clash := _clash(one, [*chosen, *fitting]):
            board.waiting[one.name] = clash
        else:
            fitting.append(one)
    if fitting:
        everything = _joined(chosen, fitting)
        if _holds(everything, fitting, board, between) is None:
            return everything
    for one in fitting:
        trial = _joined(chosen, [one])
        reason = _holds(trial, [one], board, between)
        if reason is None:
            chosen = trial
        else:
            board.waiting[one.name] = f"together with what is live, {reason}"
    return chosen


def _joined(live: Sequence[Approved], new: Sequence[Approved]) -> list[Approved]:
    """Live adapters, less those whose model or whose concepts a new one takes over, and the new ones."""
    kept = [
        one
        for one in live
        if not any(one.version.model == other.version.model or one.concepts < other.concepts for other in new)
    ]
    return [*kept, *[one for one in new if not any(one.concepts < other.concepts for other in new)]]


def _clash(one: Approved, others: Sequence[Approved]) -> str:
    """Why two adapters cannot be live together: a concept is erased once."""
    for other in others:
        if one.version.model == other.version.model or one.concepts.isdisjoint(other.concepts):
            continue
        if one.concepts < other.concepts:
            return f"all that it erases is erased by {other.name}, which is approved too"
        if not other.concepts < one.concepts:
            return f"it erases something that {other.name} erases too; roll that one back first"
    return ""


def _holds(
    chosen: Sequence[Approved], new: Sequence[Approved], board: Board, between: Callable[[], None] | None
) -> str | None:
    """None if these adapters pass the gate together, else the reason; what came of it is said of the new ones."""
    try:
        gate = judge_together(chosen, between=between) if len(chosen) > 1 else None
    except ConfigError as error:
        return f"it cannot be tested: {error}"
    board.together |= dict.fromkeys((one.name for one in new), told(chosen, gate))
    return None if gate is None or gate["passed"] else f"it fails the gate: {'; '.join(gate['reasons'])}"


def told(chosen: Sequence[Approved], gate: Mapping[str, Any] | None) -> str:
    """How adapters did together, for their pages; one alone (no ``gate``) was judged by its own evaluation."""
    if gate is None:
        return "nothing else is live on this base"
    figures = ", ".join(f"{name.upper()} {value:.2%}" for name, value in gate["figures"].items())
    verdict = "passes the gate" if gate["passed"] else "fails the gate"
    return f"{verdict} with {len(chosen) - 1} other{'s' if len(chosen) > 2 else ''} ({figures})"


def combination_folder(chosen: Sequence[Approved]) -> Path:
    """Named by everything that decides the result: adapters, base, protocol, judges and code."""
    first = chosen[0].request
    made_by = {
        "adapters": sorted(one.version.adapter_sha256 for one in chosen),
        "base": first.base_sha256,
        "settings": first.evaluate.model_dump(mode="json"),
        "judges": [sha256_file(path) for path in sorted(Path(first.judges).glob("*.safetensors"))],
        "code": [sha256_file(path) for path in module_closure("fade.steps.combine")],
    }
    digest = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()
    return COMBINATIONS / f"r{digest[:15]}"


def judge_together(chosen: Sequence[Approved], *, between: Callable[[], None] | None = None) -> dict[str, Any]:
    """The gate's verdict and ``figures`` of adapters that are live together; measured once, kept for the next time.

    Raises:
        ConfigError: they differ in what they are judged by.
    """
    folder = combination_folder(chosen)
    if not (folder / "metrics.json").is_file():
        ordered = sorted(chosen, key=lambda one: one.version.adapter_sha256)
        for _ in combine([one.folder for one in ordered], folder, adapters=[one.adapter for one in ordered]):
            if between is not None:
                between()
    report = read_json(folder / "metrics.json")["judges"]["report"]
    figures = {name: report["after"][name]["value"] for name in ("ua", "ira", "cra")}
    return {**judge_gate(report, strictest([one.request.gate for one in chosen])), "figures": figures}


def offer_consolidated(chosen: Sequence[Approved], everything: Sequence[AdapterVersion], board: Board) -> None:
    """Where adapters fail together: name the one adapter for all of it, or begin to distil it."""
    failing = [name for name, reason in board.waiting.items() if "fails the gate" in reason]
    if not failing:
        return
    wanted = frozenset().union(*(one.concepts for one in chosen))
    found = [one for one in everything if one.base_sha256 == chosen[0].version.base_sha256 and _erases(one) == wanted]
    if not found:
        start_consolidation([one.folder.name for one in chosen])
        said = "one adapter for all of it is being distilled"
    elif found[-1].gate == "passed":
        said = f"approve {named(found[-1])}, which erases all of it at once"
    else:
        said = f"{named(found[-1])}, which erases all of it at once, failed its gate too"
    for name in failing:
        board.waiting[name] += f"; {said}"


def _erases(version: AdapterVersion) -> frozenset[str]:
    folder = ERASURES / version.model.removeprefix(MODEL_PREFIX)
    if not (folder / "request.yaml").is_file():
        return frozenset()
    return frozenset(pair.concept for pair in load_request(folder).pairs)


_consolidations: dict[frozenset[str], subprocess.Popen[bytes]] = {}


def start_consolidation(erasures: Sequence[str]) -> subprocess.Popen[bytes]:
    """Distil several erasures into one adapter in a process of its own, unless this program did so before."""
    key = frozenset(erasures)
    if key not in _consolidations:
        with Path(".fade/consolidate.log").open("ab") as log:
            command = [sys.executable, "-m", "flows.cli", "consolidate", *sorted(key)]
            _consolidations[key] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    return _consolidations[key]


def wait_for_consolidations() -> None:
    """Wait until all that was begun has ended."""
    for process in _consolidations.values():
        process.wait()
