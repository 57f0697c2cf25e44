"""Serve the flow ``erase`` on a schedule: python infra/nightly.py ERASURE_ID [CRON].

A prepared erasure whose steps are current costs seconds, so a schedule may fire as often as it likes:
what died is finished, what changed is done again, what is done stays.
"""

from __future__ import annotations

import sys

from flows.settings import configure

configure()

from fade.errors import ConfigError
from flows.erasing.erase import erase_flow
from flows.queue.schedules import checked_cron

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python infra/nightly.py ERASURE_ID [CRON]")
    cron = sys.argv[2] if len(sys.argv) > 2 else "0 2 * * *"
    try:
        cron = checked_cron(cron)
    except ConfigError as error:
        sys.exit(str(error))
    erase_flow.serve(name="nightly", cron=cron, parameters={"erasure_id": sys.argv[1]}, limit=1)
