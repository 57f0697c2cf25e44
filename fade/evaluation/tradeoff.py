"""Trade-off: what a setting costs in retention for what it forgets, as a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from fade.errors import DataError

PRICES = {"ira": "IRA", "cra": "CRA", "drift": "drift"}
_MEANS = ("ua", "ira", "cra", "base_ira", "base_cra", "drift", "inversion", "method_seconds", "adapter_bytes")


def means(rows: Sequence[dict[str, Any]], varied: Sequence[str]) -> pd.DataFrame:
    """One row a combination of the varied settings: means over concepts and seeds, and the worst of each.

    Args:
        rows: figures of single erasures, each with a value for every varied setting.

    Raises:
        DataError: no rows.
    """
    if not rows:
        raise DataError("A trade-off over 0 erasures is no figure: no trial has ended.")
    table = pd.DataFrame(rows)
    for name in varied:
        table[name] = table[name].map(str)
    present = [name for name in _MEANS if name in table]
    # A study without varied settings is one group.
    keys: list[Any] = list(varied) or [pd.Series("all", index=table.index, name="settings")]
    groups = table.groupby(keys, sort=False)
    found = groups[present].mean()
    found["ua_worst"] = groups["ua"].min()
    found["ira_worst"], found["cra_worst"] = groups["ira"].min(), groups["cra"].min()
    found["passed"] = groups["passed"].mean()
    found["erasures"] = groups.size()
    return found.reset_index()


def tradeoff_figure(rows: Sequence[dict[str, Any]], varied: Sequence[str]) -> Figure:
    """UA against IRA, CRA and drift: a pale dot an erasure, a mark for each combination's mean.

    The first varied setting joins its values by a line, in the order they were given, for each
    combination of the others; the marks carry its values.
    """
    table = means(rows, varied)
    single = pd.DataFrame(rows)
    figure = Figure(figsize=(12.5, 4.6), layout="constrained")
    panels = figure.subplots(1, len(PRICES), sharey=True)
    others = list(varied[1:])
    lines = table.groupby(others, sort=False) if others else [("", table)]
    for panel, (price, label) in zip(panels, PRICES.items(), strict=True):
        panel.scatter(single[price], single["ua"], s=14, color="0.8", zorder=1)
        for name, line in lines:
            values = name if isinstance(name, tuple) else (name,)
            title = ", ".join(f"{key.split('.')[-1]} {value}" for key, value in zip(others, values, strict=False))
            panel.plot(line[price], line["ua"], marker="o", label=title or None, zorder=2)
            if varied:
                for _, mark in line.iterrows():
                    panel.annotate(
                        mark[varied[0]],
                        (mark[price], mark["ua"]),
                        xytext=(4, 4),
                        textcoords="offset points",
                        fontsize=7,
                    )
        panel.set(xlabel=label, ylim=(-0.04, 1.08))
        panel.grid(color="0.92")
    panels[0].set_ylabel("UA")
    if others:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    named = f", marks: {varied[0]}" if varied else ""
    figure.suptitle(f"Forgetting against retention ({len(single)} erasures{named})", fontsize=11)
    return figure
