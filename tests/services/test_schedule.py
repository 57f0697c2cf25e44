"""`fade drain --cron` alone, with no server that anybody started: it looks when it said, and Ctrl-C ends all of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import psutil
import pytest

from fade.requests.ledger import Ledger
from fade.requests.messages import make_message
from fade.requests.states import State
from tests.databases import database
from tests.servers import wait_until
from tests.tiny import PROJECT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
LOOKS = 60.0
"""Seconds between two looks of the finest schedule that there is."""


def test_what_is_due_is_run_by_the_schedule_alone(workspace: Path, tmp_path: Path) -> None:
    with database("postgresql", tmp_path) as address:
        with Ledger(address) as ledger:
            # Of a concept that no catalog has: its outcome takes a run, but no erasure.
            message = make_message(id=str(uuid.uuid4()), kind="object", concept="unicorn", surrogate="horse")
            asked = ledger.submit(message, PROJECT, actor="test")[0].id
            assert ledger.get(asked).state == State.SCHEDULED
        inherited = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
        said = tmp_path / "said"
        with said.open("wb") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "flows.cli.app", "drain", "--cron", "* * * * *"],
                cwd=workspace,
                env={**inherited, "FADE_LEDGER_URL": address, "COLUMNS": "200", "NO_COLOR": "1"},
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            with Ledger(address) as ledger:
                assert wait_until(lambda: ledger.get(asked).state == State.NEEDS_INPUT, 4 * LOOKS), said.read_text()
            assert wait_until(lambda: "1 needs_input" in said.read_text(), LOOKS), said.read_text()
            children = psutil.Process(process.pid).children(recursive=True)
            assert any("flows.services.servers:prefect" in child.cmdline() for child in children)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: whoever is in its group is told
            assert process.wait(timeout=60) == 0
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(timeout=60)
        assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
        assert "Prefect  http://127.0.0.1:" in said.read_text()
        assert "Traceback" not in said.read_text()
