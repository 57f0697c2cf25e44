"""Methods compared on equal concepts, seeds and pictures: the table, the text under it, and the figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from fade.errors import DataError
from fade.evaluation.figures import rate


@dataclass(frozen=True, slots=True)
class Column:
    """A figure of the table: its heading, whether more is better, and how it is written."""

    heading: str
    more: bool
    form: str


COLUMNS: dict[str, Column] = {
    "ua": Column("UA", True, "{:.1%}"),
    "ira": Column("IRA", True, "{:.1%}"),
    "cra": Column("CRA", True, "{:.1%}"),
    "drift": Column("drift", False, "{:.3f}"),
    "paraphrase": Column("paraphrase", False, "{:.1%}"),
    "synonym": Column("synonym", False, "{:.1%}"),
    "misspelling": Column("misspelling", False, "{:.1%}"),
    "composition": Column("composition", False, "{:.1%}"),
    "noised": Column("noised", False, "{:.1%}"),
    "inpainted": Column("inpainted", False, "{:.1%}"),
    "inversion": Column("inversion", False, "{:.0%}"),
    "relearning": Column("relearnt", False, "{:.0%}"),
    "method_seconds": Column("s", False, "{:.1f}"),
    "peak_mib": Column("MiB", False, "{:.0f}"),
    "adapter_bytes": Column("kB", False, "{:.1f}"),
}
POOLED = ("ua", "ira", "cra")


def contest_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """A row a method, means over its erasures; UA, IRA and CRA with the interval of all pictures pooled.

    A figure that some erasure of a method lacks is left out for that method: a mean over others would not compare.

    Raises:
        DataError: no rows.
    """
    if not rows:
        raise DataError("A table over 0 erasures is no figure: no trial has ended.")
    single, lines = pd.DataFrame(rows), []
    for method, own in single.groupby("method", sort=False):
        line: dict[str, Any] = {"method": method, "erasures": len(own)}
        for name in COLUMNS:
            if name in own and own[name].notna().all():
                line[name] = float(own[name].mean())
        for name in POOLED:
            counts = own[f"{name}_count"]
            pooled = rate(round(float((own[name] * counts).sum())), int(counts.sum()))
            line |= {f"{name}_low": pooled.low, f"{name}_high": pooled.high}
        lines.append(line)
    return pd.DataFrame(lines)


def best_methods(table: pd.DataFrame) -> dict[str, list[str]]:
    """By figure, the methods that reach the best mean; ties share it, to what the table shows."""
    found = {}
    for name, column in COLUMNS.items():
        if name in table and table[name].notna().any():
            shown = table[name].map(lambda value, name=name: _written(name, value))
            best = table[name].max() if column.more else table[name].min()
            found[name] = table["method"][shown == _written(name, best)].tolist()
    return found


def _written(name: str, value: Any) -> str:
    if pd.isna(value):
        return "not measured"
    return COLUMNS[name].form.format(value / 1000 if name == "adapter_bytes" else value)


def contest_markdown(table: pd.DataFrame, *, ours: Sequence[str], base: Mapping[str, float]) -> str:
    """The table with the best cell of each column bold, whoever's it is, and the text under it.

    Args:
        ours: methods of the project; a column that none of them leads is named with who does.
        base: attacks' success on the base, by name, where it was measured.
    """
    present = [name for name in COLUMNS if name in table and table[name].notna().any()]
    best = best_methods(table)
    lines = [
        "| method | " + " | ".join(COLUMNS[name].heading for name in present) + " |",
        "|---|" + "---|" * len(present),
    ]
    for row in table.to_dict("records"):
        cells = []
        for name in present:
            text = _written(name, row[name])
            if name in POOLED:
                text += f" [{row[f'{name}_low']:.1%}, {row[f'{name}_high']:.1%}]"
            cells.append(f"**{text}**" if row["method"] in best[name] else text)
        lines.append(f"| {row['method']} | " + " | ".join(cells) + " |")
    if base:
        lines.append("| the base | " + " | ".join(_written(n, base[n]) if n in base else "" for n in present) + " |")
    return "\n".join([*lines, "", *_text_under(table, best, present, ours)]) + "\n"


def _text_under(
    table: pd.DataFrame, best: Mapping[str, list[str]], present: Sequence[str], ours: Sequence[str]
) -> list[str]:
    count = int(table["erasures"].max())
    text = [
        f"Means over {count} erasures each, report judge; brackets: 95 %, Wilson, all pictures pooled. Attack figures "
        "are the share of pictures in which the attack brings the concept back, less is better. s: what makes the "
        "adapter, without judging it. kB: the smaller of the adapter's file and half-precision weights of the "
        "changed modules. MiB: peak of the process by then.",
    ]
    mine = table[table["method"].isin(ours)]
    for name in present:
        if mine.empty or set(best[name]) & set(ours) or mine[name].isna().all():
            continue
        leader = table[table["method"] == best[name][0]].iloc[0]
        own = mine.sort_values(name, ascending=not COLUMNS[name].more).iloc[0]
        note = ""
        if name in POOLED:
            overlap = own[f"{name}_high"] >= leader[f"{name}_low"]
            note = ", within the intervals" if overlap else ", beyond the intervals"
        text.append(
            f"{COLUMNS[name].heading}: {', '.join(best[name])} lead{'s' if len(best[name]) == 1 else ''} with "
            f"{_written(name, leader[name])}; the best of ours, {own['method']}, has {_written(name, own[name])}{note}."
        )
    return text


def scatter_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """UA against IRA and CRA, and seconds against memory: a pale dot an erasure, a mark a method's mean."""
    single, table = pd.DataFrame(rows), contest_table(rows)
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    panels = (("ira", "ua"), ("cra", "ua"), ("method_seconds", "peak_mib"))
    for axes, (across, up) in zip(figure.subplots(1, 3), panels, strict=True):
        for number, row in enumerate(table.to_dict("records")):
            own = single[single["method"] == row["method"]]
            axes.scatter(own[across], own[up], s=12, color=f"C{number}", alpha=0.3)
            axes.scatter(row[across], row[up], s=55, color=f"C{number}", marker="D", label=row["method"])
        names = {"ira": "IRA", "cra": "CRA", "ua": "UA", "method_seconds": "seconds", "peak_mib": "peak memory, MiB"}
        axes.set(xlabel=names[across], ylabel=names[up])
        axes.grid(color="0.92")
        if across == "method_seconds":
            axes.set_xscale("symlog", linthresh=1)
    axes.legend(frameon=False, fontsize=8)
    return figure


def sequence_figure(points: pd.DataFrame) -> Figure:
    """UA, IRA and CRA over the number of erasures that are live at once, a line a method.

    Args:
        points: columns method, erased (how many), ua, ira, cra.
    """
    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 3, sharey=True), POOLED, strict=True):
        for method, own in points.groupby("method", sort=False):
            axes.plot(own["erased"], own[name], marker="o", label=method)
        axes.set(xlabel="erasures live at once", title=name.upper(), ylim=(-0.04, 1.06))
        axes.grid(color="0.92")
    axes.legend(frameon=False, fontsize=8)
    return figure
