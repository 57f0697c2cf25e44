"""An adapter's card: what its files are called and what it is bound to. Needs no torch, so that lists are quick."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fade.errors import AdapterFormatError
from fade.files import read_json, sha256_file

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
DELTA_NAME = "weight_delta.safetensors"
CARD_NAME = "card.json"
FORMAT = "fade-adapter/1"


def load_card(folder: Path) -> dict[str, Any]:
    """The card of an adapter whose weights are the ones the card names.

    Raises:
        AdapterFormatError: a file is missing, or the weights' hash is another one.
    """
    if not (folder / CARD_NAME).is_file():
        raise AdapterFormatError(f"No adapter in {folder}: {CARD_NAME} is missing.")
    card = read_json(folder / CARD_NAME)
    if not isinstance(card, dict):
        raise AdapterFormatError(f"{folder / CARD_NAME} is no card: expected a JSON object. Fetch it again.")
    weights = weights_path(folder, card)
    if not weights.is_file():
        raise AdapterFormatError(f"No adapter in {folder}: {weights.name} is missing.")
    if card.get("format") != FORMAT:
        raise AdapterFormatError(f"{folder} has the format {card.get('format')!r}; expected {FORMAT!r}.")
    if (found := sha256_file(weights)) != card.get("adapter_sha256"):
        raise AdapterFormatError(
            f"The adapter in {folder} was changed: its hash is {found[:12]}, its card says "
            f"{str(card.get('adapter_sha256'))[:12]}. It is not loaded; fetch it again."
        )
    return card


def weights_path(folder: Path, card: Mapping[str, Any]) -> Path:
    """The file that holds an adapter's weights."""
    return folder / (DELTA_NAME if card.get("type") == "delta" else WEIGHTS_NAME)
