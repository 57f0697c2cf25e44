from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fade.errors import ConfigError, MaskMismatchError
from fade.method.masks import module_mask

scores = st.dictionaries(
    st.text("abcdef.", min_size=1, max_size=6),
    st.sampled_from([0.0, 0.0, 1e-9, 0.5, 0.5, 2.0]),
    min_size=1,
    max_size=30,
)


@given(scores, st.floats(0.001, 1.0))
def test_mask_keeps_exactly_k_and_none_below_a_dropped_one(scores: dict[str, float], density: float) -> None:
    kept = module_mask(scores, density)
    assert len(kept) == len(set(kept)) == max(1, round(density * len(scores)))
    dropped = [scores[name] for name in scores if name not in kept]
    assert not dropped or min(scores[name] for name in kept) >= max(dropped)


@given(scores, st.floats(0.001, 1.0))
def test_mask_does_not_depend_on_the_order_of_scores(scores: dict[str, float], density: float) -> None:
    assert module_mask(scores, density) == module_mask(dict(reversed(scores.items())), density)


def test_all_zero_saliency_still_keeps_exactly_k() -> None:
    assert module_mask(dict.fromkeys("dcba", 0.0), 0.5) == ("a", "b")


def test_density_one_keeps_all() -> None:
    assert module_mask({"b": 0.0, "a": 1.0}, 1.0) == ("a", "b")


def test_bad_density_and_scores_are_refused() -> None:
    for density in (0.0, -0.1, 1.5):
        with pytest.raises(ConfigError, match="density must be in"):
            module_mask({"a": 1.0}, density)
    with pytest.raises(MaskMismatchError, match="at least one module"):
        module_mask({}, 0.5)
    with pytest.raises(MaskMismatchError, match="saliency of b is not a number"):
        module_mask({"a": 1.0, "b": float("nan")}, 0.5)
