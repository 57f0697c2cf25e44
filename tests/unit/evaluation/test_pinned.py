"""How many of an attacker's free numbers are pinned down: laws of the measure."""

from __future__ import annotations

import torch

from benchmarks.pinned import gradients, held_by, holding, row_of
from fade.models.families.stable_diffusion import StableDiffusion


def test_the_fewest_directions_hold_a_share_and_one_fewer_does_not() -> None:
    rows = torch.randn(40, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * torch.arange(1, 13)
    found = holding(rows, 0.9)
    assert 1 < found.shape[1] < 12
    torch.testing.assert_close(found.T @ found, torch.eye(found.shape[1], dtype=torch.float64))
    assert held_by(rows, found) >= 0.9 > held_by(rows, found[:, :-1])
    assert holding(rows, 1.0).shape[1] >= 11


def test_what_one_position_says_counts_at_all_positions() -> None:
    """Two words of three numbers each: retained captions use the first number at the first position alone."""
    retained = torch.zeros(5, 2, 3, dtype=torch.float64)
    retained[:, 0, 0] = torch.arange(5)
    at_second = torch.tensor([[0, 0, 0, 1, 0, 0]], dtype=torch.float64)
    row = row_of(torch.cat([at_second, torch.eye(6, dtype=torch.float64)[2:3]]), retained)
    assert (row["numbers"], row["captions"], row["directions"]["0.99"]) == (6, 5, 2)
    spanned = row["spanned"]["0.99"]
    assert spanned["captions"] == {"numbers": 1, "holds": 0.0}
    assert spanned["words"] == {"numbers": 2, "holds": 0.5}


def test_gradients_are_of_the_states_alone_and_drawn_by_the_seed(base: StableDiffusion) -> None:
    pictures = torch.randn(3, *base.denoiser.latent_shape, generator=torch.Generator().manual_seed(1))
    told = base.encode_prompts(["an image of a cat", "an image of a dog"])
    first, again, other = (gradients(base.denoiser, pictures, [told], 5, seed) for seed in (7, 7, 8))
    assert first.shape == (5, told.states[0].numel())
    torch.testing.assert_close(first.norm(dim=1), torch.ones(5, dtype=torch.float64))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert all(parameter.grad is None for parameter in base.network.parameters())
