"""The report that a reviewer reads: one HTML page with small pictures beside it, no script and nothing fetched.

Prompts are shown with the base's picture beside the erased model's, each a thumbnail in a file of its own, so that the
page stays small whatever a base draws (``fade.evaluation.beside``). Where a page is shown alone they are put into it.

It says first what the gate says and why, then the figures with what they mean, then the pictures, then what was not
measured. It names the erasure by its id; pictures and their labels show what was erased, as the sheet does.
"""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from fade.concepts import Concept
from fade.evaluation.accuracy import DOMAINS
from fade.evaluation.attacked import Attacks
from fade.evaluation.beside import BESIDE, GROUPS, WHEN, Beside, file_name, inside
from fade.evaluation.figures import JudgeFigures, Rate
from fade.evaluation.judges import JUDGES
from fade.evaluation.measured import Evaluation
from fade.evaluation.points import Points, described, points_figure
from fade.evaluation.verdicts import Check
from fade.sheets import labelled_sheet, thumbnail

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:.6rem 0}td,th{border:1px solid #ccc;padding:.25rem .6rem;text-align:right}
td:first-child,th:first-child{text-align:left}img{max-width:100%;image-rendering:pixelated}
.passed{color:#116329}.failed{color:#b00020}.borderline,.unjudged{color:#8a5a00}
"""
_MEANING = {
    "ua": "pictures of the erased concept's prompts that no longer show it",
    "ira": "other concepts of its domain still shown when asked for",
    "cra": "concepts of the other domain still shown when asked for",
    "scrambled": "pictures that show nothing the judge knows",
}
_SHOWN = 12
_PROMPTS, _SIDE, _QUALITY = 48, 192, 80
"""Prompts on the page, the longer side of their thumbnails, and their JPEG's quality."""


def review_page(
    erasure: str,
    metrics: Evaluation,
    card: Mapping[str, Any],
    pictures: Mapping[str, Image.Image],
    *,
    points: Points | None = None,
    beside: Beside | None = None,
) -> str:
    """The page of one erasure.

    Args:
        card: the adapter's.
        pictures: title to picture, in order.
        beside: prompts with two pictures each; whoever writes the page writes these beside it.
        points: what was tried, of an erasure that found its own settings.
    """
    said, report = metrics.gate.verdict, metrics.report
    reasons = "".join(f"<li>{html.escape(reason)}</li>" for reason in metrics.gate.reasons)
    advice = {
        "passed": "Every figure and every bound that the gate asks for is reached.",
        "failed": "Do not approve: something that the gate asks for is not reached.",
        "borderline": "The figures pass, but not every bound is sure. Look at the pictures and decide.",
        "unjudged": "The judge does not surely know, even in the base's own pictures, what it is asked about: its "
        "figures say nothing of that. Take judges that do, or look at the pictures and decide.",
    }[said]
    parts = [
        f"<h1>Erasure {html.escape(erasure)}: <span class={said}>{said}</span></h1><p>{advice}</p><ul>{reasons}</ul>",
        "<h2>Figures</h2>",
        f"<p>{metrics.samples} pictures before and as many after, at equal prompts and seeds; judge "
        "<em>report</em>; intervals 95 %, Wilson.</p>",
        _figures(report),
        _overwriting(report),
        _each(report),
        _recognised(metrics),
        _detected(metrics),
        _checks(metrics.gate.checks),
        _brought_back(metrics.attacks),
        _change(metrics, card),
        _points(points, card),
        *(f"<h2>{html.escape(title)}</h2>{_inline(picture)}" for title, picture in pictures.items()),
        beside.part if beside else "",
        "<h2>What this does not say</h2><p>UA is asked by the concept's name: whether attacks bring it back is "
        "measured by <code>fade attack ID --all</code> and stands on the version's page. Whoever switches the adapter "
        "off has the base again. Two judges were asked; pictures that both accept can still look wrong: look.</p>",
    ]
    body = "\n".join(parts)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Erasure {html.escape(erasure)}</title>'
        f"<style>{_STYLE}</style><body>{body}</body></html>\n"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = ["<tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in head) + "</tr>"]
    cells += ["<tr>" + "".join(f"<td>{html.escape(value)}</td>" for value in row) + "</tr>" for row in rows]
    return f"<table>{''.join(cells)}</table>"


def _figures(report: JudgeFigures) -> str:
    rows = []
    for name, meaning in _MEANING.items():
        before, after = getattr(report.before, name), getattr(report.after, name)
        if after is not None:
            rows.append(_row(f"{name.upper() if len(name) <= 3 else name}: {meaning}", before, after))
    rows += [
        _row(f"UA by the further name {name}", report.before.names[name].ua, found.ua)
        for name, found in report.after.names.items()
    ]
    rows += [
        _row(f"neighbour {name}", report.before.neighbours[name], found)
        for name, found in report.after.neighbours.items()
    ]
    rows += [
        _row(f"control: {domain} named in shuffled patches (near 0 is good)", None, getattr(report.shuffled, domain))
        for domain in DOMAINS
    ]
    return _table(["figure", "base", "erased", "95 %", "pictures"], rows)


def _overwriting(report: JudgeFigures) -> str:
    """What the erased concepts' prompts give now, beside what the best erasure could give."""
    found = report.overwriting()
    rows = []
    for label, now, was, best in (
        ("not called by the concept's name (UA)", report.after.ua, report.before.ua, "reachable_ua"),
        ("called the surrogate", report.after.surrogate, report.before.surrogate, "reachable_surrogate"),
        ("mush: nothing the judge knows", found.get("mush"), found.get("base_mush"), "reachable_mush"),
    ):
        if now is not None:
            shares = ["" if one is None else f"{one.value:.1%}" for one in (was, found.get(best))]
            rows.append([label, shares[0], f"{now.value:.1%}", f"{now.low:.1%} to {now.high:.1%}", shares[1]])
    head = ["of the erased concept's prompts", "base", "erased", "95 %", "reachable"]
    return (
        "<h2>What its prompts give now</h2>"
        + _table(head, rows)
        + "<p>Reachable: the same of the base's own pictures of the surrogate, which the best erasure would give.</p>"
    )


def _each(report: JudgeFigures) -> str:
    """Of several concepts each by itself: one that was missed is not to hide in the mean."""
    if len(report.after.erased) < 2:
        return ""
    rows = []
    for name, now in report.after.erased.items():
        best = report.reachable.get(name)
        shares = [
            "" if one is None else f"{one.value:.1%}" for one in (now.surrogate, None if best is None else best.ua)
        ]
        rows.append([name, f"{report.before.erased[name].ua.value:.1%}", f"{now.ua.value:.1%}", shares[1], shares[0]])
    head = ["concept", "UA of the base", "UA", "reachable", "called the surrogate"]
    return f"<h2>Each of the {len(rows)} concepts</h2>" + _table(head, rows)


def _row(label: str, before: Rate | None, after: Rate) -> list[str]:
    base = "" if before is None else f"{before.value:.1%}"
    return [label, base, f"{after.value:.1%}", f"{after.low:.1%} to {after.high:.1%}", str(after.count)]


def _recognised(metrics: Evaluation) -> str:
    """What each judge names in the base's own pictures: no figure says more than its judge can see."""
    asked = {one.name.removeprefix("base: "): one for one in metrics.gate.recognised}
    meaning = {"ira": "the rest of its domain (ira)", "cra": "the other domain (cra)"}
    rows = []
    for judge in JUDGES:
        figures: JudgeFigures = getattr(metrics.judges, judge)
        for name, found in figures.recognised.items():
            row = [f"{judge}: {meaning.get(name, name)}", f"{found.value:.1%}"]
            row += [f"{found.low:.1%} to {found.high:.1%}", str(found.count)]
            of = asked.get(name) if judge == "report" else None
            rows.append([*row, *((f"{of.asked:.1%}", f"{of.low:.1%}", of.state) if of else ("", "", ""))])
    head = ["named as asked in the base's own pictures", "base", "95 %", "pictures"]
    return "<h2>What the judges can see</h2>" + _table([*head, "asked", "surely at least", "state"], rows)


def _detected(metrics: Evaluation) -> str:
    """What further judges see of the concept; of one that cannot tell it nothing."""
    if not metrics.detectors:
        return ""
    rows = []
    for one in metrics.detectors:
        shares = [f"{one.before.value:.1%}", f"{one.after.value:.1%}", f"{one.after.low:.1%} to {one.after.high:.1%}"]
        unable = ["it cannot tell the concept in other pictures of the base", "", ""]
        rows.append([one.name, *(shares if one.able else unable), str(one.after.count)])
    head = ["of the erased concept's prompts, shows the concept by", "base", "erased", "95 %", "pictures"]
    return "<h2>Further judges</h2>" + _table(head, rows) + "<p>They decide nothing.</p>"


def _checks(checks: Sequence[Check]) -> str:
    if not checks:
        return "<p>The gate asks no bounds of this erasure.</p>"
    rows = [[c.name, f"{c.value:.1%}", f"{c.low:.1%}", f"{c.asked:.1%}", str(c.count), c.state] for c in checks]
    head = ["asked of the bound", "figure", "surely at least", "asked", "pictures", "state"]
    return "<h2>How sure</h2>" + _table(head, rows)


def _brought_back(attacks: Attacks) -> str:
    rows = [
        [name, f"{found.base:.1%}", f"{found.value:.1%}", f"{found.low:.1%} to {found.high:.1%}"]
        for name, found in attacks.root.items()
    ]
    return "<h2>Brought back by attacks</h2>" + _table(["attack", "base", "erased", "95 %"], rows) if rows else ""


def _change(metrics: Evaluation, card: Mapping[str, Any]) -> str:
    rows = [
        ["RMS distance of retained pictures to the base's (drift, 0..1)", f"{metrics.drift:.4f}"],
        ["the same of the erased concept's", f"{metrics.change_of_concept:.4f}"],
    ]
    named = {
        "perceptual_drift": "perceptual distance (judge's features)",
        "fid_judge": "FID (judge's features)",
        "kid_judge": "KID (judge's features)",
    }
    rows += [[named.get(key, key.replace("_", " ")), f"{value:.4g}"] for key, value in metrics.distances().items()]
    paired = metrics.report.paired
    for name, found in (("IRA", paired.ira), ("CRA", paired.cra)):
        rows.append([f"right answers of {name} lost / gained (McNemar)",
                     f"{found.lost} / {found.gained}, p = {found.p:.3g}"])  # fmt: skip
    rows += [
        ["size of the adapter", f"{metrics.adapter_bytes / 1000:.1f} kB"],
        ["modules changed", str(card.get("modules", "unknown"))],
    ]
    return "<h2>What else changed</h2>" + _table(["", ""], rows)


def _points(points: Points | None, card: Mapping[str, Any]) -> str:
    """What an erasure tried before it was judged: a table, and the curve with the point that was taken."""
    if points is None:
        return ""
    taken = card.get("point", points.chosen)
    rows = []
    for number, point in enumerate(points.tried):
        look = point.look
        surrogate = "" if look.surrogate is None else f"{look.surrogate} of {look.erased}"
        counts = [f"{look.shown} of {look.erased}", surrogate, f"{look.mush} (base {look.base_mush})"]
        others = [f"{look.near_lost} / {look.near_gained}", f"{look.rest_lost} / {look.rest_gained}"]
        counts += others if look.whole else ["not asked"] * 2
        end = [
            "not asked" if look.drift is None else f"{look.drift:.4f}",
            f"{point.score:.3f}",
            ", ".join(point.faults) or "none",
        ]
        rows.append([f"{number}{' (taken)' if number == taken else ''}: {described(point.controls)}", *counts, *end])
    head = ["point", "still shown", "surrogate", "mush", "neighbours lost / gained", "others lost / gained", "drift"]
    stream = io.BytesIO()
    points_figure(points).savefig(stream, format="png", dpi=110)
    with Image.open(stream) as curve:
        picture = _inline(curve)
    why = f"Taken: point {taken}, " + (points.why if taken == points.chosen else "as a person chose it.")
    surrogate = f"<p>The surrogate: {html.escape(card['surrogate_why'])}.</p>" if "surrogate_why" in card else ""
    return (
        f"<h2>What was tried</h2>{surrogate}<p>{html.escape(why)} Few pictures of seeds that no evaluation has, judge "
        "<em>development</em>. Another point: <code>fade erase ... --point K</code>.</p>"
        + _table([*head, "score", "faults"], rows)
        + picture
    )


def _inline(picture: Image.Image) -> str:
    """A JPEG inside the page."""
    return f'<img alt="" src="{inside(_jpeg(picture, 85))}">'


def _jpeg(picture: Image.Image, quality: int) -> bytes:
    stream = io.BytesIO()
    picture.convert("RGB").save(stream, format="JPEG", quality=quality)
    return stream.getvalue()


def prompt_by_prompt(
    samples: pd.DataFrame,
    before: NDArray[np.uint8],
    after: NDArray[np.uint8],
    erased: Sequence[Concept],
    neighbours: Sequence[str],
) -> Beside:
    """Prompts with the base's picture and the erased model's beside it: neighbours first, they lose first.

    Of neighbours, of what was erased and of the rest as many prompts each, spread over what there is.
    """
    asked, near = pd.Series(False, index=samples.index), samples["object"].isin(neighbours)
    near |= samples["style"].isin(neighbours)
    for concept in erased:
        asked |= samples[concept.kind] == concept.name
    which = dict(zip(GROUPS, (near & ~asked, asked, ~near & ~asked), strict=True))
    rows, files = [], dict[str, bytes]()
    for group, rows_of in which.items():
        places = np.flatnonzero(rows_of.to_numpy())
        count = min(len(places), _PROMPTS // len(GROUPS))
        for number, at in enumerate(np.linspace(0, len(places) - 1, count).astype(int) if count else ()):
            i, cells = places[at], ""
            for when, pictures in zip(WHEN, (before, after), strict=True):
                small = Image.fromarray(thumbnail(pictures[i], _SIDE))
                name = file_name(group, number, when)
                files[name] = _jpeg(small, _QUALITY)
                size = f"width={small.width} height={small.height}"
                cells += f'<td><img alt="{when}" {size} src="{BESIDE}/{name}"></td>'
            prompt = html.escape(str(samples["prompt"].iloc[i]))
            rows.append(f"<tr><td>{group}</td><td>{prompt} (seed {samples['seed'].iloc[i]})</td>{cells}</tr>")
    head = "<tr><th></th><th>prompt</th><th>base</th><th>erased</th></tr>"
    return Beside(f"<h2>Prompt by prompt</h2><table>{head}{''.join(rows)}</table>", files)


def failures_sheet(
    samples: pd.DataFrame, before: NDArray[np.uint8], after: NDArray[np.uint8], erased: Sequence[Concept]
) -> Image.Image | None:
    """The first pictures that the report judge calls wrong: the concept still there, or a retained one lost."""
    still = pd.Series(False, index=samples.index)
    asked = pd.Series(False, index=samples.index)
    for concept in erased:
        here = samples[concept.kind] == concept.name
        asked |= here
        still |= here & (samples[f"report_after_{concept.kind}"] == concept.name)
    lost = ~asked & (
        (samples["report_after_object"] != samples["object"]) | (samples["report_after_style"] != samples["style"])
    )
    chosen = samples.index[still | lost][:_SHOWN]
    if len(chosen) == 0:
        return None
    columns = [f"{samples['object'][i]}\n{samples['style'][i]}" for i in chosen]
    rows = [("before", [before[i] for i in chosen]), ("after", [after[i] for i in chosen])]
    return labelled_sheet(rows, [column.split("\n")[0] for column in columns], title="Called wrong")
