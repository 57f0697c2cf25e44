"""The report that a reviewer reads: one HTML file, its pictures inside, no script and nothing fetched.

It says first what the gate says and why, then the figures with what they mean, then the pictures, then what was not
measured. It names the erasure by its id; pictures and their labels show what was erased, as the sheet does.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from fade.concepts import Concept
from fade.sheets import labelled_sheet

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
    "surrogate": "pictures of the erased concept's prompts that show what was asked instead",
    "scrambled": "pictures that show nothing the judge knows",
}
_SHOWN = 12


def review_page(
    erasure: str, metrics: Mapping[str, Any], card: Mapping[str, Any], pictures: Mapping[str, Image.Image]
) -> str:
    """The page of one erasure.

    Args:
        metrics: ``metrics.json`` of the evaluation.
        card: the adapter's.
        pictures: title to picture, in order.
    """
    gate = metrics["gate"]
    report = metrics["judges"]["report"]
    said = gate.get("verdict", "passed" if gate["passed"] else "failed")
    reasons = "".join(f"<li>{html.escape(reason)}</li>" for reason in gate["reasons"])
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
        f"<p>{metrics['samples']} pictures before and as many after, at equal prompts and seeds; judge "
        "<em>report</em>; intervals 95 %, Wilson.</p>",
        _figures(report),
        _recognised(metrics["judges"], gate),
        _checks(gate.get("checks", [])),
        _brought_back(metrics),
        _change(metrics, report, card),
        *(f"<h2>{html.escape(title)}</h2>{_inline(picture)}" for title, picture in pictures.items()),
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


def _figures(report: Mapping[str, Any]) -> str:
    rows = []
    for name, meaning in _MEANING.items():
        if name in report["after"]:
            after, before = report["after"][name], report["before"].get(name)
            rows.append(
                [
                    f"{name.upper() if len(name) <= 3 else name}: {meaning}",
                    f"{before['value']:.1%}" if before else "",
                    f"{after['value']:.1%}",
                    f"{after['low']:.1%} to {after['high']:.1%}",
                    str(after["count"]),
                ]
            )
    for name, found in report["after"].get("names", {}).items():
        before, after = report["before"]["names"][name]["ua"], found["ua"]
        row = [f"UA by the further name {name}", f"{before['value']:.1%}", f"{after['value']:.1%}"]
        rows.append([*row, f"{after['low']:.1%} to {after['high']:.1%}", str(after["count"])])
    for name, after in report["after"]["neighbours"].items():
        before = report["before"]["neighbours"][name]
        row = [f"neighbour {name}", f"{before['value']:.1%}", f"{after['value']:.1%}"]
        rows.append([*row, f"{after['low']:.1%} to {after['high']:.1%}", str(after["count"])])
    for domain, found in report.get("shuffled", {}).items():
        row = [f"control: {domain} named in shuffled patches (near 0 is good)", "", f"{found['value']:.1%}"]
        rows.append([*row, f"{found['low']:.1%} to {found['high']:.1%}", str(found["count"])])
    return _table(["figure", "base", "erased", "95 %", "pictures"], rows)


def _recognised(judges: Mapping[str, Any], gate: Mapping[str, Any]) -> str:
    """What each judge names in the base's own pictures: no figure says more than its judge can see."""
    asked = {one["name"].removeprefix("base: "): one for one in gate.get("recognised", [])}
    meaning = {"ira": "the rest of its domain (ira)", "cra": "the other domain (cra)"}
    rows = []
    for judge, figures in judges.items():
        for name, found in figures.get("recognised", {}).items():
            row = [f"{judge}: {meaning.get(name, name)}", f"{found['value']:.1%}"]
            row += [f"{found['low']:.1%} to {found['high']:.1%}", str(found["count"])]
            of = asked.get(name) if judge == "report" else None
            rows.append([*row, *((f"{of['asked']:.1%}", f"{of['low']:.1%}", of["state"]) if of else ("", "", ""))])
    if not rows:
        return ""
    head = ["named as asked in the base's own pictures", "base", "95 %", "pictures"]
    return "<h2>What the judges can see</h2>" + _table([*head, "asked", "surely at least", "state"], rows)


def _checks(checks: Sequence[Mapping[str, Any]]) -> str:
    if not checks:
        return "<p>The gate asks no bounds of this erasure.</p>"
    rows = [
        [c["name"], f"{c['value']:.1%}", f"{c['low']:.1%}", f"{c['asked']:.1%}", str(c["count"]), c["state"]]
        for c in checks
    ]
    head = ["asked of the bound", "figure", "surely at least", "asked", "pictures", "state"]
    return "<h2>How sure</h2>" + _table(head, rows)


def _brought_back(metrics: Mapping[str, Any]) -> str:
    found = metrics.get("attacks", {})
    rows = [
        [
            name,
            f"{found[f'base_{name}']:.1%}",
            f"{found[name]:.1%}",
            f"{found[f'{name}_low']:.1%} to {found[f'{name}_high']:.1%}",
        ]
        for name in (key.removeprefix("base_") for key in found if key.startswith("base_"))
    ]
    return "<h2>Brought back by attacks</h2>" + _table(["attack", "base", "erased", "95 %"], rows) if rows else ""


def _change(metrics: Mapping[str, Any], report: Mapping[str, Any], card: Mapping[str, Any]) -> str:
    rows = [
        ["RMS distance of retained pictures to the base's (drift, 0..1)", f"{metrics['drift']:.4f}"],
        ["the same of the erased concept's", f"{metrics['change_of_concept']:.4f}"],
    ]
    named = {"perceptual_drift": "perceptual distance (judge's features)", "fid_judge": "FID (judge's features)"}
    named["kid_judge"] = "KID (judge's features)"
    for key in metrics:
        if key.startswith(("fid_", "kid_", "clip_score_")):
            named.setdefault(key, key.replace("_", " "))
    rows += [[label, f"{metrics[key]:.4g}"] for key, label in named.items() if key in metrics]
    for name in ("ira", "cra"):
        if found := report.get("paired", {}).get(name):
            rows.append([f"right answers of {name.upper()} lost / gained (McNemar)",
                         f"{found['lost']} / {found['gained']}, p = {found['p']:.3g}"])  # fmt: skip
    rows += [
        ["size of the adapter", f"{metrics['adapter_bytes'] / 1000:.1f} kB"],
        ["modules changed", str(card.get("modules", "unknown"))],
    ]
    return "<h2>What else changed</h2>" + _table(["", ""], rows)


def _inline(picture: Image.Image) -> str:
    """A JPEG inside the page."""
    stream = io.BytesIO()
    picture.convert("RGB").save(stream, format="JPEG", quality=85)
    data = base64.b64encode(stream.getvalue()).decode()
    return f'<img alt="" src="data:image/jpeg;base64,{data}">'


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
