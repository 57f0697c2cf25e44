"""Step ``validate``: a Great Expectations suite over the splits, with Data Docs.

The only file that imports great_expectations. Results carry no values of the data (BOOLEAN_ONLY): the
forget set is personal data, and Data Docs pages outlive it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")

import great_expectations as gx
import great_expectations.expectations as gxe
import numpy as np
import pandas as pd
from great_expectations.data_context.types.base import DataContextConfig, InMemoryStoreBackendDefaults
from great_expectations.execution_engine import PandasExecutionEngine
from great_expectations.expectations.expectation import ColumnMapExpectation
from great_expectations.expectations.metrics import ColumnMapMetricProvider, column_condition_partial
from PIL import Image, UnidentifiedImageError

from fade.concepts import Concept
from fade.data.catalog import COLUMNS, load_catalog, load_concepts
from fade.data.duplicates import as_bits, conflicting, leaked, near_pairs
from fade.data.sets import generated_by
from fade.data.splits import NOTHING, SPLIT_NAMES, differs_in_names_alone
from fade.errors import DataError, listing
from fade.files import write_json
from fade.names import mention
from fade.spec import Spec, load_spec
from tasks.expectations.pages import write_pages

logging.getLogger("great_expectations").setLevel(logging.WARNING)


def validate(folder: Path) -> dict[str, bool]:
    """Judge the splits; write ``validation.json`` and the pages under ``docs/``.

    Returns:
        Expectation to whether it holds; all hold.

    Raises:
        DataError: an expectation fails; names it, the first five pictures at fault and the page.
    """
    spec = load_spec(folder)
    catalog = spec.picture_catalog(folder)
    known = load_catalog(catalog, further=("phash", "subject"))
    tables = {
        name: _looked_at(pd.read_parquet(folder / "splits" / f"{name}.parquet"), catalog, known, spec)
        for name in SPLIT_NAMES
    }
    kinds: set[str] = {pair.kind for pair in spec.pairs}
    near = leaked(tables["forget"], tables["retain"], pictures=catalog, kinds=kinds)
    docs = folder / "docs"
    context = _context(docs)
    source = context.data_sources.add_pandas("splits")
    held: dict[str, bool] = {}
    for name in SPLIT_NAMES:
        checks = _expectations(name, spec, tables)
        if name == "forget":
            checks |= _apart(tables, near, kinds)
        if name == "retain":
            # What stands in for the concept is not there to retain.
            checks |= _balance(known[~known["image_id"].isin(tables["surrogate"]["image_id"])], spec)
        held |= _judged(context, source, name, tables[name], checks)
    context.build_data_docs()
    failed = sorted(key for key, holds in held.items() if not holds)
    culprits = list(dict.fromkeys(_culprits(tables, near))) if failed else []
    page = write_pages(docs, "Validation of the splits", held, culprits)
    if failed:
        detail = f" At fault: {listing(culprits)}." if culprits else ""
        raise DataError(f"The splits did not pass validation: {listing(failed)} failed.{detail} See {page}.")
    write_json(folder / "validation.json", {"expectations": held, "rows": {n: len(t) for n, t in tables.items()}})
    return held


def validate_catalog(folder: Path, *, files: bool = True) -> dict[str, bool]:
    """Judge a catalog; write ``<folder>.validation.json`` and the pages under ``<folder>.docs/``.

    Beside the folder, as DVC owns what is in it.

    Raises:
        DataError: an expectation fails; names it, the first five pictures at fault and the page.
    """
    table = load_catalog(folder, further=("phash", "source_sha256"))
    problems = [_problem(folder / p, s) if files else "" for p, s in zip(table["path"], table["sha256"], strict=True)]
    table = table.assign(problem=problems, sizes=table["width"].astype(str) + "x" + table["height"].astype(str))
    pairs = conflicting(table, pictures=folder) if files else []
    table["alike"] = table["image_id"].isin({name for both in pairs for name in both})
    table["apart"] = _leaves_others(table)
    docs = folder.with_name(f"{folder.name}.docs")
    context = _context(docs)
    held = _judged(
        context,
        context.data_sources.add_pandas("catalog"),
        "catalog",
        table,
        _catalog_expectations(load_concepts(folder)),
    )
    context.build_data_docs()
    failed = sorted(key for key, holds in held.items() if not holds)
    culprits = [f"{row.path}: {row.problem}" for row in table[table["problem"] != ""].itertuples()]
    culprits += [f"{one} looks like {other}" for one, other in pairs]
    if not table["apart"].all():
        culprits.append("all training pictures show one subject in one style; add others: fade catalog add")
    page = write_pages(docs, "Validation of the catalog", held, culprits)
    if failed:
        detail = f" At fault: {listing(culprits)}." if culprits else ""
        raise DataError(f"{folder} did not pass validation: {listing(failed)} failed.{detail} See {page}.")
    write_json(folder.with_name(f"{folder.name}.validation.json"), {"expectations": held, "rows": len(table)})
    return held


def _leaves_others(table: pd.DataFrame) -> bool:
    """Whether training pictures are left to retain when one subject, or one style, is erased."""
    train = table[table["split"] == "train"]
    return bool(train["object"].nunique() > 1 or train["style"].nunique() > 1)


def _catalog_expectations(concepts: dict[str, Concept]) -> dict[str, Any]:
    """A readable name to each expectation of a catalog."""
    return {
        **{
            f"{kind}s are concepts of the catalog, spelled as they are there": gxe.ExpectColumnValuesToBeInSet(
                column=kind, value_set=[one.name for one in concepts.values() if one.kind == kind]
            )
            for kind in ("object", "style")
        },
        "one concept can be erased and others stay": gxe.ExpectColumnValuesToBeInSet(column="apart", value_set=[True]),
        "some pictures are to train on and some are held out": gxe.ExpectColumnDistinctValuesToContainSet(
            column="split", value_set=["train", "holdout"]
        ),
        **{f"has column {column}": gxe.ExpectColumnToExist(column=column) for column in (*COLUMNS, "phash")},
        "is not empty": gxe.ExpectTableRowCountToBeBetween(min_value=1),
        "ids are unique": gxe.ExpectColumnValuesToBeUnique(column="image_id"),
        "files are there, decode and have the recorded hash": gxe.ExpectColumnValuesToBeInSet(
            column="problem", value_set=[""]
        ),
        "every picture has a caption": gxe.ExpectColumnValueLengthsToBeBetween(column="caption", min_value=1),
        "every picture has a subject": gxe.ExpectColumnValueLengthsToBeBetween(column="object", min_value=1),
        "hashes are SHA-256": gxe.ExpectColumnValuesToMatchRegex(column="sha256", regex="^[0-9a-f]{64}$"),
        "perceptual hashes have 64 bits": gxe.ExpectColumnValuesToMatchRegex(column="phash", regex="^[0-9a-f]{16}$"),
        "pictures are train or holdout": gxe.ExpectColumnValuesToBeInSet(
            column="split", value_set=["train", "holdout"]
        ),
        "pictures have one size": gxe.ExpectColumnUniqueValueCountToBeBetween(column="sizes", max_value=1),
        "pictures that look the same show the same subject": gxe.ExpectColumnValuesToBeInSet(
            column="alike", value_set=[False]
        ),
    }


class _FarHash(ColumnMapMetricProvider):
    """Whether a perceptual hash lies far from all of some others."""

    condition_metric_name = "column_values.far_hash"
    condition_value_keys = ("hashes",)

    @column_condition_partial(engine=PandasExecutionEngine)  # type: ignore[untyped-decorator]
    def _pandas(cls, column: pd.Series, hashes: list[str], **_: Any) -> pd.Series:
        pairs = near_pairs(as_bits(column.tolist()), as_bits(hashes))
        return pd.Series(~np.isin(np.arange(len(column)), pairs[:, 0]), index=column.index)


class ExpectHashesToBeFar(ColumnMapExpectation):
    """Expect no picture to be a near-duplicate of some others, by perceptual hash."""

    hashes: list[str]
    map_metric = "column_values.far_hash"
    success_keys = ("hashes", "mostly")


def _looked_at(table: pd.DataFrame, catalog: Path, known: pd.DataFrame, spec: Spec) -> pd.DataFrame:
    """A split with what is to be judged of each row.

    ``problem`` of its file; ``live``: the catalog has not deleted it; ``phash`` and ``subject`` as the catalog
    says now; ``paired``: its two captions differ in the erased names alone; ``number`` within its pair, from 1.
    """
    if missing := {"image_id", "path", "sha256", "caption", "object", "style"} - set(table.columns):
        raise DataError(f"A split lacks the columns {listing(sorted(missing))}. Cut the splits again.")
    joined = table.join(known.set_index("image_id")[["phash", "subject"]], on="image_id")
    live = joined["phash"].notna()
    # One concept at a time may give way to something of its picture's own, the others to their surrogates.
    pairs = spec.pairs
    ways = [
        [(one.names, name if one is changed else one.surrogate) for one in pairs]
        for changed in pairs
        for name in dict.fromkeys((changed.surrogate, *changed.overwrite.values()))
    ]
    targets = table["surrogate_caption"] if "surrogate_caption" in table else [None] * len(table)
    return joined.assign(
        problem=[_problem(catalog / path, sha256) for path, sha256 in zip(table["path"], table["sha256"], strict=True)],
        live=live,
        phash=joined["phash"].fillna("0" * 16),
        paired=[
            target is None or any(differs_in_names_alone(said, target, way) for way in ways)
            for said, target in zip(table["caption"], targets, strict=True)
        ],
        number=table.groupby(["object", "style"]).cumcount() + 1,
    )


def _culprits(tables: dict[str, pd.DataFrame], near: pd.DataFrame) -> Iterator[str]:
    """The pictures at fault, each with what is wrong."""
    retain, subjects = tables["retain"], set(tables["forget"]["subject"].dropna())
    for table in tables.values():
        yield from (f"{row.path}: {row.problem}" for row in table[table["problem"] != ""].itertuples())
        yield from (f"{path}: deleted from the catalog" for path in table[~table["live"]]["path"])
        wrong = table[~table["paired"].astype(bool)]["path"]
        yield from (f"{path}: its captions differ in more than the concept" for path in wrong)
    for other in ("retain", "surrogate", "holdout"):
        shared = tables[other][tables[other]["sha256"].isin(tables["forget"]["sha256"])]
        yield from (f"{path}: is to be forgotten and in the {other} set" for path in shared["path"])
    yield from (f"{path}: a near-duplicate of a picture to forget" for path in near["path"])
    shown = retain[retain["subject"].isin(subjects)]["path"]
    yield from (f"{path}: shows a subject that is to be forgotten" for path in shown)


def _apart(tables: dict[str, pd.DataFrame], near: pd.DataFrame, kinds: set[str]) -> dict[str, Any]:
    """Nothing of the forget set is anywhere else."""
    # Of a style, the same photograph in another style must stay: there only what looks the same counts.
    hashes = (near if kinds == {"style"} else tables["retain"])["phash"].tolist()
    checks: dict[str, Any] = {
        "forget: has no near-duplicate in retain": ExpectHashesToBeFar(column="phash", hashes=hashes),
        "forget: shares no subject with retain": gxe.ExpectColumnValuesToNotBeInSet(
            column="subject", value_set=sorted(set(tables["retain"]["subject"].dropna()))
        ),
    }
    for other in ("retain", "surrogate", "holdout"):
        checks[f"forget: shares no picture with {other}"] = gxe.ExpectColumnValuesToNotBeInSet(
            column="sha256", value_set=tables[other]["sha256"].tolist()
        )
    return checks


def _balance(known: pd.DataFrame, spec: Spec) -> dict[str, Any]:
    """No pair has more pictures to retain than asked for, and at least half of what there is to retain is shown."""
    others = known[known["split"] == "train"]
    for pair in spec.pairs:
        others = others[others[pair.kind] != pair.concept]
    checks: dict[str, Any] = {
        "retain: no pair has more pictures than the settings say": gxe.ExpectColumnValuesToBeBetween(
            column="number", max_value=spec.split.retain_per_pair * spec.split.neighbour_factor
        )
    }
    for kind in ("object", "style"):
        least = -(-others[kind].nunique() // 2)
        checks[f"retain: shows at least half of the other {kind}s"] = gxe.ExpectColumnUniqueValueCountToBeBetween(
            column=kind, min_value=least
        )
    return checks


def _context(docs: Path) -> Any:
    shutil.rmtree(docs, ignore_errors=True)
    # Without its own defaults: they write all pages a second time, into a temporary folder that nobody removes.
    config = DataContextConfig(store_backend_defaults=InMemoryStoreBackendDefaults())
    context = gx.get_context(mode="ephemeral", project_config=config)
    context.variables.progress_bars = {"globally": False}
    store = {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs.resolve())}
    index = {"class_name": "DefaultSiteIndexBuilder"}
    context.add_data_docs_site(
        site_name="fade",
        site_config={"class_name": "SiteBuilder", "site_index_builder": index, "store_backend": store},
    )
    return context


def _problem(path: Path, sha256: str) -> str:
    """What is wrong with a picture's file; empty if nothing is."""
    if not path.is_file():
        return "missing"
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        return "its hash differs from the catalog's"
    try:
        with Image.open(path) as image:
            image.load()
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        return f"does not decode ({error})"
    return ""


def _expectations(name: str, spec: Spec, tables: dict[str, pd.DataFrame]) -> dict[str, Any]:
    """A readable name to each expectation of one split."""
    names = mention(*(word for pair in spec.pairs for word in pair.names))
    given = dict.fromkeys(name for pair in spec.pairs for name in (pair.surrogate, *pair.overwrite.values()))
    surrogates = [name for name in given if name != NOTHING]
    nothing = NOTHING in given
    # A target names a surrogate; where a concept gives way to nothing it is the empty prompt.
    target = "|".join([*([mention(*surrogates)] if surrogates else []), *(["^$"] if nothing else [])])
    paired = ["surrogate_caption"] if name in ("forget", "surrogate", "held_out") else []
    checks: dict[str, Any] = {
        f"{name}: has column {column}": gxe.ExpectColumnToExist(column=column) for column in [*COLUMNS, *paired]
    }
    checks |= {
        f"{name}: no picture has a caption twice": gxe.ExpectCompoundColumnsToBeUnique(
            column_list=["image_id", "caption"]
        ),
        f"{name}: files are there, decode and have the recorded hash": gxe.ExpectColumnValuesToBeInSet(
            column="problem", value_set=[""]
        ),
        f"{name}: every picture has a caption": gxe.ExpectColumnValueLengthsToBeBetween(column="caption", min_value=1),
        f"{name}: comes from its part of the catalog": gxe.ExpectColumnValuesToBeInSet(
            column="split", value_set=["holdout" if name in ("holdout", "held_out") else "train"]
        ),
    }
    if name != "held_out" or spec.distill.stop_at is not None:
        checks[f"{name}: is not empty"] = gxe.ExpectTableRowCountToBeBetween(min_value=1)
    if paired:
        checks |= {
            f"{name}: captions mention the concept": gxe.ExpectColumnValuesToMatchRegex(column="caption", regex=names),
            f"{name}: target captions mention the surrogate": gxe.ExpectColumnValuesToMatchRegex(
                column="surrogate_caption", regex=target
            ),
            f"{name}: captions and targets differ in the concept alone": gxe.ExpectColumnValuesToBeInSet(
                column="paired", value_set=[True]
            ),
        }
    checks[f"{name}: holds no deleted picture"] = gxe.ExpectColumnValuesToBeInSet(column="live", value_set=[True])
    drawn = generated_by(spec.base_sha256)
    checks[f"{name}: says which pictures the base drew"] = (
        gxe.ExpectColumnValuesToBeInSet(column="source", value_set=[drawn])
        if spec.data_free
        else gxe.ExpectColumnValuesToNotBeInSet(column="source", value_set=[drawn])
    )
    if name == "forget":
        for kind in sorted({pair.kind for pair in spec.pairs}):
            checks[f"forget: shows every erased {kind}"] = gxe.ExpectColumnDistinctValuesToContainSet(
                column=kind, value_set=[pair.concept for pair in spec.pairs if pair.kind == kind]
            )
        if not any(pair.image_ids or pair.subjects for pair in spec.pairs):
            checks["forget: has two pictures or more"] = gxe.ExpectTableRowCountToBeBetween(min_value=2)
    if name == "retain":
        for kind in sorted({pair.kind for pair in spec.pairs}):
            checks[f"retain: shows no erased {kind}"] = gxe.ExpectColumnValuesToNotBeInSet(
                column=kind, value_set=[pair.concept for pair in spec.pairs if pair.kind == kind]
            )
    return checks


def _judged(context: Any, source: Any, name: str, table: pd.DataFrame, checks: dict[str, Any]) -> dict[str, bool]:
    asset = source.add_dataframe_asset(name)
    batch = asset.add_batch_definition_whole_dataframe("all")
    suite = context.suites.add(gx.ExpectationSuite(name=name, expectations=list(checks.values())))
    definition = context.validation_definitions.add(gx.ValidationDefinition(name=name, data=batch, suite=suite))
    validation = definition.run(batch_parameters={"dataframe": table}, result_format={"result_format": "BOOLEAN_ONLY"})
    found = {(result.expectation_config.id): bool(result.success) for result in validation.results}
    by_id = {expectation.id: label for label, expectation in zip(checks, suite.expectations, strict=True)}
    return {label: found[key] for key, label in by_id.items()}
