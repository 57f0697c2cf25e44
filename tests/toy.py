"""A step of an erasure as somebody adds one; its row in the table is in ``flows/test_a_step_is_a_row.py``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def count_words(folder: Path) -> Iterator[tuple[int, int]]:
    """Write ``words.txt``: how many words the spec has."""
    words = (folder / "spec.yaml").read_text(encoding="utf-8").split()
    yield 1, 1
    (folder / "words.txt").write_text(f"{len(words)}\n", encoding="utf-8")
