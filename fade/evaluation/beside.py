"""Thumbnails that lie beside a page: the base's picture and the erased model's, prompt by prompt. No torch."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

BESIDE = "beside"
"""The folder of the thumbnails."""
GROUPS = ("neighbour", "erased", "other")
"""Kinds of prompts, in the order in which they are shown: neighbours lose first."""
WHEN = ("base", "erased")
_REFERRED = re.compile(rf'src="({BESIDE}/[a-z0-9-]+\.jpg)"')


@dataclass(frozen=True, slots=True)
class Beside:
    """Prompts with two pictures each: the part of the page, and the thumbnails that it refers to.

    Attributes:
        files: JPEGs by name, of the folder ``BESIDE``.
    """

    part: str = ""
    files: Mapping[str, bytes] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write the thumbnails into the folder of the page."""
        (folder / BESIDE).mkdir()
        for name, content in self.files.items():
            (folder / BESIDE / name).write_bytes(content)


def file_name(group: str, number: int, when: str) -> str:
    """What a thumbnail is called."""
    return f"{group}-{number:02d}-{when}.jpg"


def inside(content: bytes) -> str:
    """A JPEG as an address that holds it."""
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"


def self_contained(page: Path) -> str:
    """A page with its thumbnails inside, for where it is shown alone; one that is gone is left out."""

    def held(found: re.Match[str]) -> str:
        file = page.parent / found[1]
        return f'src="{inside(file.read_bytes())}"' if file.is_file() else 'src=""'

    return _REFERRED.sub(held, page.read_text(encoding="utf-8"))
