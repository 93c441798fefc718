"""Attention of torch, `nn.MultiheadAttention`, whose projections carry adapters.

    q, k, v = W_in x + b_in            `in_proj_weight`, P = 3E: what a mount on the layer adapts
    y = W_out attention(q, k, v) + b_out        a mount on its `out_proj`

torch hands both weights to one function and never calls `out_proj`, so while either carries an
adapter the layer is computed here: both projections go by plan.py, like any linear layer, and
what lies between them is the same scaled dot product. An input that is not all of query, key and
value goes through the whole of W_in, of which its part is taken.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lyco_lab.adapters import forward
from lyco_lab.adapters.adapted_layer import Adapted
from lyco_lab.errors import UserError


def apply(
    layer: Adapted,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The layer's output, and its attention where that is asked for, as torch returns them."""
    if query.is_nested:
        raise UserError(
            "an attention layer with adapters takes no nested tensors: build the "
            "TransformerEncoder with enable_nested_tensor=False"
        )
    if is_causal and attn_mask is None:
        raise UserError("is_causal is but a hint: give the mask as attn_mask too")
    mha: Any = layer
    batched = query.dim() == 3
    inputs: dict[int, Tensor] = {}
    for x in (query, key, value):
        if id(x) not in inputs:
            if not batched:
                inputs[id(x)] = x.unsqueeze(0)
            else:
                inputs[id(x)] = x if mha.batch_first else x.transpose(0, 1)
    if key_padding_mask is not None and not batched:
        key_padding_mask = key_padding_mask.unsqueeze(0)
    q, k, v = _projections(mha, *(inputs[id(x)] for x in (query, key, value)))
    if mha.bias_k is not None:
        k = torch.cat([k, mha.bias_k.to(k.dtype).expand(len(k), 1, -1)], 1)
        v = torch.cat([v, mha.bias_v.to(v.dtype).expand(len(v), 1, -1)], 1)
    if mha.add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    mask = _mask(mha, key_padding_mask, attn_mask, q, k)
    q, k, v = (t.unflatten(-1, (mha.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    dropout = mha.dropout if mha.training else 0.0
    attention = None
    if need_weights:
        scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
        attention = torch.softmax(scores if mask is None else scores + mask, -1)
        attention = F.dropout(attention, dropout)
        y = attention @ v
        attention = attention.mean(1) if average_attn_weights else attention
    else:
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    y = mha.out_proj(y.transpose(1, 2).flatten(2))
    if not batched:
        return y.squeeze(0), None if attention is None else attention.squeeze(0)
    return y if mha.batch_first else y.transpose(0, 1), attention


def _projections(mha: Any, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    if mha.in_proj_weight is None:  # no adapter on it, as a mount needs one weight
        weights = (mha.q_proj_weight, mha.k_proj_weight, mha.v_proj_weight)
        biases = (None,) * 3 if mha.in_proj_bias is None else mha.in_proj_bias.chunk(3)
        given = zip((query, key, value), weights, biases, strict=True)
        return [F.linear(x, weight, bias) for x, weight, bias in given]
    whole = {id(x): forward.apply(mha, x) for x in (query, key, value)}
    return [whole[id(x)].chunk(3, -1)[i] for i, x in enumerate((query, key, value))]


def _mask(
    mha: Any, padding: Tensor | None, attn_mask: Tensor | None, q: Tensor, k: Tensor
) -> Tensor | None:
    """What is added to the scores: (batch, heads, L, S), or what broadcasts to it."""
    masks = []
    if padding is not None:
        masks.append(_additive(padding, q, k)[:, None, None])
    if attn_mask is not None:
        mask = _additive(attn_mask, q, k)
        masks.append(mask.unflatten(0, (len(q), mha.num_heads)) if mask.dim() == 3 else mask)
    return sum(masks[1:], masks[0]) if masks else None


def _additive(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -math.inf)
    return F.pad(mask.to(q.dtype), (0, k.shape[1] - mask.shape[-1]))  # the added keys are seen
