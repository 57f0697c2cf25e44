"""Attention of text and picture in a flow transformer, written plainly; equal text positions counted, not repeated."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class CountedJointAttention:
    """What diffusers' ``JointAttnProcessor2_0`` computes, where the last text position stands for ``count`` equal ones.

    Without its T5 Stable Diffusion 3 is told 256 zeros behind CLIP's states (``max_sequence_length`` of the stock
    pipeline). Text has no places in this network: positions that are equal when they enter stay equal in every layer,
    and a softmax over n equal keys is one over a single key whose score is greater by log n. So one position gives
    what 256 give, answers and gradients, at a fourth of the work (ours).

    Plain products are also faster than the fused kernel in the backward pass on CPU.
    """

    def __init__(self, count: int = 1) -> None:
        self._more = math.log(count)

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Picture (B, N, D) and text (B, L, D) to the same shapes."""
        del attention_mask
        pictures = hidden_states.shape[1]

        def heads(states: Tensor, norm: Any) -> Tensor:
            split = states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return split if norm is None else norm(split)

        query = torch.cat(
            [
                heads(attn.to_q(hidden_states), attn.norm_q),
                heads(attn.add_q_proj(encoder_hidden_states), attn.norm_added_q),
            ],
            dim=2,
        )
        key = torch.cat(
            [
                heads(attn.to_k(hidden_states), attn.norm_k),
                heads(attn.add_k_proj(encoder_hidden_states), attn.norm_added_k),
            ],
            dim=2,
        )
        value = torch.cat(
            [heads(attn.to_v(hidden_states), None), heads(attn.add_v_proj(encoder_hidden_states), None)], dim=2
        )
        scores = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
        if self._more:
            more = torch.zeros(scores.shape[-1], device=scores.device)
            more[-1] = self._more
            scores = scores + more
        mixed = (scores.softmax(dim=-1).to(value.dtype) @ value).transpose(1, 2).flatten(2)
        text = mixed[:, pictures:]
        return attn.to_out[1](attn.to_out[0](mixed[:, :pictures])), (
            text if attn.context_pre_only else attn.to_add_out(text)
        )
