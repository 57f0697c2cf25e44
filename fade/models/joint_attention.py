"""Attention of text and picture in a flow transformer, written plainly; equal text positions counted, not repeated."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

PLAIN_UP_TO = 1024
"""Positions up to which plain products are used: on CPU they are faster than the fused kernel in the backward pass,
but they hold all pairs of positions."""


class CountedJointAttention:
    """What diffusers' ``JointAttnProcessor2_0`` computes; the last text position may stand for several equal ones.

    Without its T5 Stable Diffusion 3 is told 256 zeros behind CLIP's states (``max_sequence_length`` of the stock
    pipeline). Text has no places in this network: positions that are equal when they enter stay equal in every layer,
    and a softmax over n equal keys is one over a single key whose score is greater by log n. So one position gives
    what 256 give, answers and gradients, at a fourth of the work (ours).
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        count: int = 1,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Picture (B, N, D), and text (B, L, D) if given, to the same shapes.

        Args:
            count: how many positions the last text position stands for; comes by ``joint_attention_kwargs``.
        """
        del attention_mask
        query, key, value = _heads(attn, hidden_states, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
        if encoder_hidden_states is not None:
            added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            text = _heads(attn, encoder_hidden_states, added, (attn.norm_added_q, attn.norm_added_k))
            query, key, value = (torch.cat(pair, dim=2) for pair in zip((query, key, value), text, strict=True))
        more = torch.zeros(key.shape[2], device=key.device)
        if encoder_hidden_states is not None:
            more[-1] = math.log(count)
        if key.shape[2] <= PLAIN_UP_TO:
            scores = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5 + more
            mixed = scores.softmax(dim=-1).to(value.dtype) @ value
        else:
            query, key, more = (one.to(value.dtype) for one in (query, key, more))
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=more[None])
        mixed = mixed.transpose(1, 2).flatten(2)
        pictures = hidden_states.shape[1]
        answer: Tensor = attn.to_out[1](attn.to_out[0](mixed[:, :pictures]))
        if encoder_hidden_states is None:
            return answer
        return answer, mixed[:, pictures:] if attn.context_pre_only else attn.to_add_out(mixed[:, pictures:])


def _heads(attn: Any, states: Tensor, projections: tuple[Any, Any, Any], norms: tuple[Any, Any]) -> list[Tensor]:
    """Queries, keys and values, (B, heads, N, D / heads) each."""
    found = []
    for projection, norm in zip(projections, (*norms, None), strict=True):
        split = projection(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        found.append(split if norm is None else norm(split))
    return found
