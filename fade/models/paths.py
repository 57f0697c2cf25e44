"""The path from a picture to noise, and what a network on it learns to answer: written once for each kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fade.errors import ConfigError

PREDICTIONS = ("epsilon", "v_prediction")


class NoisePath(Protocol):
    """How latents and noise mix at time t, and what is predicted of them.

    Times are those that the network is told, 0..T-1; row by row, (B,).
    """

    @property
    def steps(self) -> int:
        """T, how many times there are to draw from."""

    def noised(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t of z_0 and e, (B, C, h, w) each."""

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network learns to answer at z_t, (B, C, h, w)."""

    def clean(self, noisy: Tensor, answer: Tensor, t: Tensor) -> Tensor:
        """z_0 that an answer at z_t implies, (B, C, h, w)."""

    def answer(self, noisy: Tensor, clean: Tensor, t: Tensor) -> Tensor:
        """The answer at z_t that implies z_0, (B, C, h, w): what ``clean`` turns back; not defined at noise of none."""

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio at t, (B,) float32."""


@dataclass(frozen=True)
class DiffusionPath:
    """A variance-preserving diffusion: z_t = sqrt(a_t) z_0 + sqrt(1 - a_t) e   (DDPM, arXiv:2006.11239, eq. 4).

    Attributes:
        levels: cumulative alphas a_t, (T,) float32, as the base's scheduler has them.
        prediction: ``epsilon`` (e), or ``v_prediction``: v = sqrt(a_t) e - sqrt(1 - a_t) z_0
            (arXiv:2202.00512, appendix D).

    Raises:
        ConfigError: another prediction.
    """

    levels: Tensor
    prediction: str = "epsilon"

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise ConfigError(
                f"Prediction type {self.prediction!r} is not supported: expected {' or '.join(PREDICTIONS)}."
            )

    @property
    def steps(self) -> int:
        """T."""
        return len(self.levels)

    def noised(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t."""
        signal, spread = self._mix(clean, t)
        return signal * clean + spread * noise

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """e or v."""
        if self.prediction == "epsilon":
            return noise
        signal, spread = self._mix(clean, t)
        return signal * noise - spread * clean

    def clean(self, noisy: Tensor, answer: Tensor, t: Tensor) -> Tensor:
        """z_0; of an answer e it is not defined where a_t is 0."""
        signal, spread = self._mix(noisy, t)
        if self.prediction == "epsilon":
            return (noisy - spread * answer) / signal
        return signal * noisy - spread * answer

    def answer(self, noisy: Tensor, clean: Tensor, t: Tensor) -> Tensor:
        """e or v."""
        signal, spread = self._mix(noisy, t)
        return self.target(clean, (noisy - signal * clean) / spread, t)

    def snr(self, t: Tensor) -> Tensor:
        """a_t / (1 - a_t)."""
        level = self.levels[t].float()
        return level / (1 - level)

    def _mix(self, like: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        level = self.levels.to(like.device, like.dtype)[t][:, None, None, None]
        return level.sqrt(), (1 - level).sqrt()


@dataclass(frozen=True)
class FlowPath:
    """A straight path: z_t = (1 - s) z_0 + s e with s = t / T, and the answer is e - z_0   (arXiv:2209.03003).

    Attributes:
        steps: T, as the base's scheduler counts times; its network is told t, which may lie between whole numbers.
    """

    steps: int = 1000

    def noised(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t."""
        share = self._share(clean, t)
        return (1 - share) * clean + share * noise

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """e - z_0, whatever t."""
        del t
        return noise - clean

    def clean(self, noisy: Tensor, answer: Tensor, t: Tensor) -> Tensor:
        """z_0."""
        return noisy - self._share(noisy, t) * answer

    def answer(self, noisy: Tensor, clean: Tensor, t: Tensor) -> Tensor:
        """e - z_0 with the noise that z_t and z_0 have between them."""
        return (noisy - clean) / self._share(noisy, t)

    def snr(self, t: Tensor) -> Tensor:
        """((1 - s) / s)^2; infinite at t = 0."""
        share = t.float() / self.steps
        return ((1 - share) / share).square()

    def _share(self, like: Tensor, t: Tensor) -> Tensor:
        return (t.to(like.device, like.dtype) / self.steps)[:, None, None, None]


def min_snr_weights(t: Tensor, path: NoisePath, gamma: float) -> Tensor:
    """min(SNR, gamma) / SNR for epsilon prediction, (B,)   (arXiv:2303.09556, section 3.4)."""
    snr = path.snr(t)
    return torch.clamp(snr, max=gamma) / snr
