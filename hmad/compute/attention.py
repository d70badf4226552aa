"""Prefill attention: packed prompts and later chunks over torch's scaled_dot_product_attention."""

import torch
from torch.nn.functional import scaled_dot_product_attention


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of one sequence's newest T positions over all its S positions.

    q [T, num_heads, head_dim], k and v [S, num_kv_heads, head_dim] with T <= S: query t sees keys 0 .. S - T + t.
    Returns [T, num_heads, head_dim].
    """
    num_queries, num_keys = q.shape[0], k.shape[0]
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, heads, tokens, head_dim]
    whole = num_queries == num_keys
    # The mask is aligned to the last key; torch's own is_causal aligns to the first and fits only a whole prompt.
    mask = None if whole else lower_right(num_queries, num_keys, q.device)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=whole, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)


def lower_right(num_queries: int, num_keys: int, device: torch.device) -> torch.Tensor:
    """bool [num_queries, num_keys]: what each query sees when the last of them sees every key."""
    return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)
