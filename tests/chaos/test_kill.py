"""A short version of tests/chaos/kill.py: ten times SIGKILL, and nothing is lost, doubled or stuck."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fade.files import read_json
from fade.lineage import ROOT


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_worker_that_is_killed_loses_and_doubles_nothing(tmp_path: Path) -> None:
    out = tmp_path / "kill.json"
    command = [sys.executable, str(ROOT / "tests/chaos/kill.py"), "--kills", "10", "--at-once", "1", "--longest", "5"]
    # A server, a ledger and a store of its own: nothing of this session's project.
    own = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("FADE_", "PREFECT_", "MLFLOW_TRACKING"))
    }
    result = subprocess.run([*command, "--json", str(out)], env=own, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    found = read_json(out)
    assert found["kills"] >= 10
    assert len(found["where"]) >= 5
    assert (found["lost"], found["doubled"], found["stuck"]) == (0, 0, 0)
