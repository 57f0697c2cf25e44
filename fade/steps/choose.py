"""Step ``choose``: of the points that an erasure tried, the best becomes its adapter, or the one a person takes."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from fade.adapters.card import load_card, weights_path
from fade.adapters.store import save_adapter
from fade.errors import ConfigError
from fade.evaluation.points import Points
from fade.evaluation.records import load
from fade.spec import POINTS, load_spec


def choose(folder: Path) -> None:
    """Write ``adapter/``: a point's weights, byte by byte, with a card that says which it was.

    Raises:
        ConfigError: no such point was tried.
    """
    spec = load_spec(folder)
    points = load(Points, folder / POINTS / "points.json")
    number = points.chosen if spec.tune.point is None else spec.tune.point
    if number >= len(points.tried):
        raise ConfigError(f"No point {number} was tried: there are 0 to {len(points.tried) - 1}. Choose one of these.")
    origin = folder / POINTS / str(number)
    card = load_card(origin)
    card |= {"erasure": spec.id, "point": number, "tries": len(points.tried), "why": points.why}
    card |= {"surrogate_why": spec.surrogate_why} if spec.surrogate_why else {}
    save_adapter(folder / "adapter", load_file(weights_path(origin, card)), card)
