"""Distillation in several processes: a batch's shares differ, add up to the whole, and give the same adapter."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fade.adapters.store import WEIGHTS_NAME
from fade.asking.prepare import prepare_spec
from fade.config import load_settings
from fade.errors import ConfigError
from fade.files import read_json
from fade.methods.fade.processes import ALONE, Processes
from fade.methods.fade.sparse_lora import add_sparse_lora
from fade.models.families.stable_diffusion import StableDiffusion
from fade.spec import save_spec
from fade.steps.adapter import make_adapter
from fade.steps.mask import mask
from fade.steps.saliency import saliency
from fade.steps.split import split
from tests.tiny import PROJECT
from tests.unit.methods.test_fast_step import _everywhere, _run

RTOL = 2**-10
"""Of each number of the adapter, which is stored as float16: its last bit."""


def test_shares_are_all_rows_once_and_nearly_even() -> None:
    for count in (1, 2, 3, 7):
        shares = [range(20)[Processes(i, count).rows(20)] for i in range(count)]
        assert [row for share in shares for row in share] == list(range(20))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("changes", [{}, {"micro_batch": 3}, {"pool": 8}])
def test_the_halves_differ_and_add_up_to_the_whole(
    base: StableDiffusion, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    parameters = add_sparse_lora(base.network, _everywhere(base), rank=2, alpha=2.0, seed=1, name="student")
    begin = [parameter.detach().clone() for parameter in parameters]
    told: list[list[Tensor]] = []
    monkeypatch.setattr(
        Processes, "add_up", lambda _, tensors: told.append([tensor.detach().clone() for tensor in tensors])
    )
    for processes in (ALONE, Processes(0, 2), Processes(1, 2)):
        with torch.no_grad():
            for parameter, value in zip(parameters, begin, strict=True):
                parameter.copy_(value)
        _run(base, parameters, steps=1, processes=processes, **changes)
    if "pool" in changes:
        whole, *parts = told[0::2]  # the teacher's answers: none is in both parts
        torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0], rtol=1e-4, atol=1e-5)
        assert bool((parts[0][0] * parts[1][0] == 0).all())
        return  # what a process learns from a pool of which it has half is not looked at: nothing was added up
    whole, first, second = told
    assert first[0][0] > 0 == first[0][1], "the first half of the rows is to be forgotten"
    assert second[0][1] >= 0 == second[0][0]
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(first[1:], second[1:], strict=True))
    for a, b, expected in zip(first, second, whole, strict=True):
        torch.testing.assert_close(a + b, expected, rtol=1e-3, atol=1e-6)


def test_more_processes_than_rows_are_refused(base: StableDiffusion) -> None:
    parameters = add_sparse_lora(base.network, _everywhere(base), rank=2, alpha=2.0, seed=1, name="student")
    with pytest.raises(ConfigError, match="9 processes share 8 rows"):
        _run(base, parameters, processes=Processes(0, 9))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_make_the_adapters_of_one(workspace: Path, tmp_path: Path) -> None:
    # One process goes over the halves of a batch one after the other, two side by side: the same sums, to the last bit.
    halves = {"threads": 1, "distill.steps": 8, "distill.batch": 4, "distill.micro_batch": 4}
    folders = {}
    for name, changes in {"fresh": {}, "pool": {"distill.pool": 8, "distill.stop_at": 0.5}}.items():
        settings = load_settings(Path("params.yaml"), changes={**halves, **changes})
        one, two = tmp_path / name / "one", tmp_path / name / "two"
        save_spec(prepare_spec("astronaut", "cameraman", project=PROJECT, settings=settings), one)
        for step in (split, saliency, mask):
            step(one)
        shutil.copytree(one, two)
        for _ in make_adapter(one):
            pass
        folders[one] = two
    # Both by one launch: to load the libraries takes longer than both adapters.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += ["-m", "fade.steps.adapter", *map(str, folders.values())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for one, two in folders.items():
        assert read_json(two / "adapter/card.json")["processes"] == 2
        assert "processes" not in read_json(one / "adapter/card.json")
        made = [load_file(folder / "adapter" / WEIGHTS_NAME) for folder in (one, two)]
        assert list(made[0]) == list(made[1])
        assert sum(float(tensor.abs().sum()) for name, tensor in made[0].items() if "lora_B" in name) > 0
        for name, tensor in made[0].items():
            torch.testing.assert_close(made[1][name], tensor, rtol=RTOL, atol=0.0)
        curves = [pd.read_csv(folder / "curve.csv") for folder in (one, two)]
        assert len(curves[0]) > 1
        pd.testing.assert_frame_equal(*curves, rtol=1e-6)
