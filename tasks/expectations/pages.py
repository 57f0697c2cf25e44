"""Data Docs that a person reads without a network: a first page in words, and pages that load nothing.

Great Expectations' own pages fetch styles and scripts from other hosts. Without them its index stays empty and
verdicts have no mark, and with them opening a page about forget data tells those hosts. So what would be
fetched is taken out, a few lines of style stand in for it, and ``index.html`` is a page of ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from fade.files import writing

_FETCHED = re.compile(r"<script[^>]*\ssrc=[^>]*>\s*</script>|<link[^>]*\shref=[^>]*>|<img[^>]*>", re.DOTALL)
_MOST = 50
_STYLE = """<style>
body { font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; color: #222; background: #fff; }
table { border-collapse: collapse; margin: .5em 0 1.5em; } td, th { padding: .2em .8em .2em 0; text-align: left; }
tr { border-bottom: 1px solid #ddd; } .holds, .fa-check-circle::before { color: #1a7f37; }
.fails, .fa-times::before { color: #b00020; font-weight: bold; }
.fa-check-circle::before { content: "holds"; } .fa-times::before { content: "FAILS"; } footer { display: none; }
</style>"""


def write_pages(docs: Path, title: str, held: Mapping[str, bool], culprits: Sequence[str]) -> Path:
    """Make the pages under ``docs`` readable without a network; gives the first page.

    Args:
        held: each expectation in words, and whether it holds.
        culprits: what is at fault, a line each; no values of the data.
    """
    for page in docs.rglob("*.html"):
        text = _FETCHED.sub("", page.read_text(encoding="utf-8"))
        page.write_text(text.replace("</head>", f"{_STYLE}</head>", 1), encoding="utf-8")
    failed = [name for name, holds in held.items() if not holds]
    verdict = f"{len(failed)} of {len(held)} expectations fail" if failed else f"all {len(held)} expectations hold"
    parts = [f'<h1>{escape(title)}: <span class="{"fails" if failed else "holds"}">{verdict}</span></h1>']
    if culprits:
        more = f"<p>and {len(culprits) - _MOST} more</p>" if len(culprits) > _MOST else ""
        lines = "".join(f"<li>{escape(line)}</li>" for line in culprits[:_MOST])
        parts.append(f"<h2>At fault</h2><ul>{lines}</ul>{more}")
    rows = "".join(_row(name, held[name]) for name in [*failed, *(name for name in held if held[name])])
    parts.append(f"<h2>Expectations</h2><table><tr><th></th><th>expectation</th></tr>{rows}</table>")
    links = "".join(
        f'<li><a href="{escape(page.relative_to(docs).as_posix())}">{escape(page.stem)}</a></li>'
        for page in sorted(docs.glob("validations/**/*.html"))
    )
    parts.append(f"<h2>Great Expectations' results</h2><ul>{links}</ul>")
    with writing(docs / "index.html") as temporary:
        head = f"<meta charset='utf-8'><title>{escape(title)}</title>{_STYLE}"
        body = "".join(parts)
        temporary.write_text(f"<!doctype html><html lang='en'><head>{head}</head><body>{body}</body></html>\n", "utf-8")
    return docs / "index.html"


def _row(name: str, holds: bool) -> str:
    kind, word = ("holds", "holds") if holds else ("fails", "FAILS")
    return f'<tr><td class="{kind}">{word}</td><td>{escape(name)}</td></tr>'
