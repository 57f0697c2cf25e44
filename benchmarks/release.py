"""Going live: time of a swap, from the alias to the picture, and what live adapters cost a picture.

    python benchmarks/release.py --json benchmarks/results/release.json
    python benchmarks/release.py --only checks

Four figures, on the built-in base with random adapters of its own size (no erasure is run):

* ``swap``: seconds from a published manifest to the runtime drawing under it, by number of live adapters.
* ``alias_to_picture``: seconds from the alias set in a registry on this machine to a changed picture; the watch
  looks every second, so that half a second of it is waiting. Without a browser, which the browser test has.
* ``overhead``: processor time of a picture over the base's, in pairs drawn in turn: 1, 10 and 50 adapters one on
  top of the other (``stacked``), and one adapter of the same rank for all of it (``consolidated``).
* ``checks``: processor time of a picture with all that a runtime looks at before and after it, over the same picture
  under the same adapter without, in pairs drawn in turn; by number of steps.

Ratios hold between machines, seconds do not.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "600")

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fade.adapters.manifest import publish
from fade.adapters.overlay import using
from fade.adapters.runtime import Runtime
from fade.adapters.store import save_adapter
from fade.files import read_json, write_json
from fade.lineage import ROOT
from fade.methods.fade.masks import Mask
from fade.methods.fade.sparse_lora import adapter_tensors, add_sparse_lora
from fade.models.deltas import plain_modules
from fade.models.family import load_base
from fade.models.generate import generate_batch
from fade.project import load_project

PROMPTS = ["a cat image in photo style."]
COUNTS = (1, 10, 50)


def random_adapters(base: Path, folder: Path, *, count: int, rank: int) -> list[Path]:
    """Adapters on every module of the denoiser, as erasures without a mask give them; their change is small."""
    sd = load_base(base)
    names = tuple(plain_modules(sd.network))
    mask = Mask("module", names, len(names), len(names))
    add_sparse_lora(sd.network, mask, rank=rank, alpha=rank, seed=0, name="student")
    shapes = {name: tensor.shape for name, tensor in adapter_tensors(sd.denoiser, "student").items()}
    found = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        tensors = {name: 0.01 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        save_adapter(folder / str(seed), tensors, {"base_sha256": sd.sha256, "rank": rank})
        found.append(folder / str(seed))
    return found


def overhead(base: Path, folder: Path, *, repeats: int, steps: int, rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Swap times and ratios to the base, by number of adapters."""
    key = Ed25519PrivateKey.generate()
    pool = random_adapters(base, folder / "pool", count=max(COUNTS), rank=rank)
    publish(folder / "release", [], base=base, key=key)
    runtime = Runtime(load_base(base), folder / "release", public_key=key.public_key(), state=folder / "state.json")
    ways = {f"stacked {count}": pool[:count] for count in COUNTS} | {"consolidated": pool[:1]}
    swaps: dict[str, Any] = {}
    found: dict[str, Any] = {}
    for name, adapters in ways.items():
        published = [(f"erasure-{i}/1", adapter, 1.0) for i, adapter in enumerate(adapters)]
        begun = time.perf_counter()
        publish(folder / "release", published, base=None, key=key)
        publishing = time.perf_counter() - begun
        swaps[name] = {"publish_seconds": publishing, "swap_seconds": runtime.refresh().swap_seconds}

        def draw(base_only: bool) -> float:
            begun = time.process_time()
            runtime.generate(PROMPTS, [1], steps=steps, guidance=4.0, base_only=base_only)
            return time.process_time() - begun

        draw(True), draw(False)
        pairs = [(draw(True), draw(False)) for _ in range(repeats)]
        ratios = sorted(live / plain for plain, live in pairs)
        found[name] = {
            "ratio": statistics.median(ratios),
            "ratio_low": ratios[0],
            "ratio_high": ratios[-1],
            "base_seconds": statistics.median(plain for plain, _ in pairs),
        }
    runtime.close()
    return swaps, found


def checks(base: Path, folder: Path, *, repeats: int, rank: int, counts: Sequence[int] = (10, 25)) -> dict[str, Any]:
    """What the comparison of the whole pipeline costs a picture."""
    key = Ed25519PrivateKey.generate()
    (adapter,) = random_adapters(base, folder / "one", count=1, rank=rank)
    publish(folder / "checked", [("erasure-0/1", adapter, 1.0)], base=base, key=key)
    begun = time.process_time()
    loaded = load_base(base)
    loading = time.process_time() - begun
    begun = time.process_time()
    runtime = Runtime(loaded, folder / "checked", public_key=key.public_key(), state=folder / "checked.json")
    found: dict[str, Any] = {"start_over_loading": (time.process_time() - begun) / loading}
    adapters = runtime.refresh().adapters

    def draw(steps: int, checked: bool) -> float:
        begun = time.process_time()
        if checked:
            runtime.generate(PROMPTS, [1], steps=steps, guidance=4.0)
        else:
            with using(adapters):
                generate_batch(runtime.base, PROMPTS, [1], steps=steps, guidance=4.0, solver="ddim")
        return time.process_time() - begun

    for steps in counts:
        pairs = []
        for turn in range(repeats + 1):  # the first warms up
            took = {way: draw(steps, way) for way in ((True, False) if turn % 2 else (False, True))}
            pairs.append((took[False], took[True]))
        ratios = sorted(checked / without for without, checked in pairs[1:])
        seconds = statistics.median(without for without, _ in pairs[1:])
        found[f"{steps} steps"] = {
            "ratio": statistics.median(ratios),
            "ratio_low": ratios[0],
            "ratio_high": ratios[-1],
            "unchecked_seconds": seconds,
        }
    runtime.close()
    return found


def alias_to_picture(folder: Path, *, repeats: int) -> dict[str, Any]:
    """Seconds from a set alias to a changed picture, and from its removal to the base's; tiny base, real registry."""
    from tests.tiny import make_workspace

    make_workspace(folder)
    os.environ["FADE_ROOT"] = str(folder)
    from flows.settings import configure

    configure()
    from mlflow import MlflowClient

    from fade.asking.prepare import prepare_spec
    from fade.config import load_settings
    from flows.erasing.erase import erase, prepare_folder
    from flows.releasing import manifests, released
    from flows.releasing.watch import Watch

    changes = {"distill.learning_rate": 0.02, "distill.precision": "fp32", "evaluate.precision": "fp32"}
    project = load_project()
    spec = prepare_spec("cat", "horse", project=project, settings=load_settings(project.params, changes=changes))
    prepare_folder(spec)
    version = erase(spec.id)
    sd = load_base(spec.base)
    where = manifests.open_release(spec.base, sd.sha256)
    runtime = Runtime(sd, where, public_key=released.KEYS / "public.pem", state=folder / "state.json")

    def picture() -> bytes:
        pixels: bytes = runtime.generate(PROMPTS, [1], steps=2, guidance=2.0)[0].tobytes()
        return pixels

    def until(reached: Callable[[], bool]) -> float:
        begun = time.perf_counter()
        while not reached():
            if time.perf_counter() - begun > 60:
                raise RuntimeError("the picture did not change within 60 s")
            time.sleep(0.02)
        return time.perf_counter() - begun

    client = MlflowClient(f"sqlite:///{Path('.fade/mlflow.db').resolve()}")
    plain, live, gone = picture(), [], []
    watch = Watch(valid_seconds=0)
    thread = threading.Thread(target=lambda: list(watch.run()), daemon=True)
    thread.start()
    for _ in range(repeats):
        client.set_registered_model_alias(version.model, "approved", str(version.version))
        live.append(until(lambda: picture() != plain))
        client.delete_registered_model_alias(version.model, "approved")
        gone.append(until(lambda: picture() == plain))
    watch.ended.set()
    watch.woken.set()
    thread.join(timeout=60)
    return {
        "live_seconds": {"median": statistics.median(live), "worst": max(live)},
        "back_seconds": {"median": statistics.median(gone), "worst": max(gone)},
        "repeats": repeats,
    }


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=ROOT / load_project(ROOT).base)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["checks"], help="one figure alone; others in the file stay")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    out = arguments.json.resolve() if arguments.json else None
    settings = {name: getattr(arguments, name) for name in ("repeats", "steps", "rank", "threads")}
    with tempfile.TemporaryDirectory(prefix="release-") as place:
        folder = Path(place)
        checked = checks(arguments.base.resolve(), folder, repeats=settings["repeats"], rank=settings["rank"])
        print(f"checks: {checked}", flush=True)
        if arguments.only:
            if out:
                write_json(out, {**(read_json(out) if out.exists() else {}), "checks": checked})
            return
        found: dict[str, Any] = {"settings": settings, "checks": checked}
        options = {name: settings[name] for name in ("repeats", "steps", "rank")}
        found["swap"], found["overhead"] = overhead(arguments.base.resolve(), folder, **options)
        for name, row in found["overhead"].items():
            print(f"{name}: {row['ratio']:.2f} x the base [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]", end="")
            print(f", swap {found['swap'][name]['swap_seconds']:.3f} s", flush=True)
        if out:
            write_json(out, found)  # kept if what follows fails
        found["alias_to_picture"] = alias_to_picture(folder / "project", repeats=min(arguments.repeats, 5))
        os.chdir(ROOT)
    from fade.lineage import made_on

    found["made_on"] = made_on()
    print(f"alias to picture: {found['alias_to_picture']}")
    if out:
        write_json(out, found)


if __name__ == "__main__":
    main()
