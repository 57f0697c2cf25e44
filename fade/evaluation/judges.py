"""Judges: small classifiers that name the object and the style of a picture.

Each has one class more, ``scrambled``: a forced choice among twelve objects names one even in shuffled
patches, so mush would count as a success. Two judges of different architecture and seed: ``development``
may be looked at while choosing settings, ``report`` only reports.

Whatever names pictures is a ``PictureJudge``: these classifiers, a CLIP that was never trained on the catalog
(``fade.evaluation.zero_shot``), or nobody. A judges' folder says which in ``<name>.json``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fade.concepts import Concept
from fade.errors import ConfigError, DataError, listing
from fade.evaluation.damage import SCRAMBLED, damaged, softened
from fade.files import read_json, write_json, writing
from fade.hardware import fast_precision
from fade.models.denoiser import autocast
from fade.models.latents import to_tensor
from fade.names import name_key, respelled
from fade.seeding import derive_seed, torch_generator

JUDGES = ("development", "report")
"""Both are asked of every erasure; the gate listens to ``report``."""
Architecture = Literal["plain", "residual"]
ZERO_SHOT = "zero-shot"
"""In the place of an architecture: a CLIP that compares pictures with the concepts' names."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge sees in each of N pictures: names, ``scrambled`` included."""

    objects: list[str]
    styles: list[str]


class PictureJudge(Protocol):
    """What an evaluation asks of a judge.

    Attributes:
        objects, styles: what it can name, ``scrambled`` last.
    """

    objects: tuple[str, ...]
    styles: tuple[str, ...]

    def named(self, pictures: NDArray[np.uint8]) -> Verdict:
        """The object and style of pictures (N, H, W, 3) uint8."""

    def features(self, pictures: NDArray[np.uint8]) -> NDArray[np.float64]:
        """What it decides by, (N, D) float64."""

    def layers(self, pictures: NDArray[np.uint8]) -> Iterator[Tensor]:
        """What it computes on the way, each (N, C, h, w)."""


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.body(x)
        return result


def _plain_trunk() -> nn.Sequential:
    """Strided convolutions with batch norm."""
    layers: list[nn.Module] = []
    before = 3
    for channels in (24, 48, 96, 128):
        layers += [nn.Conv2d(before, channels, 4, stride=2, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        before = channels
    return nn.Sequential(*layers)


def _residual_trunk() -> nn.Sequential:
    """A patch stem, then residual blocks with group norm."""
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 4, stride=4)]
    for before, after in ((32, 64), (64, 128)):
        layers += [_Residual(before), nn.Conv2d(before, after, 2, stride=2)]
    return nn.Sequential(*layers, _Residual(128), nn.SiLU())


class Judge(nn.Module):
    """One trunk, two heads: object and style, each with the class ``scrambled`` last."""

    def __init__(self, architecture: Architecture, objects: Sequence[str], styles: Sequence[str]) -> None:
        super().__init__()
        self.architecture = architecture
        self.objects, self.styles = (*objects, SCRAMBLED), (*styles, SCRAMBLED)
        self.trunk = _plain_trunk() if architecture == "plain" else _residual_trunk()
        self.object_head = nn.Linear(128, len(self.objects))
        self.style_head = nn.Linear(128, len(self.styles))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, objects + 1) and (B, styles + 1) of pictures (B, 3, H, W) in -1..1."""
        features = self.trunk(pictures)
        # The maximum beside the mean: an object is known by parts that cover little of the picture.
        pooled = features.mean(dim=(2, 3)) + features.amax(dim=(2, 3))
        return self.object_head(pooled), self.style_head(pooled)

    @torch.no_grad()
    def named(self, pictures: NDArray[np.uint8], *, batch: int = 256) -> Verdict:
        """The object and style of pictures (N, H, W, 3) uint8."""
        self.eval()
        objects: list[str] = []
        styles: list[str] = []
        for start in range(0, len(pictures), batch):
            object_logits, style_logits = self(to_tensor(pictures[start : start + batch]))
            objects += [self.objects[i] for i in object_logits.argmax(1).tolist()]
            styles += [self.styles[i] for i in style_logits.argmax(1).tolist()]
        return Verdict(objects, styles)

    @torch.no_grad()
    def features(self, pictures: NDArray[np.uint8], *, batch: int = 256) -> NDArray[np.float64]:
        """The trunk's mean and maximum over the picture, (N, 128) float64."""
        self.eval()
        parts = []
        for start in range(0, len(pictures), batch):
            features = self.trunk(to_tensor(pictures[start : start + batch]))
            parts.append((features.mean(dim=(2, 3)) + features.amax(dim=(2, 3))).double().numpy())
        return np.concatenate(parts) if parts else np.empty((0, 128))

    @torch.no_grad()
    def layers(self, pictures: NDArray[np.uint8]) -> Iterator[Tensor]:
        """What each layer of the trunk gives, (N, C, h, w)."""
        self.eval()
        shown = to_tensor(pictures)
        for layer in self.trunk:
            shown = layer(shown)
            yield shown


def judge_pictures(judge: PictureJudge, pictures: NDArray[np.uint8]) -> Verdict:
    """Name the object and style of pictures (N, H, W, 3) uint8."""
    return judge.named(pictures)


def train_judge(
    judge: Judge,
    pictures: NDArray[np.uint8],
    objects: Sequence[str],
    styles: Sequence[str],
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    scrambled_share: float,
    seed: int,
) -> Iterator[tuple[int, float]]:
    """Train a judge; yields step (from 1) and loss.

    Raises:
        DataError: there are no pictures.
    """
    if len(pictures) == 0:
        raise DataError("No pictures to train a judge on: got 0.")
    generator = torch_generator(seed, "judge")
    labels = torch.tensor(
        [(judge.objects.index(o), judge.styles.index(s)) for o, s in zip(objects, styles, strict=True)]
    )
    scrambled = torch.tensor([len(judge.objects) - 1, len(judge.styles) - 1])
    count = round(batch * scrambled_share)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=learning_rate, weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    for step in range(1, steps + 1):
        judge.train()
        rows = torch.randint(len(pictures), (batch,), generator=generator)
        whole = to_tensor(pictures[rows.numpy()])
        broken = damaged(whole[:count], generator)
        shown = softened(torch.cat([broken, whole[count:]]), generator)
        targets = torch.cat([scrambled.expand(count, 2), labels[rows[count:]]])
        with autocast(fast_precision("cpu")):
            object_logits, style_logits = judge(shown)
        loss = F.cross_entropy(object_logits.float(), targets[:, 0], label_smoothing=0.02)
        loss = loss + F.cross_entropy(style_logits.float(), targets[:, 1], label_smoothing=0.02)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        yield step, float(loss.detach())
    judge.eval()


def new_judge(architecture: Architecture, objects: Sequence[str], styles: Sequence[str], *, seed: int) -> Judge:
    """A judge with weights drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "judge", architecture))
        return Judge(architecture, objects, styles)


def save_judge(folder: Path, name: str, judge: Judge) -> None:
    """Write ``<name>.safetensors`` and ``<name>.json``."""
    with writing(folder / f"{name}.safetensors") as temporary:
        save_file({key: value.contiguous() for key, value in judge.state_dict().items()}, temporary)
    write_json(
        folder / f"{name}.json",
        {"architecture": judge.architecture, "objects": judge.objects[:-1], "styles": judge.styles[:-1]},
    )


def load_judge(folder: Path, name: str, *, called: Iterable[str] = ()) -> Judge:
    """Read a judge that was trained; ``fade.evaluation.zero_shot.open_judge`` reads any.

    Args:
        called: concepts as a catalog spells them: classes that are the same name are called so, as what a judge
            sees is compared with what a catalog says.

    Raises:
        DataError: its files are missing.
    """
    config = described(folder, name)
    judge = Judge(config["architecture"], config["objects"], config["styles"])
    judge.load_state_dict(load_file(folder / f"{name}.safetensors"))
    known = list(called)
    judge.objects, judge.styles = respelled(judge.objects, known), respelled(judge.styles, known)
    return judge.eval()


def described(folder: Path, name: str) -> dict[str, Any]:
    """What is written beside a judge's weights: its architecture and the names that it knows."""
    for path in (folder / f"{name}.safetensors", folder / f"{name}.json"):
        if not path.is_file():
            raise DataError(
                f"No judge {name!r} in {folder}: expected {path}. Train it with `dvc repro judges`, on pictures of "
                "your own with `fade classifier train`."
            )
    return read_json(folder / f"{name}.json")


def check_known(
    folder: Path, concepts: Iterable[Concept], *, catalog: str | Path, erased: Iterable[Concept] = ()
) -> None:
    """Refuse judges that cannot name a concept of the catalog: in what a judge cannot name, nothing can be missed.

    A concept that is no class of a judge is named in no picture, before as after: any adapter would have erased it.

    Args:
        concepts: all that the pictures judged are asked for.
        erased: those of them that are to be forgotten.

    Raises:
        DataError: a judge is missing.
        ConfigError: one lacks a concept; says which, unless it is a person, and how to get judges that do not.
    """
    everything, gone = list(concepts), list(erased)
    for name in JUDGES:
        said = described(folder, name)
        known = {kind: set(map(name_key, said[f"{kind}s"])) for kind in ("object", "style")}
        missing = [one for one in everything if name_key(one.name) not in known[one.kind]]
        if not missing:
            continue
        what = "the concept to erase, and in all " if any(one in missing for one in gone) else ""
        shown = [one.name for one in missing if not one.person]
        raise ConfigError(
            f"The judge {name!r} in {folder} cannot see what is asked of it: it names {len(known['object'])} objects "
            f"and {len(known['style'])} styles, and lacks {what}{len(missing)} of the {len(everything)} concepts of "
            f"{catalog}{f' ({listing(shown)})' if shown else ''}. What a judge cannot name it cannot miss, so any "
            f"adapter would pass. Train judges on these pictures and name them: `fade classifier train --catalog "
            f"{catalog} --out data/judges-mine`, then `--judges data/judges-mine`."
        )
