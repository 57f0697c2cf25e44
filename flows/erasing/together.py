"""Adapters that are live together: judged together before they are, and distilled into one where they fail."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fade.errors import ConfigError
from fade.evaluation.gate import strictest, verdict
from fade.evaluation.measured import Combination
from fade.evaluation.records import load
from fade.evaluation.verdicts import TO_DECIDE, Verdict
from fade.files import sha256_file
from fade.lineage import content_hash
from fade.spec import load_spec
from fade.steps.alike import COMBINATIONS, check_alike
from flows.releasing.approval import Approved, named
from flows.settings import ERASURES
from tasks.mlflow.tracking import MODEL_PREFIX, AdapterVersion

LOG = Path(".fade/combine.log")
TESTED = "it is being tested together with what is live"


@dataclass(slots=True)
class Board:
    """What is said on the versions' pages at the end, and what has to be found out before more can be said.

    Attributes:
        together: how a version did with everything live.
        unknown: combination to be measured next; empty if there is none.
        failed: folder of a combination that could not be measured, to the reason.
    """

    refused: dict[str, str] = field(default_factory=dict)
    waiting: dict[str, str] = field(default_factory=dict)
    together: dict[str, str] = field(default_factory=dict)
    unknown: tuple[Approved, ...] = ()
    failed: Mapping[Path, str] = field(default_factory=dict)


def fitting_together(live: Sequence[Approved], new: Sequence[Approved], board: Board) -> list[Approved]:
    """What goes live by what is known now; nothing is measured here, so that nothing waits for a measurement.

    What a wider adapter takes over waits, and says so; what is not known yet waits too, and the first
    combination that would tell more is ``board.unknown``.
    """
    chosen = _fitting(live, new, board)
    replaced = {one.model for one in chosen}
    for one in (*live, *new):
        if one not in chosen and one.model not in replaced and one.name not in board.waiting:
            board.waiting[one.name] = _clash(one, chosen)
    return chosen


def _fitting(live: Sequence[Approved], new: Sequence[Approved], board: Board) -> list[Approved]:
    """Everything if it is known to hold together, else as much as is, one after the other."""
    chosen = list(live)
    fitting: list[Approved] = []
    for one in new:
        if clash := _clash(one, [*chosen, *fitting]):
            board.waiting[one.name] = clash
        else:
            fitting.append(one)
    if not fitting:
        return chosen
    everything = joined(chosen, fitting)
    if _holds(everything, fitting, board) == "":
        return everything
    unknown = []
    for one in fitting:
        trial = joined(chosen, [one])
        reason = _holds(trial, [one], board)
        if reason is None:
            unknown.append(one)
        elif reason:
            board.waiting[one.name] = f"together with what is live, {reason}"
        else:
            chosen = trial
    if unknown:
        board.waiting |= dict.fromkeys((one.name for one in unknown), TESTED)
        # One measurement for all of them, if that may settle it.
        whole = joined(chosen, unknown)
        board.unknown = tuple(whole if _holds(whole, [], board) is None else joined(chosen, unknown[:1]))
    return chosen


def joined(live: Sequence[Approved], new: Sequence[Approved]) -> list[Approved]:
    """Live adapters, less those whose model or whose concepts a new one takes over, and the new ones."""
    kept = [one for one in live if not any(one.model == other.model or one.concepts < other.concepts for other in new)]
    return [*kept, *[one for one in new if not any(one.concepts < other.concepts for other in new)]]


def _clash(one: Approved, others: Sequence[Approved]) -> str:
    """Why two adapters cannot be live together: a concept is erased once."""
    for other in others:
        if one.model == other.model or one.concepts.isdisjoint(other.concepts):
            continue
        if one.concepts < other.concepts:
            return f"all that it erases is erased by {other.name}, which is approved too"
        if not other.concepts < one.concepts:
            return f"it erases something that {other.name} erases too; roll that one back first"
    return ""


def _holds(chosen: Sequence[Approved], new: Sequence[Approved], board: Board) -> str | None:
    """Empty if these adapters pass the gate together, else the reason; None while nobody measured it."""
    judged = None
    if len(chosen) > 1:
        if (folder := combination_folder(chosen)) in board.failed:
            return f"it cannot be tested: {board.failed[folder]}"
        try:
            check_alike([one.folder for one in chosen])
        except ConfigError as error:
            return f"it cannot be tested: {error}"
        if (judged := verdict_together(chosen)) is None:
            return None
    board.together |= dict.fromkeys((one.name for one in new), told(chosen, judged))
    if judged is None or judged.gate.passed or let_through(chosen, judged.gate):
        return ""
    return f"it fails the gate: {'; '.join(judged.gate.reasons)}"


def let_through(chosen: Sequence[Approved], gate: Verdict) -> bool:
    """Whether a person's reason for one of these adapters covers what the gate leaves open of all of them.

    What no bound or no judge decides of one is not decided by the others either: whoever let it through alone, with
    this verdict, knew that. A failure together is let through by nobody.
    """
    return gate.for_a_person and gate.verdict in {one.decided for one in chosen}


def told(chosen: Sequence[Approved], judged: Combination | None) -> str:
    """How adapters did together, for their pages; one alone (None) was judged by its own evaluation."""
    if judged is None:
        return "nothing else is live on this base"
    gate = judged.gate
    figures = ", ".join(f"{name.upper()} {found.value:.2%}" for name, found in judged.report.after.rates.items())
    said = "passes the gate" if gate.passed else "fails the gate"
    if let_through(chosen, gate):
        said = f"is {gate.verdict}, as a person let through,"
    return f"{said} with {len(chosen) - 1} other{'s' if len(chosen) > 2 else ''} ({figures})"


def combination_folder(chosen: Sequence[Approved]) -> Path:
    """Named by everything that decides the result: adapters, base, protocol, judges and code."""
    first = chosen[0].spec
    # Those of erasures by name lie in each one's folder.
    judges = dict.fromkeys(one.spec.judges_folder(one.folder) for one in _in_order(chosen))
    made_by = {
        "adapters": sorted(one.adapter_sha256 for one in chosen),
        "base": first.base_sha256,
        "settings": first.evaluate.model_dump(mode="json"),
        "judges": [sha256_file(path) for folder in judges for path in sorted(folder.glob("*.safetensors"))],
    }
    return COMBINATIONS / f"r{content_hash(made_by, module='fade.steps.combine')[:15]}"


def verdict_together(chosen: Sequence[Approved]) -> Combination | None:
    """Figures of adapters that are live together, judged by what they were logged with; None if not measured yet."""
    found = combination_folder(chosen) / "metrics.json"
    if not found.is_file():
        return None
    metrics = load(Combination, found)
    gate = verdict(metrics.report, strictest([one.gate for one in chosen]), metrics.attacks)
    return metrics.model_copy(update={"gate": gate})


def measure_together(chosen: Sequence[Approved]) -> None:
    """Measure adapters that are live together, in this program; kept for ``verdict_together``.

    Raises:
        ConfigError: they differ in what they are judged by.
    """
    from fade.steps.combine import combine  # torch and all that stands on it

    ordered = _in_order(chosen)
    for _ in combine(
        [one.folder for one in ordered], combination_folder(chosen), adapters=[one.adapter for one in ordered]
    ):
        pass


def _in_order(chosen: Sequence[Approved]) -> list[Approved]:
    return sorted(chosen, key=lambda one: one.adapter_sha256)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A combination to be measured.

    Attributes:
        candidate: what is rehearsed; None where an approval waits for the result.
    """

    chosen: tuple[Approved, ...]
    candidate: AdapterVersion | None = None

    @property
    def folder(self) -> Path:
        """Where its result will be."""
        return combination_folder(self.chosen)


class Measurement:
    """A combination being measured by a process of its own, which can be stopped at any moment."""

    def __init__(self, of: Wanted) -> None:
        self.of, self.folder, ordered = of, of.folder, _in_order(of.chosen)
        command = [sys.executable, "-m", "fade.steps.combine", str(self.folder), *(str(one.folder) for one in ordered)]
        command += [part for one in ordered for part in ("--adapter", str(one.adapter))]
        with LOG.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    @property
    def ended(self) -> bool:
        """Whether it came to its end, good or bad."""
        return self.process.poll() is not None

    @property
    def reason(self) -> str:
        """Why it failed; empty if it did not."""
        if not (code := self.process.returncode):
            return ""
        if code < 0:
            return f"its process was ended by signal {-code}"
        said = [line.strip() for line in LOG.read_text(errors="replace").splitlines() if line.strip()]
        return f"{said[-1] if said else f'its process ended with {code}'} (see {LOG})"

    def stop(self) -> None:
        """End it now; what it had begun to write is removed."""
        from fade.steps.drawn import CACHE

        self.process.kill()
        self.process.wait()
        for place in (COMBINATIONS, CACHE):
            for left in place.glob(f".*.{self.process.pid}.partial*"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def offer_consolidated(chosen: Sequence[Approved], everything: Sequence[AdapterVersion], board: Board) -> None:
    """Where adapters fail together: name the one adapter for all of it, or begin to distil it."""
    failing = [name for name, reason in board.waiting.items() if "fails the gate" in reason]
    if not failing:
        return
    wanted = frozenset().union(*(one.concepts for one in chosen))
    found = [one for one in everything if one.base_sha256 == chosen[0].base_sha256 and _erases(one) == wanted]
    if not found:
        start_consolidation([one.folder.name for one in chosen])
        said = "one adapter for all of it is being distilled"
    elif found[-1].gate == "passed":
        said = f"approve {named(found[-1])}, which erases all of it at once"
    elif found[-1].gate in TO_DECIDE:
        said = (
            f"read {named(found[-1])}, which erases all of it at once and is {found[-1].gate}: a person has to decide"
        )
    else:
        said = f"{named(found[-1])}, which erases all of it at once, failed its gate too"
    for name in failing:
        board.waiting[name] += f"; {said}"


def _erases(version: AdapterVersion) -> frozenset[str]:
    folder = ERASURES / version.model.removeprefix(MODEL_PREFIX)
    if not (folder / "spec.yaml").is_file():
        return frozenset()
    return frozenset(pair.concept for pair in load_spec(folder).pairs)


_consolidations: dict[frozenset[str], subprocess.Popen[bytes]] = {}


def start_consolidation(erasures: Sequence[str]) -> subprocess.Popen[bytes]:
    """Distil several erasures into one adapter in a process of its own, unless this program did so before."""
    key = frozenset(erasures)
    if key not in _consolidations:
        with Path(".fade/consolidate.log").open("ab") as log:
            command = [sys.executable, "-m", "flows.cli.app", "consolidate", *sorted(key)]
            _consolidations[key] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    return _consolidations[key]


def wait_for_consolidations() -> None:
    """Wait until all that was begun has ended."""
    for process in _consolidations.values():
        process.wait()
