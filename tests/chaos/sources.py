"""Erase a concept of every kind of picture set by the commands alone: catalog, judges, erasure, registration.

    python -m tests.chaos.sources --json sources.json

Small sets of real layout (tests/layouts.py) and the canvas, a tiny base that draws noise: what is shown is that
each kind goes all the way, not how well it is forgotten.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from tests.layouts import LAYOUTS, Layout
from tests.tiny import make_workspace


def main() -> None:
    """Run every kind; the exit status says whether all went to the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--kind", action="append", help="only these")
    arguments = parser.parse_args()
    results: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as place:
        os.environ["FADE_ROOT"] = str(make_workspace(Path(place) / "project"))
        from flows.settings import configure

        target = arguments.json.resolve() if arguments.json else None
        configure()
        (Path(place) / "params.yaml").write_text("catalog: {seed: 3, train_per_pair: 2, holdout_per_pair: 1}\n")
        chosen = {**LAYOUTS, "canvas": Layout(lambda root: root.with_name("params.yaml"), "cat", "horse")}
        for kind, layout in chosen.items():
            if not arguments.kind or kind in arguments.kind:
                results[kind] = erased(kind, layout, Path(place))
                print(kind, results[kind], flush=True)
    if target:
        target.write_text(json.dumps(results, indent=2) + "\n")


def erased(kind: str, layout: Layout, place: Path) -> dict[str, object]:
    """One kind, all the way; seconds and what was registered."""
    from typer.testing import CliRunner

    from fade.lineage import ROOT
    from flows.cli.app import app

    def fade(*arguments: str) -> None:
        result = CliRunner().invoke(app, [*arguments, "--json", "out.json"])
        if result.exit_code != 0:
            raise SystemExit(f"fade {' '.join(arguments)}: {result.output} {result.exception!r}")

    begun = time.perf_counter()
    catalog, judges = f"data/catalog/{kind}-set", f"data/judges-{kind}"
    given = layout.make(place / kind)
    fade("catalog", "build", kind, str(given), "--out", catalog, *(() if kind == "canvas" else ("--size", "64")))
    fade("catalog", "check", catalog)
    own = Path("params.yaml").read_text()
    Path("params.yaml").write_text((ROOT / "params.yaml").read_text())  # the judges' settings are in it
    fade("classifier", "train", "--catalog", catalog, "--out", judges, "--steps", "3", "--threads", "1")
    Path("params.yaml").write_text(own)
    asked = ["--concept", layout.concept, "--surrogate", layout.surrogate, "--catalog", catalog, "--judges", judges]
    fade("erase", *asked, "--set", "threads=1", "--set", "split.forget_per_pair=3")
    row = json.loads(Path("out.json").read_text())
    kept = ("concept", "surrogate", "model_version", "samples", "drift", "gate")
    return {**{name: row[name] for name in kept}, "seconds": round(time.perf_counter() - begun, 1)}


if __name__ == "__main__":
    main()
