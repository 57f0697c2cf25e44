"""The method on one card in a few minutes: what it takes, how near it comes to the card's own rate, if it is right.

    python benchmarks/gpu.py --json benchmarks/results/gpu-NAME.json             # at most 8 minutes; installs nothing
    python benchmarks/gpu.py --toy --json gpu-toy.json                           # the same code at toy sizes, anywhere

Networks have random weights at their published configurations, held in bfloat16; steps are taken with gradient
checkpointing and micro-batches of one. Of each size:

    step        seconds of a step of distillation (one forget and one retain example), peak memory, and the share of the
                card's own rate of bfloat16 matrix products, measured in the same run
    saliency    seconds of the gain of one pair of examples
    draw        seconds of a forward pass with guidance (two examples)
    inversion   seconds of a step of the search for text states
    equal       whether the same step twice gives the same bytes

``canvas`` is an erasure of the built-in base with the fixed settings of params.yaml, from splits to judged pictures,
and its adapter once more, whose bytes must be equal. ``parity`` are the tests that hold each family to stock diffusers,
run on the card. What no time is left for is said (``left_out``).
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fade.asking.prepare import prepare_spec
from fade.config import load_settings
from fade.evaluation.measured import Evaluation
from fade.evaluation.records import load
from fade.files import read_json, sha256_file, write_json
from fade.hardware import compute_device
from fade.lineage import ROOT, made_on
from fade.methods.fade.distillation import Sets, distill
from fade.methods.fade.examples import Examples
from fade.methods.fade.masks import Mask
from fade.methods.fade.saliency import accumulate_saliency, noisy_groups, salient_parameters
from fade.methods.fade.sparse_lora import adapter_tensors, add_sparse_lora, computed_whole
from fade.methods.fade.targeting import power_law
from fade.methods.fade.training import loop_settings
from fade.models.denoiser import Denoiser
from fade.models.families.flux import FluxTransformer
from fade.models.families.stable_diffusion import UNet
from fade.models.families.stable_diffusion_3 import JointTransformer
from fade.models.inversion import invert
from fade.models.paths import DiffusionPath, FlowPath
from fade.models.told import Told
from fade.models.training.networks import make_noise_scheduler
from fade.project import load_project
from fade.seeding import torch_generator
from fade.spec import load_spec, save_spec
from fade.steps.catalog import ensure_catalog
from fade.studies.trial import run_steps, steps_of_trial

RANK, DENSITY = 6, 0.75
STEPS = 4
"""Of distillation; the first is not counted."""
XL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
}
XL_SIZE = {"block_out_channels": (320, 640, 1280), "transformer_layers_per_block": [1, 2, 10],
           "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048, "addition_time_embed_dim": 256,
           "projection_class_embeddings_input_dim": 2816}  # fmt: skip
XL_TOY = {"block_out_channels": (32, 32, 64), "transformer_layers_per_block": [1, 1, 1],
          "attention_head_dim": [2, 2, 4], "cross_attention_dim": 32, "addition_time_embed_dim": 8,
          "projection_class_embeddings_input_dim": 64}  # fmt: skip
SD3_SIZE = {"num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24, "caption_projection_dim": 1536,
            "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"}  # fmt: skip
SD3_TOY = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16,
           "pos_embed_max_size": 16, "joint_attention_dim": 32, "pooled_projection_dim": 16}  # fmt: skip
FLUX_TOY = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
            "joint_attention_dim": 32, "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6),
            "in_channels": 16}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """A network of a published size, and the same in little.

    Attributes:
        network: builds it, of the arguments of one of the two.
        denoiser: the family's.
        flow: whether it follows flow matching.
        full, toy: latents (channels, height, width), tokens, width of their states, of the pooled state; 0: none.
        others: whether it is told ``sizes`` or ``guidance`` too.
    """

    network: Callable[[bool], nn.Module]
    denoiser: type[Denoiser]
    flow: bool
    full: tuple[tuple[int, int, int], int, int, int]
    toy: tuple[tuple[int, int, int], int, int, int]
    others: str = ""


def _sd15(toy: bool) -> nn.Module:
    if toy:
        blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
        return UNet2DConditionModel(
            sample_size=8, block_out_channels=(32,), cross_attention_dim=32, attention_head_dim=2, **blocks
        )
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


SIZES = {
    "SD 1.5": Size(_sd15, UNet, False, ((4, 64, 64), 77, 768, 0), ((4, 8, 8), 8, 32, 0)),
    "SDXL": Size(
        lambda toy: UNet2DConditionModel(sample_size=8 if toy else 128, **XL, **(XL_TOY if toy else XL_SIZE)),
        UNet,
        False,
        ((4, 128, 128), 77, 2048, 1280),
        ((4, 8, 8), 8, 32, 16),
        others="sizes",
    ),
    "SD3.5 medium": Size(
        lambda toy: SD3Transformer2DModel(sample_size=8 if toy else 128, **(SD3_TOY if toy else SD3_SIZE)),
        JointTransformer,
        True,
        ((16, 128, 128), 77 + 256, 4096, 2048),
        ((16, 8, 8), 8, 32, 16),
    ),
    "FLUX.1 dev": Size(
        lambda toy: FluxTransformer2DModel(guidance_embeds=True, **(FLUX_TOY if toy else {})),
        FluxTransformer,
        True,
        ((16, 128, 128), 512, 4096, 768),
        ((4, 8, 8), 8, 32, 16),
        others="guidance",
    ),
}


class Card:
    """Where it runs: its clock, its memory, its rate."""

    def __init__(self) -> None:
        self.device = compute_device()
        self.is_gpu = self.device.type == "cuda"
        self.name = torch.cuda.get_device_name(self.device) if self.is_gpu else "the processor"

    def seconds(self, work: Callable[[], object]) -> float:
        """Of a call, with all that it set going on the card."""
        self._wait()
        begun = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - begun

    def _wait(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def forget(self) -> None:
        """Memory that nobody holds any more, and the peak so far."""
        gc.collect()
        if self.is_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int | None:
        """The most memory since then; None where a process' own is not told apart."""
        return torch.cuda.max_memory_allocated(self.device) if self.is_gpu else None

    def matmul_rate(self, size: int) -> float:
        """Operations a second of bfloat16 matrix products, the best of several."""
        left, right = (torch.randn(size, size, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        return 2 * size**3 / min(self.seconds(lambda: left @ right) for _ in range(8))


def built(size: Size, card: Card, toy: bool) -> Denoiser:
    """The network with random weights, bfloat16 on a GPU, where it computes."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if card.is_gpu else torch.float32)
    try:
        with card.device:
            network: Any = size.network(toy).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    network.enable_gradient_checkpointing()
    path = FlowPath() if size.flow else DiffusionPath(make_noise_scheduler().alphas_cumprod)
    return size.denoiser(network, path, (size.toy if toy else size.full)[0])


def told(size: Size, toy: bool, count: int, seed: int) -> Told:
    """Random text states, and whatever else the family is told."""
    _, tokens, width, pooled = size.toy if toy else size.full
    generator = torch.Generator().manual_seed(seed)
    others: dict[str, Tensor] = {"pooled": torch.randn(count, pooled, generator=generator)} if pooled else {}
    if size.others == "sizes":
        others["sizes"] = torch.full((count, 6), 1024.0)
    if size.others == "guidance":
        others["guidance"] = torch.full((count, 1), 3.5)
    return Told(torch.randn(count, tokens, width, generator=generator), others=others)


def examples(size: Size, toy: bool, seed: int) -> Examples:
    """Two random latents with captions and targets."""
    shape = (size.toy if toy else size.full)[0]
    latents = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))
    return Examples(latents, told(size, toy, 2, seed + 1), told(size, toy, 2, seed + 2))


def at_size(name: str, card: Card, rate: float, toy: bool) -> dict[str, Any]:
    """The figures of one size."""
    size, precision = SIZES[name], "bf16" if card.is_gpu else "fp32"
    card.forget()
    denoiser = built(size, card, toy)
    found: dict[str, Any] = {"parameters": sum(one.numel() for one in denoiser.network.parameters())}
    found["saliency_seconds"] = card.seconds(lambda: _saliency(denoiser, size, toy))
    found["draw_seconds"] = statistics.median(
        card.seconds(lambda: _guided(denoiser, size, toy, card)) for _ in range(3)
    )
    search = invert(
        denoiser,
        examples(size, toy, 5).latents,
        start=told(size, toy, 1, 6),
        steps=3,
        batch=1,
        learning_rate=0.05,
        generator=torch_generator(7, "inversion"),
        precision=precision,
    )
    found["inversion_seconds"] = min(card.seconds(lambda: next(search)) for _ in range(3))
    found["saliency_draw_inversion_peak_bytes"] = card.peak_bytes()
    card.forget()
    first, second = (_distilled(denoiser, size, card, toy, precision) for _ in range(2))
    found |= {key: first[key] for key in ("step_seconds", "step_flops", "peak_bytes")}
    found["matmul_fraction"] = first["step_flops"] / first["step_seconds"] / rate
    found["equal"] = all(torch.equal(first["tensors"][key], tensor) for key, tensor in second["tensors"].items())
    return found


def _saliency(denoiser: Denoiser, size: Size, toy: bool) -> None:
    timesteps = power_law(denoiser.path.steps, 1.0)
    groups = noisy_groups(examples(size, toy, 1), groups=1, group_size=2, timesteps=timesteps, seed=0)
    accumulate_saliency(denoiser, groups, against="teacher", granularity="module", at_once=1)


def _guided(denoiser: Denoiser, size: Size, toy: bool, card: Card) -> None:
    shape = (size.toy if toy else size.full)[0]
    noisy = torch.randn(2, *shape, generator=torch.Generator().manual_seed(3)).to(card.device)
    with torch.no_grad():
        denoiser.predict(noisy, torch.tensor(500, device=card.device), told(size, toy, 2, 4).to(card.device))


def _distilled(denoiser: Denoiser, size: Size, card: Card, toy: bool, precision: str) -> dict[str, Any]:
    """A few steps of distillation from the same beginning, and what they made; the network is left plain."""
    network = denoiser.network
    names = tuple(sorted(salient_parameters(network)))
    kept = names[: max(1, round(DENSITY * len(names)))]
    mask = Mask("module", kept, len(kept), len(names))
    parameters = add_sparse_lora(network, mask, rank=RANK, alpha=RANK, seed=0, name="student")
    settings = load_settings(ROOT / "params.yaml").distill.model_copy(
        update={"batch": 1, "steps": STEPS, "pool": None, "precision": precision, "surrogate_share": 0.0}
        | {"micro_batch": 1}
    )
    with computed_whole(network):
        steps = distill(
            denoiser,
            parameters,
            sets=Sets(*(examples(size, toy, seed) for seed in (10, 20, 30))),
            empty=told(size, toy, 1, 40),
            timesteps=power_law(denoiser.path.steps, 0.25),
            surrogate_share=0.0,
            **loop_settings(settings),
        )
        with FlopCounterMode(display=False) as counter:
            next(steps)
        seconds = min(card.seconds(lambda: next(steps)) for _ in range(STEPS - 1))
    tensors = {key: tensor.clone().cpu() for key, tensor in adapter_tensors(denoiser, "student").items()}
    peak = card.peak_bytes()
    network.delete_adapters(["student"])
    return {
        "step_seconds": seconds,
        "step_flops": counter.get_total_flops(),
        "peak_bytes": peak,
        "tensors": tensors,
    }


def on_the_canvas(card: Card, toy: bool) -> dict[str, Any]:
    """An erasure from splits to judged pictures, and its adapter once more: the bytes must be equal."""
    project = load_project(ROOT)
    with tempfile.TemporaryDirectory(prefix="gpu-") as place:
        root = Path(place)
        here = project.at(
            base=str(ROOT / project.base), judges=str(ROOT / project.judges), catalog=str(root / "catalog")
        )
        ensure_catalog(here)
        short = {"distill.steps": 2, "saliency.groups": 1, "evaluate.steps": 1, "gate.sure": None}
        changes = {"settings": "fixed", **({**short, "evaluate.seeds": [188], "threads": 1} if toy else {})}
        settings = load_settings(ROOT / "params.yaml", changes=changes)
        spec = prepare_spec("astronaut", "cameraman", project=here, settings=settings)
        folders = [root / "first", root / "second"]
        begun = time.perf_counter()
        for folder in folders:
            save_spec(spec, folder)
        run_steps(folders[0], steps_of_trial(spec), None)
        seconds = time.perf_counter() - begun
        making = [step for step in steps_of_trial(spec) if step.name not in ("evaluate", "attack")]
        run_steps(folders[1], making, None)
        hashes = [sha256_file(folder / "adapter" / "pytorch_lora_weights.safetensors") for folder in folders]
        metrics = load(Evaluation, folders[0] / "evaluation" / "metrics.json")
        timings = read_json(folders[0] / "timings.json")
        return {
            "seconds": seconds,
            "steps": load_spec(folders[0]).distill.steps,
            "seconds_by_step": {name: spent["seconds"] for name, spent in timings.items()},
            "verdict": metrics.gate.verdict,
            "rates": {name: found.value for name, found in metrics.report.after.rates.items()},
            "equal": hashes[0] == hashes[1],
        }


def parity(seconds: float, toy: bool) -> dict[str, Any]:
    """The tests that hold each family to its stock pipeline, where this runs."""
    asked = ["tests/unit/models/test_families.py", "tests/unit/models/test_flow_families.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(["--collect-only"] if toy else asked)]
    command += asked[:1] if toy else []
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"passed": False, "said": f"not ended after {seconds:.0f} s"}
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith("FAILED")]
    return {"passed": done.returncode == 0, "said": lines[-1] if lines else done.stderr[-500:], "failed": failed}


class Run:
    """What was found so far, kept after each part."""

    def __init__(self, card: Card, given: argparse.Namespace) -> None:
        self.card, self._given, self._begun = card, given, time.monotonic()
        self.rate = card.matmul_rate(256 if given.toy else 8192)
        self.found: dict[str, Any] = {
            "card": card.name,
            "toy": given.toy,
            "torch": torch.__version__,
            "bf16_matmul_flops_per_second": self.rate,
            "parts": {},
            "left_out": [],
            "made_on": made_on(),
        }

    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._begun

    def left(self) -> float:
        """Seconds in which another part may begin."""
        return 60 * float(self._given.minutes) - self.seconds()

    def part(self, name: str, work: Callable[[], dict[str, Any]]) -> None:
        """One part: what fails is said, and the others go on."""
        if self.left() <= 0:
            self.found["left_out"].append(name)
        else:
            try:
                self.found["parts"][name] = work()
            except (RuntimeError, ValueError, TypeError, KeyError, OSError) as error:
                self.found["parts"][name] = {"failed": f"{type(error).__name__}: {error}"}
            print(f"{name}: {self.found['parts'][name]}  ({self.seconds():.0f} s so far)", flush=True)
        if self._given.json is not None:
            write_json(self._given.json, {**self.found, "seconds": self.seconds()})


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="toy sizes: whether it runs, not what it takes")
    parser.add_argument("--minutes", type=float, default=7.5, help="what would begin later is left out, and said")
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--canvas", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--parity", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    given = parser.parse_args()
    run = Run(Card(), given)
    if given.canvas:
        run.part("canvas", lambda: on_the_canvas(run.card, given.toy))
    for name in given.sizes:
        run.part(name, partial(at_size, name, run.card, run.rate, given.toy))
    if given.parity:
        run.part("parity", lambda: parity(max(run.left(), 60.0), given.toy))
    said = f"{run.card.name}: {run.seconds():.0f} s in all; left out: {', '.join(run.found['left_out']) or 'nothing'}"
    print(said)
    raise SystemExit(any("failed" in part for part in run.found["parts"].values() if "passed" not in part))


if __name__ == "__main__":
    main()
