from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch

from fade import hardware
from fade.errors import ConfigError
from fade.hardware import compute_device, fast_precision
from fade.lineage import ROOT
from flows.operations import doctor
from tasks import trials


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Two GPUs that torch says are there; what is set for them is taken back."""
    monkeypatch.delenv("FADE_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    hardware._reproducible_on_gpus.cache_clear()
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield monkeypatch
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    hardware._reproducible_on_gpus.cache_clear()


def test_models_compute_where_the_setting_says(gpus: pytest.MonkeyPatch) -> None:
    gpus.setattr(hardware, "_multiplies_bfloat16", lambda: False)
    assert compute_device() == torch.device("cuda", 1), "the current one, which a launcher sets"
    assert fast_precision() == "bf16"
    for asked, expected in (("cuda:0", torch.device("cuda", 0)), ("cpu", torch.device("cpu"))):
        gpus.setenv("FADE_DEVICE", asked)
        assert compute_device() == expected
    # Of a processor that has no bfloat16, though the GPU has.
    assert fast_precision() == "fp32"
    assert doctor.gpu().verdict == "warn"
    for asked, message in (("cuda:2", "torch sees 2 GPUs"), ("gpu", "FADE_DEVICE")):
        gpus.setenv("FADE_DEVICE", asked)
        with pytest.raises(ConfigError, match=message):
            compute_device()


def test_on_a_gpu_torch_is_asked_for_the_same_bytes(gpus: pytest.MonkeyPatch) -> None:
    gpus.setenv("FADE_DEVICE", "cpu")
    compute_device()
    assert not torch.are_deterministic_algorithms_enabled()
    gpus.setenv("FADE_DEVICE", "cuda")
    compute_device()
    assert torch.are_deterministic_algorithms_enabled()


def test_of_several_gpus_each_process_gets_the_one_that_the_fewest_are_on(gpus: pytest.MonkeyPatch) -> None:
    with hardware.card_for_a_process() as one, hardware.card_for_a_process() as other:
        assert (one, other) == ({"FADE_DEVICE": "cuda:0"}, {"FADE_DEVICE": "cuda:1"})
        with hardware.card_for_a_process() as third:
            assert third == one
    with hardware.card_for_a_process() as after:
        assert after == one, "it was given back"
    gpus.setenv("FADE_DEVICE", "cuda:1")
    with hardware.card_for_a_process() as named:
        assert named == {}
    gpus.delenv("FADE_DEVICE")
    gpus.setattr(torch.cuda, "device_count", lambda: 1)
    with hardware.card_for_a_process() as only:
        assert only == {}


def test_trials_beside_each_other_are_told_different_gpus(gpus: pytest.MonkeyPatch, tmp_path: Path) -> None:
    together, said = Barrier(2, timeout=60), []

    class Process:
        """Ends well once the other one has begun too, and leaves the figures of a trial."""

        stdout = ()

        def __init__(self, command: list[str], *, env: dict[str, str], **_: object) -> None:
            said.append(env["FADE_DEVICE"])
            together.wait()

        def wait(self) -> int:
            return 0

        poll = wait

    gpus.setattr(trials.subprocess, "Popen", Process)
    gpus.setattr(trials, "figures", lambda folder: {"folder": folder.name})
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(lambda name: trials.trial.fn(tmp_path / name), ("a", "b")))
    assert rows == [{"folder": "a"}, {"folder": "b"}]
    assert sorted(said) == ["cuda:0", "cuda:1"]


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert compute_device().type == "cpu"
    monkeypatch.setenv("FADE_DEVICE", "cuda")
    with pytest.raises(ConfigError, match=r"torch sees 0 GPUs.*FADE_DEVICE=cpu"):
        compute_device()


@pytest.mark.parametrize("name", ["SD 1.5", "SDXL", "SD3.5 medium", "FLUX.1 dev"])
def test_the_benchmark_of_a_card_runs_at_toy_sizes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FADE_DEVICE", "cpu")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    gpu = importlib.import_module("gpu")
    card = gpu.Card()
    found = gpu.at_size(name, card, card.matmul_rate(64), toy=True)
    assert set(gpu.SIZES) == {"SD 1.5", "SDXL", "SD3.5 medium", "FLUX.1 dev"}
    assert found["equal"]  # of two distillations from one beginning
    assert found["step_flops"] > found["parameters"] > 1000
    assert all(found[f"{what}_seconds"] > 0 for what in ("saliency", "draw", "inversion", "step"))


@pytest.mark.slow
def test_the_method_runs_on_a_device_that_is_not_the_cpu() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/unit/pretend_gpu.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:]


def test_fewer_threads_only_inside() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with hardware.threads_at_most(1):
            assert torch.get_num_threads() == 1
            with hardware.threads_at_most(4):
                assert torch.get_num_threads() == 1, "at most is no more"
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
