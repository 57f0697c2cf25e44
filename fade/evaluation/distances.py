"""Distances between sets of pictures, in the space of features that the caller gives.

FID and KID are published for Inception's features of photographs; on 64 x 64 pictures of the canvas a judge's own
features are taken, and figures say so by their names (``fid_judge``): they compare with each other, not with
published ones. Both are a few lines of NumPy; the libraries for them (torchmetrics, torch-fidelity, clean-fid) bring
torchvision and Inception's weights with them, which nothing else here needs.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import sqrtm
from torch import Tensor

from fade.errors import DataError
from fade.evaluation.damage import shuffle_patches
from fade.evaluation.judges import PictureJudge
from fade.models.latents import to_tensor
from fade.seeding import torch_generator

Features = NDArray[np.float64]
SHUFFLED_PATCH = 16


def judge_features(judge: PictureJudge, pictures: NDArray[np.uint8]) -> Features:
    """What a judge decides by, (N, D) float64."""
    return judge.features(pictures)


def fid(real: Features, drawn: Features) -> float:
    """Frechet distance of two Gaussians fitted to features (N, D)   (arXiv:1706.08500, equation 6).

        |m - m'|^2 + Tr(C + C' - 2 (C C')^1/2)

    Raises:
        DataError: fewer than two pictures in a set, or features of different width.
    """
    _check(real, drawn)
    mean = ((real.mean(axis=0) - drawn.mean(axis=0)) ** 2).sum()
    one, other = np.cov(real, rowvar=False), np.cov(drawn, rowvar=False)
    # The root of a product of two covariances has the same trace as that of a symmetric matrix, which is stable.
    root = np.real(sqrtm(np.atleast_2d(one)))
    values = np.linalg.eigvalsh(root @ np.atleast_2d(other) @ root)
    crossed = np.sqrt(np.clip(values, 0, None)).sum()
    return float(max(0.0, mean + np.trace(np.atleast_2d(one)) + np.trace(np.atleast_2d(other)) - 2 * crossed))


def kid(real: Features, drawn: Features, *, paired: bool = False) -> float:
    """Kernel distance: unbiased squared MMD with k(x, y) = (x'y / D + 1)^3, over all pictures   (arXiv:1801.01401).

    It has no bias for few pictures, as FID has, so chance may make it a little negative where the sets are alike. Its
    scale is the features' to the sixth power: of other features than Inception's give those of ``scaled``. Published
    tables often show a thousand times it.

    Args:
        paired: row i of both is of one prompt and seed. Then x_i and y_i are not independent, and the estimate for
            independent sets is too low (of a set with itself below zero): pairs with themselves are left out
            (Gretton et al. 2012, JMLR 13, lemma 6), and equal sets have a distance of exactly zero.

    Raises:
        DataError: as ``fid``; or paired sets differ in number.
    """
    _check(real, drawn)
    if paired and len(real) != len(drawn):
        raise DataError(f"Paired sets have as many pictures each: got {len(real)} and {len(drawn)}.")
    width = real.shape[1]

    def kernel(x: Features, y: Features) -> Features:
        result: Features = (x @ y.T / width + 1) ** 3
        return result

    own = [(kernel(x, x).sum() - np.trace(kernel(x, x))) / (len(x) * (len(x) - 1)) for x in (real, drawn)]
    crossed = kernel(real, drawn)
    apart = crossed.mean()
    if paired:
        apart = (crossed.sum() - np.trace(crossed)) / (len(real) * (len(real) - 1))
    return float(own[0] + own[1] - 2 * apart)


def scaled(real: Features, drawn: Features) -> tuple[Features, Features]:
    """Both sets divided by the root mean square of the real one's features, so that kernels lie near (1 + 1)^3."""
    size = float(np.sqrt((real**2).mean()))
    return (real / size, drawn / size) if size > 0 else (real, drawn)


def _check(real: Features, drawn: Features) -> None:
    if real.ndim != 2 or drawn.ndim != 2 or real.shape[1] != drawn.shape[1] or min(len(real), len(drawn)) < 2:
        raise DataError(
            f"A distance of sets needs at least two pictures in each, with features of one width: got {real.shape} "
            f"and {drawn.shape}."
        )


@torch.no_grad()
def perceptual_drift(
    judge: PictureJudge, before: NDArray[np.uint8], after: NDArray[np.uint8], *, batch: int = 256
) -> float:
    """Distance of pictures at equal prompts and seeds in a judge's features, layer by layer   (as LPIPS, ours).

    As arXiv:1801.03924, equation 1, with every channel's weight 1: at each layer the channels are normalised to
    length 1 at each place, and the squared difference is averaged over places; summed over layers.

    Raises:
        DataError: the sets differ in number, or are empty.
    """
    if before.shape != after.shape or len(before) == 0:
        raise DataError(f"A perceptual distance compares equal, non-empty sets: got {before.shape} and {after.shape}.")
    total = 0.0
    for start in range(0, len(before), batch):
        for one, other in zip(*(judge.layers(part[start : start + batch]) for part in (before, after)), strict=True):
            total += float((_unit(one) - _unit(other)).square().sum(dim=1).mean(dim=(1, 2)).sum())
    return total / len(before)


def _unit(features: Tensor) -> Tensor:
    return features / features.square().sum(dim=1, keepdim=True).sqrt().clamp(min=1e-8)


def shuffled_patches(pictures: NDArray[np.uint8], *, seed: int) -> NDArray[np.uint8]:
    """The control: the same pictures with their 16-pixel patches in random order, which no judge should name."""
    generator = torch_generator(seed, "shuffled control")
    shuffled = shuffle_patches(to_tensor(pictures), SHUFFLED_PATCH, generator)
    mixed: NDArray[np.uint8] = (
        ((shuffled + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    )
    return mixed
