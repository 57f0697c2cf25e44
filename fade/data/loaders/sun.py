"""SUN Attributes: ``images.mat``, ``attributes.mat``, ``attributeLabels_continuous.mat`` and the folder ``images``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from fade.data.loaders.files import folder_of, words
from fade.data.sets import Item, PictureSet, Rejected
from fade.errors import DataError

PRESENT = 0.5
"""Share of the three annotators from which on an attribute counts as shown."""


def sun(root: Path) -> PictureSet:
    """The unpacked tables beside ``images``; the subject is the scene, its attributes a further column.

    Raises:
        DataError: a table is missing, damaged or does not fit the others; or there are no images.
    """
    folder_of(root, "SUNAttributeDB")
    names = [str(row.ravel()[0].item()) for row in _table(root, "images", "images").ravel()]
    attributes = [str(row.ravel()[0].item()) for row in _table(root, "attributes", "attributes").ravel()]
    votes = _table(root, "attributeLabels_continuous", "labels_cv").astype(np.float64)
    if votes.shape != (len(names), len(attributes)):
        raise DataError(
            f"{root / 'attributeLabels_continuous.mat'} is a table of {votes.shape}: expected "
            f"{len(names)} images x {len(attributes)} attributes, as the other tables say."
        )
    folder_of(root / "images", "images of the SUN database")
    return PictureSet(_items(root, names, attributes, votes), "SUN Attributes", domain="scene")


def _table(root: Path, file: str, variable: str) -> NDArray[Any]:
    path = root / f"{file}.mat"
    if not path.is_file():
        raise DataError(f"{path} is missing: SUN Attributes keeps {variable!r} there. Unpack SUNAttributeDB.tar.gz.")
    try:
        return np.asarray(loadmat(path)[variable])
    except KeyError:
        raise DataError(f"{path} holds no variable {variable!r}. Unpack SUNAttributeDB.tar.gz again.") from None
    except (MatReadError, ValueError, OSError, NotImplementedError, TypeError) as error:
        raise DataError(f"{path} is no MATLAB table that can be read ({error}). Unpack it again.") from None


def _items(
    root: Path, names: list[str], attributes: list[str], votes: NDArray[np.float64]
) -> Iterator[Item | Rejected]:
    inside = (root / "images").resolve()
    for name, row in zip(names, votes, strict=True):
        parts = PurePosixPath(name).parts
        path = root / "images" / name
        if len(parts) < 3 or ".." in parts or not path.resolve().is_relative_to(inside):
            yield Rejected(name, "leaves the folder of images: expected <letter>/<scene>/sun_....jpg")
        elif not np.isfinite(row).all():
            yield Rejected(name, "has an attribute that is not a number")
        else:
            shown = tuple(word for word, vote in zip(attributes, row, strict=True) if vote >= PRESENT)
            scene = " ".join(words(part) for part in parts[1:-1])
            yield Item(PurePosixPath(name).with_suffix("").as_posix(), name, path, scene, attributes=shown)
