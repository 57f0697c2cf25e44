"""Uvicorn that ends when standard input does: with whoever started it, however that ended.

python -m flows.services.until_closed ...       as `python -m uvicorn ...`
"""

from __future__ import annotations

import os
import signal
import sys
import threading


def _end_with_input() -> None:
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_end_with_input, daemon=True).start()
    from uvicorn import main

    main()
