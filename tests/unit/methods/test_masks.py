from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fade.errors import ConfigError, MaskMismatchError
from fade.methods.fade.masks import Mask, keep_most, load_mask, make_mask, save_mask
from fade.models.families.stable_diffusion import UNet

values = st.lists(st.sampled_from([0.0, 0.0, 1e-9, 0.5, 0.5, 2.0]), min_size=1, max_size=12)
scores = st.dictionaries(st.text("abcdef.", min_size=1, max_size=6), values, min_size=1, max_size=12)


def _tensors(scores: dict[str, list[float]]) -> dict[str, Tensor]:
    return {name: torch.tensor(part) for name, part in scores.items()}


def _sorted_reference(scores: dict[str, list[float]], density: float) -> set[tuple[str, int]]:
    """The plain way: sort all entries by score, then by name and position."""
    entries = [(-value, name, i) for name, part in scores.items() for i, value in enumerate(part)]
    return {(name, i) for _, name, i in sorted(entries)[: max(1, round(density * len(entries)))]}


@given(scores, st.floats(0.001, 1.0))
def test_a_weight_mask_keeps_what_a_full_sort_keeps_ties_and_zeros_included(
    scores: dict[str, list[float]], density: float
) -> None:
    mask = make_mask(_tensors(scores), density, granularity="weight")
    kept = {(name, int(i)) for name, part in mask.weights.items() for i in part.nonzero()}
    assert kept == _sorted_reference(scores, density)
    assert mask.kept == len(kept)
    assert mask.of == sum(map(len, scores.values()))


@given(scores, st.floats(0.001, 1.0))
def test_a_module_mask_keeps_exactly_k_and_none_below_a_dropped_one(
    scores: dict[str, list[float]], density: float
) -> None:
    means = {name: sum(part) / len(part) for name, part in scores.items()}
    tensors = {name: torch.tensor(value) for name, value in means.items()}
    mask = make_mask(tensors, density, granularity="module")
    assert len(mask.modules) == mask.kept == max(1, round(density * len(scores)))
    dropped = [float(tensors[name]) for name in means if name not in mask.modules]
    assert not dropped or min(float(tensors[name]) for name in mask.modules) >= max(dropped)


@given(scores, st.floats(0.001, 1.0))
def test_a_mask_does_not_depend_on_the_order_of_scores(scores: dict[str, list[float]], density: float) -> None:
    one = make_mask(_tensors(scores), density, granularity="weight")
    other = make_mask(_tensors(dict(reversed(scores.items()))), density, granularity="weight")
    assert one.modules == other.modules
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.modules)


def _neurons(rows: dict[str, list[float]], columns: dict[str, list[float]]) -> dict[str, Tensor]:
    return {f"{name}:rows": torch.tensor(v) for name, v in rows.items()} | {
        f"{name}:columns": torch.tensor(v) for name, v in columns.items()
    }


def test_a_neuron_mask_keeps_the_top_rows_and_the_top_columns_of_all_modules() -> None:
    saliency = _neurons({"a": [3.0, 0.0], "b": [1.0, 2.0]}, {"a": [5.0, 0.0, 4.0], "b": [1.0]})
    mask = make_mask(saliency, 0.5, granularity="neuron")
    assert mask.modules == ("a",)  # b keeps a row, yet no column: it cannot change
    assert mask.rows["a"].tolist() == [True, False]
    assert mask.columns["a"].tolist() == [True, False, True]
    assert (mask.kept, mask.of) == (4, 8)


def test_a_neuron_mask_that_lets_nothing_change_is_refused() -> None:
    with pytest.raises(MaskMismatchError, match=r"No module keeps both a row and a column"):
        make_mask(_neurons({"a": [3.0], "b": [1.0]}, {"a": [0.0], "b": [1.0]}), 0.5, granularity="neuron")


def test_none_keeps_every_module_whatever_its_saliency() -> None:
    saliency = {"b": torch.tensor(0.0), "a": torch.tensor(1.0)}
    assert make_mask(saliency, 0.5, granularity="none").modules == ("a", "b")
    assert make_mask(saliency, 0.5, granularity="module").modules == ("a",)


def test_a_mask_chooses_within_the_named_modules_only() -> None:
    names = ["conv_in", "mid.attn1.to_q", "mid.attn2.to_k", "mid.attn2.to_out.0"]
    saliency = {name: torch.tensor(1.0) for name in names}
    assert len(make_mask(saliency, 1.0, granularity="module").modules) == 4
    assert make_mask(saliency, 1.0, granularity="module", within=UNet.patterns["attention"]).modules == tuple(names[1:])
    assert make_mask(saliency, 1.0, granularity="none", within=UNet.patterns["cross_attention"]).modules == (
        "mid.attn2.to_k",
    )


@pytest.mark.parametrize(
    "mask",
    [
        Mask("module", ("a", "b"), 2, 5),
        Mask("neuron", ("a",), 3, 6, rows={"a": torch.tensor([True, False])}, columns={"a": torch.tensor([True] * 9)}),
        Mask("weight", ("a",), 4, 18, weights={"a": torch.arange(18).view(2, 1, 3, 3) % 5 == 0}),
    ],
)
def test_a_mask_comes_back_from_its_files_as_it_was(mask: Mask, tmp_path: Path) -> None:
    save_mask(tmp_path / "mask", mask)
    found = load_mask(tmp_path / "mask")
    assert (found.granularity, found.modules, found.kept, found.of) == (
        *(mask.granularity, mask.modules, mask.kept, mask.of),
    )
    for mine, theirs in ((mask.rows, found.rows), (mask.columns, found.columns), (mask.weights, found.weights)):
        assert set(mine) == set(theirs)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_the_hash_of_mask_json_covers_the_bits_and_changed_bits_are_refused(tmp_path: Path) -> None:
    one, other = torch.tensor([True, False, True, False]), torch.tensor([False, True, True, False])
    for name, bits in (("one", one), ("other", other)):
        save_mask(tmp_path / name, Mask("weight", ("a",), 2, 4, weights={"a": bits}))
    assert (tmp_path / "one/mask.json").read_text() != (tmp_path / "other/mask.json").read_text()
    (tmp_path / "one/mask.safetensors").write_bytes((tmp_path / "other/mask.safetensors").read_bytes())
    with pytest.raises(MaskMismatchError, match="was changed"):
        load_mask(tmp_path / "one")
    with pytest.raises(MaskMismatchError, match="is not the adapter's: got"):
        load_mask(tmp_path / "other", sha256="0" * 64)
    with pytest.raises(MaskMismatchError, match="got nothing"):
        load_mask(tmp_path / "none")


def test_bad_density_and_scores_are_refused() -> None:
    for density in (0.0, -0.1, 1.5):
        with pytest.raises(ConfigError, match="density must be in"):
            make_mask({"a": torch.tensor(1.0)}, density, granularity="module")
    with pytest.raises(MaskMismatchError, match="something to choose from"):
        make_mask({}, 0.5, granularity="module")
    with pytest.raises(MaskMismatchError, match="saliency of b is not a number"):
        make_mask({"a": torch.tensor(1.0), "b": torch.tensor(float("nan"))}, 0.5, granularity="module")


def test_keep_most_counts_exactly_among_a_million_ties() -> None:
    kept = keep_most({"a": torch.zeros(1000, 500), "b": torch.zeros(500_000)}, 0.3)
    assert int(kept["a"].sum()) == 300_000
    assert not kept["b"].any()
