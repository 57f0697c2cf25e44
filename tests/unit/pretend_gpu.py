"""The method on a GPU, on machines without one; run by test_gpu.py in a process of its own, as it changes torch.

The device is torch's slot for devices it does not know, and its tensors are fake: they carry shapes, types and
devices, but no numbers. Where two devices meet, a fake tensor raises as a real GPU would; where a number is read
that a GPU would have to be waited for, it raises too. Not seen here: whether kernels exist, and what they compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorDeviceMismatchError, FakeTensorMode
from torch.utils import backend_registration

from fade.methods.fade import saliency
from fade.methods.fade.adversary import Adversary
from fade.methods.fade.distillation import distill
from fade.methods.fade.masks import Mask
from fade.methods.fade.saliency import salient_parameters
from fade.methods.fade.sparse_lora import add_sparse_lora, computed_whole
from fade.methods.fade.targeting import power_law
from fade.models.families import stable_diffusion
from fade.models.families.stable_diffusion import StableDiffusion
from fade.models.generate import sample_latents
from fade.models.told import Told
from tests.unit.methods.test_fast_step import distill_settings
from tests.unit.methods.test_method import _examples


class _Hooks(torch._C._acc.PrivateUse1Hooks):
    """What torch asks a device's library."""

    def is_available(self) -> bool:
        return False

    def has_primary_context(self, _index: int) -> bool:
        return False

    def is_built(self) -> bool:
        return True


class _Module:
    """What torch looks for under ``torch.NAME``; the first makes ``torch.autocast`` known to it, though not to its
    operators: the tests compute in float32."""

    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])
    is_available = staticmethod(lambda: False)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    manual_seed_all = staticmethod(lambda _seed: None)
    _is_in_bad_fork = staticmethod(lambda: False)


backend_registration._setup_privateuseone_for_python_backend("pretended", _Module(), _Hooks())
GPU = torch.device("pretended", 0)
PROMPTS = ["a cat image in neon style.", "a dog image in oil style."]


def _moved(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """``Module.to`` for fake tensors, whose own way asks that nothing else refers to a parameter."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(change(parameter.detach()), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = change(buffer)
    return module


@pytest.fixture
def on_gpu(base: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> Iterator[StableDiffusion]:
    def to(module: nn.Module, *where: Any, **options: Any) -> nn.Module:
        return _moved(module, lambda tensor: tensor.to(*where, **options))

    monkeypatch.setattr(nn.Module, "to", to)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for part in base.pipeline.components.values():
            if isinstance(part, nn.Module):
                _moved(part, lambda tensor: mode.from_tensor(tensor).to(GPU))
        assert base.device == GPU
        yield base


def _mask(base: StableDiffusion, kind: str) -> Mask:
    names = tuple(sorted(salient_parameters(base.network)))[::3]
    weights = {name: base.network.get_submodule(name).weight for name in names}
    if kind == "weight":
        chosen = {name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in weights.items()}
        return Mask("weight", names, 1, 1, weights=chosen)
    if kind == "neuron":
        rows = {name: torch.ones(weight.shape[0], dtype=torch.bool) for name, weight in weights.items()}
        columns = {name: torch.ones(weight.shape[1], dtype=torch.bool) for name, weight in weights.items()}
        return Mask("neuron", names, 1, 1, rows=rows, columns=columns)
    return Mask("none", names, 1, 1)


def test_fake_tensors_refuse_what_a_gpu_would(on_gpu: StableDiffusion) -> None:
    weight = on_gpu.network.conv_in.weight
    with pytest.raises(FakeTensorDeviceMismatchError):
        weight + torch.zeros(weight.shape)
    with pytest.raises(DataDependentOutputException, match="_local_scalar_dense"):
        float(weight.sum())


@pytest.mark.parametrize("kind", ["none", "neuron", "weight"])
@pytest.mark.parametrize("changes", [{}, {"micro_batch": 3}, {"pool": 8}], ids=["plain", "micro-batches", "pool"])
def test_steps_run_on_the_gpu_and_nothing_waits_for_it(
    on_gpu: StableDiffusion, kind: str, changes: dict[str, Any]
) -> None:
    parameters = add_sparse_lora(on_gpu.network, _mask(on_gpu, kind), rank=2, alpha=4.0, seed=1, name="student")
    assert {parameter.device for parameter in parameters} == {GPU}
    with computed_whole(on_gpu.network):
        steps = list(distill(on_gpu.denoiser, parameters, **distill_settings(on_gpu, steps=2, **changes)))
    assert [step.step for step in steps] == [1, 2]
    assert steps[0].losses.device == GPU
    with pytest.raises(DataDependentOutputException, match="_local_scalar_dense"):
        _ = steps[0].forget_loss


@pytest.mark.parametrize("score", ["gain", "decrement", "noise", "teacher"])
def test_saliency_runs_on_the_gpu_and_comes_back(on_gpu: StableDiffusion, score: str) -> None:
    options: dict[str, Any] = {"granularity": "module", "at_once": 2}
    drawn = [
        saliency.noisy_groups(_examples(6), groups=2, group_size=3, timesteps=power_law(1000, 1.0), seed=1)
        for _ in range(2)
    ]
    runs: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
        "gain": lambda: saliency.expected_gain(on_gpu.denoiser, drawn[0], **options),
        "decrement": lambda: saliency.expected_decrement(on_gpu.denoiser, *drawn, seed=1, **options),
        "noise": lambda: saliency.accumulate_saliency(on_gpu.denoiser, drawn[0], against="noise", **options),
        "teacher": lambda: saliency.accumulate_saliency(on_gpu.denoiser, drawn[0], against="teacher", **options),
    }
    found = runs[score]()
    assert {value.device.type for value in found.values()} == {"cpu"}


def test_a_deep_step_too(on_gpu: StableDiffusion) -> None:
    examples = _examples(6)
    adversary = Adversary(
        examples.latents,
        starts=examples.prompts,
        empty=Told(torch.zeros(1, 16, 32)),
        states=2,
        lifetime=2,
        batch=4,
        learning_rate=0.1,
        size=4,
        share=0.5,
        empty_share=0.1,
        retain_share=0.5,
        precision="fp32",
        device=GPU,
        seed=1,
    )
    parameters = add_sparse_lora(on_gpu.network, _mask(on_gpu, "none"), rank=2, alpha=4.0, seed=1, name="student")
    assert (
        len(list(distill(on_gpu.denoiser, parameters, **distill_settings(on_gpu, steps=2, adversary=adversary)))) == 2
    )


class _Still(DDIMScheduler):
    """Reads no number: fake tensors have none."""

    def step(self, _answer: torch.Tensor, _timestep: torch.Tensor, sample: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(prev_sample=sample)


def test_encoding_drawing_and_decoding(on_gpu: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(stable_diffusion._SOLVERS, "ddim", _Still)
    told = on_gpu.encode_prompts(PROMPTS)
    assert told.states.device.type == "cpu"
    size = on_gpu.picture_size
    assert on_gpu.encode_pictures(np.zeros((3, size, size, 3), np.uint8)).device.type == "cpu"
    latents = sample_latents(on_gpu, told, [1, 2], steps=2, guidance=2.0, solver="ddim")
    assert latents.device == GPU
    assert on_gpu.decode(latents.cpu()).device == on_gpu.decode(latents).device == GPU
