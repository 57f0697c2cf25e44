"""Intake: from any picture set to a catalog folder, in bounded memory.

A loader (``fade/data/loaders/``, a file each) says which pictures a set has and what they show; this
module does the rest for all of them alike: decode, cut to size, hash, give each a split, write pictures
and table. What cannot be taken in is set aside with a line in ``rejected.json``; the folder appears only
when it is whole.

Two axes, decided for the whole project: every picture shows one subject (column ``object``) in one
``style``. Whatever a set calls its subjects (person, scene, breed, class) is the column ``domain`` and
``domain`` in concepts.json, and the judges' and evaluation's object axis carries them all; a set without
styles is all ``photo``. Attributes of scenes are a further column and are not erased by themselves.
Sentences come from the catalog: ``templates`` in concepts.json, or each picture's own caption where
``captions`` is ``own``.

Splits: a set's own (Imagenette's ``val``) where it has one; else of every pair of object and style each
fifth picture, beginning with the second, is holdout. Pictures of one ``group`` (one photograph in several
styles) stay together. Adding pictures later moves none.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fade.concepts import caption
from fade.data.admission import Admission, admitted
from fade.data.catalog import SCHEMA, load_templates, read_concepts_file, stream_table
from fade.data.pictures import MAX_PIXELS, prepare
from fade.data.sets import Item, PictureSet
from fade.errors import DataError, ResourceError, listing
from fade.files import read_json, write_json, writing
from fade.names import name_key
from fade.sheets import first_pictures

HOLDOUT_EVERY = 5
KINDS = ("object", "style")
_BATCH = 32
_ROW_GROUP = 8192


@dataclass(frozen=True, slots=True)
class _Options:
    """Settings of an intake: see ``build``."""

    size: int | None
    added_at: datetime | None
    workers: int | None
    max_pixels: int
    bits: int | None = None
    strict: bool = False


def build(
    folder: Path,
    pictures: PictureSet,
    *,
    size: int | None = None,
    added_at: datetime | None = None,
    workers: int | None = None,
    max_pixels: int = MAX_PIXELS,
    bits: int | None = None,
    strict: bool = False,
) -> Iterator[int]:
    """Write a catalog; yields the number of pictures done.

    Args:
        size: side of the square every picture is cut to; None keeps sizes (then they must be equal to train on).
        added_at: written into every row; None for built-in data, whose bytes must be the same every time.
        workers: processes that decode; None takes one for each core.
        bits: as ``fade.data.pictures.prepare``.
        strict: refuse the whole set if one picture is set aside.

    Raises:
        DataError: the set's layout is broken, or not one picture of it can be taken in. Nothing is written then.
    """
    yield from _write(folder, pictures, Admission(), None, _Options(size, added_at, workers, max_pixels, bits, strict))


def add(
    folder: Path,
    pictures: PictureSet,
    *,
    size: int | None = None,
    added_at: datetime | None = None,
    workers: int | None = None,
    max_pixels: int = MAX_PIXELS,
    bits: int | None = None,
) -> Iterator[int]:
    """Add pictures to a catalog. Ids that are taken, and pictures that were deleted or look so, are set aside.

    The catalog's sentences stay and caption the new pictures too; what was set aside before stays listed.

    Args:
        size: as ``build``; None takes the size of the pictures that are there.

    Raises:
        DataError: as ``build``; or the set's captions or size do not go with the catalog's.
    """
    known = read_concepts_file(folder)
    pictures = replace(pictures, templates=_common_templates(folder, known, pictures))
    earlier = read_json(folder / "rejected.json")["rejected"]
    state = Admission(
        earlier=dict.fromkeys((entry["name"], entry["reason"]) for entry in earlier),
    )
    state.knows(known["concepts"])
    sizes: set[tuple[int, int]] = set()
    for batch in stream_table(folder):
        for row in batch.to_pylist():
            sizes.add((row["width"], row["height"]))
            state.takes(row["image_id"])
            state.pairs[row["object"], row["style"]] += 1
            if row["deleted_at"] is not None:
                state.deleted_hashes |= {row["sha256"], row["source_sha256"]}
                state.deleted_pictures.add(row["style"], row["phash"])
    side = _common_size(folder, sizes, size)
    yield from _write(folder, pictures, state, folder, _Options(side, added_at, workers, max_pixels, bits))


def _common_templates(folder: Path, known: dict[str, Any], pictures: PictureSet) -> tuple[str, ...]:
    """The catalog's own sentences.

    Raises:
        DataError: they cannot caption the new pictures.
    """
    captions, wanted = known.get("captions", "templates"), _captions_word(pictures)
    if captions != wanted:
        raise DataError(
            f"{folder} has captions by {captions}, the new pictures by {wanted}. Build a catalog of their own for them."
        )
    templates = load_templates(folder) or ()
    names_style = "{style}" in "".join(templates[:1])
    if templates and not names_style and "{style}" in pictures.templates[0]:
        raise DataError(
            f"The sentences of {folder} name no style (its first is {templates[0]!r}), the new pictures have styles. "
            "Build a catalog of their own for them, or build one of the set with styles and add the other to it."
        )
    return templates or pictures.templates


def _common_size(folder: Path, sizes: set[tuple[int, int]], size: int | None) -> int | None:
    """The side of the catalog's pictures, where they have one.

    Raises:
        DataError: another is asked for: a base draws one size.
    """
    if len(sizes) != 1:
        return size
    ((width, height),) = sizes
    if size is not None and (width, height) != (size, size):
        raise DataError(f"The pictures of {folder} are {width} x {height}: got --size {size}. Leave it out.")
    return width if width == height else size


def _captions_word(pictures: PictureSet) -> str:
    return "own" if pictures.own_captions else "templates"


def _write(
    folder: Path, pictures: PictureSet, state: Admission, before: Path | None, options: _Options
) -> Iterator[int]:
    """Write the catalog as one: table, pictures, concepts, what was set aside, sheet; yields pictures done."""
    state.knows(pictures.concepts)
    with writing(folder) as temporary:
        (temporary / "pictures").mkdir(parents=True)
        with pq.ParquetWriter(temporary / "catalog.parquet", SCHEMA) as writer:
            if before is not None:
                _carry_over(before, temporary, writer)
            group = []
            for row in _rows(temporary, pictures, state, options):
                group.append(row)
                if len(group) == _ROW_GROUP:
                    writer.write_table(pa.Table.from_pylist(group, schema=SCHEMA))
                    group = []
                yield state.rows
            if group:
                writer.write_table(pa.Table.from_pylist(group, schema=SCHEMA))
        reasons = [f"{entry['name']}: {entry['reason']}" for entry in state.rejected]
        if state.rows == 0:
            raise DataError(
                f"Not one picture of {pictures.source} could be taken in"
                + (f": {listing(reasons)}. Mend them and build again." if reasons else ": it holds none.")
            )
        if options.strict and reasons:
            raise DataError(f"{len(reasons)} pictures cannot be taken in: {listing(reasons)}. Mend them.")
        write_json(temporary / "concepts.json", _concepts_file(pictures, state))
        write_json(temporary / "rejected.json", {"rejected": state.report()})
        draw_sheet(temporary)


def _carry_over(before: Path, temporary: Path, writer: pq.ParquetWriter) -> None:
    """The rows and pictures that were there; pictures by hard link, as they never change in place."""
    for batch in stream_table(before):
        writer.write_batch(batch)
        for path in batch.column("path").to_pylist():
            if (before / path).is_file():
                target = temporary / path
                target.parent.mkdir(parents=True, exist_ok=True)
                os.link(before / path, target)


def _rows(temporary: Path, pictures: PictureSet, state: Admission, options: _Options) -> Iterator[dict[str, Any]]:
    """The table's rows of the pictures that are taken in; the others are set aside."""
    for item, outcome in _prepared(admitted(pictures, state), temporary, options):
        if isinstance(outcome, str):
            state.set_aside(item.name, outcome)
        elif {outcome["sha256"], outcome["source_sha256"]} & state.deleted_hashes:
            (temporary / outcome["path"]).unlink()
            state.set_aside(item.name, "was deleted from this catalog before; what was deleted does not come back")
        elif state.deleted_pictures.near(item.style, outcome["phash"]):
            (temporary / outcome["path"]).unlink()
            state.set_aside(
                item.name, "looks like a picture that was deleted from this catalog: saved again, or scaled"
            )
        else:
            _mended(state, item.name)
            yield _row(item, outcome, pictures, state, options.added_at)


def _mended(state: Admission, name: str) -> None:
    """A picture that was set aside once and is taken in now leaves the report."""
    for entry in [entry for entry in state.earlier if entry[0] == name]:
        del state.earlier[entry]


def _prepared(items: Iterator[Item], folder: Path, options: _Options) -> Iterator[tuple[Item, dict[str, Any] | str]]:
    """Each item with what ``_store`` gives, in order; at most a few batches a worker are under way."""
    if options.workers == 1:  # each as it comes: a base may draw them, and takes its time
        yield from ((item, _store([item], folder, options)[0]) for item in items)
        return
    chunks: Iterator[Sequence[Item]] = iter(lambda: list(islice(items, _BATCH)), [])
    first = list(islice(chunks, 4))
    chunks = chain(first, chunks)
    count = options.workers if options.workers is not None else os.cpu_count() or 1
    if len(first) < 4 or count == 1:  # starting processes would take longer
        for chunk in chunks:
            yield from zip(chunk, _store(chunk, folder, options), strict=True)
        return
    waiting: deque[tuple[Sequence[Item], Any]] = deque()
    try:
        with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
            for chunk in chunks:
                waiting.append((chunk, pool.submit(_store, chunk, folder, options)))
                if len(waiting) > 2 * count:
                    done, future = waiting.popleft()
                    yield from zip(done, future.result(), strict=True)
            for done, future in waiting:
                yield from zip(done, future.result(), strict=True)
    except BrokenProcessPool:
        raise ResourceError(
            "A process that decodes pictures was ended from without, most often for want of memory. Take fewer at "
            "once: --workers 1."
        ) from None


def _store(chunk: Sequence[Item], folder: Path, options: _Options) -> list[dict[str, Any] | str]:
    """Write the pictures of some items; give the columns found, or the reason why one was not taken."""
    found: list[dict[str, Any] | str] = []
    for item in chunk:
        try:
            ready = prepare(item.source, size=options.size, max_pixels=options.max_pixels, bits=options.bits)
            path = folder / "pictures" / f"{item.image_id}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(ready.content)
        except DataError as error:
            found.append(str(error))
            continue
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            found.append("its name is taken: another picture is called as its folder, or it as theirs; rename it")
            continue
        found.append(
            {
                "path": f"pictures/{item.image_id}.png",
                "sha256": ready.sha256,
                "phash": ready.phash,
                "width": ready.width,
                "height": ready.height,
                "source_sha256": ready.source_sha256,
                "source_width": ready.source_width,
                "source_height": ready.source_height,
                "source_mode": ready.mode,
            }
        )
    return found


def _row(
    item: Item, found: dict[str, Any], pictures: PictureSet, state: Admission, added_at: datetime | None
) -> dict[str, Any]:
    person = item.person or pictures.person
    state.concepts.setdefault(name_key(item.object), _concept(item.object, "object", pictures.domain, person))
    state.concepts.setdefault(name_key(item.style), _concept(item.style, "style", "style", False))
    state.rows += 1
    return {
        "image_id": item.image_id,
        "mode": "RGB",
        "caption": item.caption or caption(item.object, item.style, pictures.templates[0]),
        "object": item.object,
        "style": item.style,
        "split": _split(item, state),
        "person": person,
        "source": item.origin or pictures.source,
        "licence": item.licence or pictures.licence,
        "domain": pictures.domain,
        "attributes": list(item.attributes),
        "subject": item.subject,
        "uri": item.name,
        "added_at": added_at,
        "deleted_at": None,
        **found,
    }


def _split(item: Item, state: Admission) -> str:
    pair = (item.object, item.style)
    number = state.pairs[pair]
    state.pairs[pair] += 1
    if item.split is not None:
        return item.split
    split = "holdout" if number % HOLDOUT_EVERY == 1 else "train"
    return split if item.group is None else state.groups.setdefault(item.group, split)


def _concept(name: str, kind: str, domain: str, person: bool) -> dict[str, Any]:
    return {"name": name, "kind": kind, "aliases": [], "person": person, "domain": domain}


def _concepts_file(pictures: PictureSet, state: Admission) -> dict[str, Any]:
    known = list(state.concepts.values())
    ordered = [entry for kind in KINDS for entry in known if entry["kind"] == kind]
    return {"concepts": ordered, "templates": list(pictures.templates), "captions": _captions_word(pictures)}


def draw_sheet(folder: Path) -> None:
    """Draw a catalog's contact sheet of the pictures that it has now; without one there is no sheet."""
    concepts = read_concepts_file(folder)["concepts"]
    names = {kind: [entry["name"] for entry in concepts if entry["kind"] == kind] for kind in KINDS}
    first: dict[tuple[str, str], Path] = {}
    for batch in stream_table(folder, ["object", "style", "path", "deleted_at"]):
        for row in batch.to_pylist():
            pair, path = (row["object"], row["style"]), folder / row["path"]
            if pair not in first and row["deleted_at"] is None and path.is_file():
                first[pair] = path
    if not first:
        (folder / "sheet.png").unlink(missing_ok=True)
        return
    with writing(folder / "sheet.png") as temporary:
        first_pictures(names["object"], names["style"], first).save(temporary)
