"""Stage ``catalog``: the canvas as a catalog; and which kinds of picture set there are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fade.data.intake import build
from fade.data.loaders.breeds import breeds
from fade.data.loaders.canvas import canvas
from fade.data.loaders.folder import folder as image_folder
from fade.data.loaders.hub import hub
from fade.data.loaders.imagenette import imagenette
from fade.data.loaders.lfw import lfw
from fade.data.loaders.stamps import wide_canvas
from fade.data.loaders.sun import sun
from fade.data.loaders.unlearncanvas import unlearncanvas
from fade.data.loaders.webdataset import webdataset
from fade.data.sets import PictureSet
from fade.errors import ConfigError, nearest
from fade.project import Project
from fade.steps.arguments import stage_arguments

KINDS: dict[str, Callable[[Path], PictureSet]] = {
    "folder": image_folder,
    "unlearncanvas": unlearncanvas,
    "imagenette": imagenette,
    "lfw": lfw,
    "breeds": breeds,
    "sun": sun,
    "webdataset": webdataset,
    "hub": hub,
    "stamps": wide_canvas,
}


def open_set(kind: str, source: Path, *, domain: str = "object") -> PictureSet:
    """The picture set of a kind; ``domain`` says what the subjects of a plain folder are.

    Raises:
        ConfigError: unknown kind.
        DataError: the set's layout is not that of its kind.
    """
    if kind not in KINDS:
        raise ConfigError(f"Unknown kind of picture set {kind!r}. {nearest(kind, KINDS)}")
    return image_folder(source, domain=domain) if kind == "folder" else KINDS[kind](source)


def build_catalog(folder: Path, *, params: dict[str, Any]) -> None:
    """Write the canvas as a catalog, by the code that writes any other.

    Args:
        params: the section ``catalog`` of params.yaml: ``seed``, and pictures a pair by split.
    """
    for _ in build(folder, canvas(params), workers=1):
        pass


def ensure_catalog(project: Project) -> bool:
    """Render the project's catalog if it is one that is rendered and not there yet; give whether it was.

    That of the canvas takes about ten seconds. Pictures of one's own are taken in by ``fade catalog build``.
    """
    folder = Path(project.catalog)
    if project.render is None or (folder / "catalog.parquet").is_file():
        return False
    build_catalog(folder, params=project.section("catalog"))
    return True


def main() -> None:
    """Run the stage with the parameters in params.yaml."""
    params, folders = stage_arguments(__doc__, "catalog", "out")
    build_catalog(folders["out"], params=params)


if __name__ == "__main__":
    main()
