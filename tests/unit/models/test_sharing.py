"""Erasures side by side on one copy of the base: each is what it would have been alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path

import pytest
import torch

from fade.adapters.store import activate, apply_adapter
from fade.asking.prepare import prepare_spec
from fade.config import load_settings
from fade.errors import BaseModelError
from fade.files import sha256_file
from fade.models import family
from fade.models.family import load_base
from fade.models.sharing import bases_shared, give_bases_away
from fade.spec import Spec
from fade.studies.trial import run_trial
from tests.tiny import PROJECT
from tests.unit.adapters.test_adapters import _adapter, _predict


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What was read from disk since."""
    seen: list[object] = []
    plain: Callable[..., object] = family._load_folder

    def counted(found: object, *rest: object, **named: object) -> object:
        seen.append(found)
        return plain(found, *rest, **named)

    monkeypatch.setattr(family, "_load_folder", counted)
    return seen


def test_twins_have_one_memory_and_an_adapter_each(tiny_base: Path, tmp_path: Path, loads: list[object]) -> None:
    folders = [_adapter(tiny_base, tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    loads.clear()
    with bases_shared():
        first, second, third = (load_base(tiny_base) for _ in range(3))
        assert len(loads) == 1
        for one, other in zip(first.network.parameters(), second.network.parameters(), strict=True):
            assert one is not other
            assert one.data_ptr() == other.data_ptr()
        plain = _predict(third.network)
        for twin, folder in ((first, folders[0]), (second, folders[1])):
            apply_adapter(twin, folder, name="a")
            activate(twin, {"a": 1.0})
        changed = [_predict(first.network), _predict(second.network)]
    assert torch.equal(_predict(third.network), plain)
    for answer, folder in zip(changed, folders, strict=True):
        alone = load_base(tiny_base)
        apply_adapter(alone, folder, name="a")
        activate(alone, {"a": 1.0})
        assert torch.equal(answer, _predict(alone.network))
        assert not torch.equal(answer, plain)
    assert len(loads) == 3, "outside, every caller loads its own"


def test_a_base_that_is_at_hand_is_not_read_again_until_a_file_of_it_changes(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied, checked = tmp_path / "copied", list[object]()
    shutil.copytree(tiny_base, copied)
    plain = family.check_weights
    monkeypatch.setattr(family, "check_weights", lambda found: checked.append(found) or plain(found))
    with bases_shared():
        first, second = load_base(copied), load_base(copied)
        assert (len(checked), first.sha256) == (1, second.sha256)
        config = copied / "scheduler" / "scheduler_config.json"
        config.write_text(config.read_text(encoding="utf-8") + "\n", encoding="utf-8")
        assert load_base(copied).sha256 != first.sha256
        assert len(checked) == 2
        with pytest.raises(BaseModelError, match="is another one"):
            load_base(copied, expected_sha256=first.sha256)


def test_a_base_that_is_given_away_is_had_once_and_no_twin_of_it_after(
    tiny_base: Path, tmp_path: Path, loads: list[object]
) -> None:
    folder = _adapter(tiny_base, tmp_path / "1", seed=1)
    loads.clear()
    with bases_shared():
        twin = load_base(tiny_base)
        plain = _predict(twin.network)
        give_bases_away()
        given = load_base(tiny_base)
        assert len(loads) == 1
        assert given.network.conv_in.weight is not twin.network.conv_in.weight
        assert given.network.conv_in.weight.data_ptr() == twin.network.conv_in.weight.data_ptr()
        apply_adapter(given, folder, name="a")
        activate(given, {"a": 1.0})
        assert not torch.equal(_predict(given.network), plain)
        assert torch.equal(_predict(load_base(tiny_base).network), plain), "what was given away is changed"
        assert len(loads) == 2


def test_whoever_writes_into_shared_weights_is_found_out(tiny_base: Path) -> None:
    sharing = bases_shared()
    sharing.__enter__()
    with torch.no_grad():
        load_base(tiny_base).network.conv_in.bias.add_(1)
    with pytest.raises(BaseModelError, match=r"tiny were written into\."):
        sharing.__exit__(None, None, None)


def test_erasures_side_by_side_are_those_made_alone(workspace: Path, tmp_path: Path, loads: list[object]) -> None:
    """The whole trial: saliency, adapters drawn by peft from the one generator of all threads, figures.

    The last is trained whatever its first points come to, since a closed form knows no mask.
    """

    def request(concept: str, surrogate: str, **changes: object) -> Spec:
        return prepare_spec(
            concept, surrogate, project=PROJECT, settings=load_settings(Path("params.yaml"), changes=changes)
        )

    asked = [
        request("astronaut", "cameraman"),
        request("cat", "horse"),
        request("neon", "photo"),
        request("cat", "horse", **{"mask.granularity": "weight", "settings": "fixed"}),
    ]
    alone = [run_trial(one, root=tmp_path / "alone") for one in asked]
    assert len({row["adapter_sha256"] for row in alone}) == len(asked)
    loads.clear()
    with bases_shared(), ThreadPoolExecutor(len(asked)) as pool:
        running = [pool.submit(copy_context().run, run_trial, one, root=tmp_path / "beside") for one in asked]
        beside = [one.result() for one in running]
    assert len(loads) == 1
    for one, first, second in zip(asked, alone, beside, strict=True):
        timings = {name for name in first if name.endswith(("seconds", "_mib"))}
        assert {name: first[name] for name in first.keys() - timings} == {
            name: second[name] for name in second.keys() - timings
        }
        sheets = [sha256_file(tmp_path / place / one.id / "evaluation/sheet.png") for place in ("alone", "beside")]
        assert sheets[0] == sheets[1]
