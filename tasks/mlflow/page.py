"""What a version's page in MLflow says: figures against the gate, pictures and links, in Markdown.

No name of a person comes in: concepts are called by number, pictures and pages by the run that keeps them.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from fade.evaluation.beside import BESIDE, GROUPS, WHEN, file_name
from fade.evaluation.figures import Rate
from fade.evaluation.measured import Evaluation

_EACH = 3
"""Prompts of each kind on the page: the registry's databases hold 5000 characters of it."""
DOCS, ATTACK = "data-docs", "attack.png"
"""Artifacts of a run that are there where the project has them: pages of Great Expectations, pictures of the attack."""

_PURGED = (
    "**Purged** {}. The forget data and what was made from it, pictures among it, are gone; figures, hashes and the "
    "adapter stay. Receipts: `fade evidence seal`."
)
_UNJUDGED = (
    "**The table says nothing** of what the judge does not surely recognise in the base's own pictures: look at the "
    "pictures and decide (`fade approve ID --because`)."
)


@dataclass(frozen=True, slots=True)
class Page:
    """All that a page is made of.

    Attributes:
        metrics: of the erasure's evaluation.
        least: what the gate asks, by figure.
        run: id of the run, and of its experiment.
        tags: of the run.
        files: paths of the run's artifacts.
        inversion: share of pictures in which the attack brings the concept back; None if not measured.
        together: what the release flow found on testing it with everything live.
        purged: when the forget data was purged, and what came of it; empty if it was not.
        study: run of the newest study with a trade-off picture, and its experiment's id.
    """

    metrics: Evaluation
    least: Mapping[str, float]
    run: tuple[str, str]
    tags: Mapping[str, str] = field(default_factory=dict)
    files: Collection[str] = ()
    inversion: float | None = None
    together: str = ""
    purged: str = ""
    study: tuple[str, str] | None = None


def page(of: Page, *, approved: str) -> str:
    """The page as Markdown; ``approved`` is the alias that makes a version live."""
    gate = of.metrics.gate
    parts = [_PURGED.format(of.purged)] if of.purged else []
    parts += [
        f"Gate: **{gate.verdict}**." + "".join(f"\n- {why}" for why in gate.reasons),
        *([_UNJUDGED] if gate.verdict == "unjudged" else []),
        _table(of),
        _recognised(of),
        f"Drift of retained pictures: {of.metrics.drift:.4f} (RMS distance to the base's, 0 to 1).",
        f"**With everything live**: {of.together or 'not tested yet'}.",
        _depth(of),
        f"Set the alias `{approved}` to make this version live; move or remove it to take it back.",
        _links(of),
    ]
    parts += _beside(of)
    if "sheet.png" in of.files:
        parts.append(f"### Before and after\n\n{_picture('before and after', 'sheet.png', of.run)}")
    if ATTACK in of.files:
        parts.append(f"### What the attack brings back\n\n{_picture('the attack', ATTACK, of.run)}")
    if of.study:
        parts.append(
            f"### Trade-off of the newest study\n\nHow settings trade forgetting against retention "
            f"([its run]({_run(of.study)})).\n\n{_picture('trade-off', 'tradeoff.png', of.study)}"
        )
    return "\n\n".join(parts)


def _table(of: Page) -> str:
    before, after = of.metrics.report.before, of.metrics.report.after
    rows: list[tuple[str, Rate | None, Rate, float | None]] = [
        (name.upper(), before.rates[name], found, of.least.get(name)) for name, found in after.rates.items()
    ]
    if len(after.erased) > 1:
        rows += [
            (f"UA of concept {number}", None, found.ua, of.least.get("ua"))
            for number, found in enumerate(after.erased.values(), start=1)
        ]
    rows += [
        (f"UA of name {number}", before.names[name].ua, found.ua, of.least.get("ua"))
        for number, (name, found) in enumerate(after.names.items(), start=1)
    ]
    lines = ["| figure | base | erased | 95 % interval | gate asks |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | {'' if base is None else f'{base.value:.2%}'} | {found.value:.2%} "
        f"| {found.low:.2%} - {found.high:.2%} | {'' if least is None else f'{least:.2%}'} |"
        for name, base, found, least in rows
    ]
    return "\n".join(lines)


def _recognised(of: Page) -> str:
    """What the report judge names in the base's own pictures, beside what is asked of it."""
    said = [
        f"{name.upper() if len(name) == 3 else name} {found.value:.2%} ({found.low:.2%} - {found.high:.2%} "
        f"by {found.count})"
        for name, found in of.metrics.report.recognised.items()
    ]
    asked = {one.asked for one in of.metrics.gate.recognised}
    least = f"; surely at least {min(asked):.0%} is asked" if asked else ""
    return f"Recognised by the judge in the base's own pictures: {', '.join(said)}{least}."


def _depth(of: Page) -> str:
    said = "UA is asked by the concept's name. White-box inversion "
    if of.inversion is None:
        return said + "was not measured (`fade attack`)."
    return said + f"still brings the concept back in **{of.inversion:.0%}** of its pictures."


def _links(of: Page) -> str:
    links = [f"[run]({_run(of.run)})"]
    names = {
        "report": "report.html",
        "Data Docs": f"{DOCS}/index.html",
        "dvc.lock": "dvc.lock",
        "figures": "metrics.json",
    }
    links += [f"[{name}]({_run(of.run)}/artifacts/{path})" for name, path in names.items() if path in of.files]
    if flow := of.tags.get("prefect.flow_run_id"):
        server = os.environ.get("PREFECT_API_URL", "").removesuffix("/").removesuffix("/api")
        links.append(f"[Prefect flow]({server}/runs/flow-run/{flow})" if server else f"Prefect flow `{flow}`")
    links.append(f"commit `{of.tags.get('git.commit', 'unknown')[:12]}`")
    return "Links: " + " · ".join(links)


def _beside(of: Page) -> list[str]:
    """Of each kind of prompts the first few: the base's picture beside the erased model's. No prompt is said."""
    rows = []
    for group in GROUPS:
        for number in range(_EACH):
            pair = [f"{BESIDE}/{file_name(group, number, when)}" for when in WHEN]
            if {*pair} <= {*of.files}:
                rows.append(f"| {group} | {' | '.join(_picture('', one, of.run) for one in pair)} |")
    if not rows:
        return []
    table = "\n".join(["| | base | erased |", "|---|---|---|", *rows])
    return [f"### Prompt by prompt\n\nThe report has more of them, with the prompts.\n\n{table}"]


def _run(run: tuple[str, str]) -> str:
    return f"#/experiments/{run[1]}/runs/{run[0]}"


def _picture(title: str, name: str, run: tuple[str, str]) -> str:
    return f"![{title}](get-artifact?path={name}&run_uuid={run[0]})"
