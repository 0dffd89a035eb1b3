"""The two functions of flash attention in plain torch, as its documentation describes them, for machines without it.

Document by document and head by head; causal masks and windows align to the lower right corner.
"""

import math

import pytest
import torch
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.modeling_utils import PreTrainedModel


def _attend(query, key, value, causal, window_size, softmax_scale, softcap, sink):
    """One head of one document: `[T, d]` queries, `[S, d]` keys and values."""
    num_queries, num_keys = len(query), len(key)
    scores = query @ key.T * (1 / math.sqrt(query.shape[-1]) if softmax_scale is None else softmax_scale)
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    last = torch.arange(num_queries)[:, None] + num_keys - num_queries
    column = torch.arange(num_keys)[None]
    left, right = window_size
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool)
    if causal:
        visible &= column <= last
    if left >= 0:
        visible &= column >= last - left
    if right >= 0:
        visible &= column <= last + right
    scores = scores.masked_fill(~visible, -math.inf)
    if sink is not None:
        scores = torch.cat([scores, sink.expand(num_queries, 1)], 1)
    return torch.softmax(scores, -1)[:, :num_keys] @ value


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    s_aux=None,
):
    """`[tokens, heads, size]`, the documents one after the other; the kernels trust the longest lengths."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_q.diff().max() <= max_seqlen_q
    assert cu_seqlens_k.diff().max() <= max_seqlen_k
    assert q.shape[-1] == k.shape[-1] == v.shape[-1]
    assert not dropout_p
    output = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    starts = zip(cu_seqlens_q.tolist(), cu_seqlens_q[1:].tolist(), cu_seqlens_k.tolist(), cu_seqlens_k[1:].tolist())
    for first_query, end_query, first_key, end_key in starts:
        queries, keys = slice(first_query, end_query), slice(first_key, end_key)
        for head in range(q.shape[1]):
            sink = None if s_aux is None else s_aux[head]
            states = q[queries, head], k[keys, head // group], v[keys, head // group]
            output[queries, head] = _attend(*states, causal, window_size, softmax_scale, softcap, sink)
    return output


def flash_attn_func(q, k, v, **options):
    """`[batch, tokens, heads, size]`."""
    lengths = [torch.arange(len(q) + 1, dtype=torch.int32) * states.shape[1] for states in (q, k)]
    flat = [states.flatten(0, 1) for states in (q, k, v)]
    return flash_attn_varlen_func(*flat, *lengths, q.shape[1], k.shape[1], **options).view_as(q)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers find these functions as its flash attention, whatever the version."""
    functions = (flash_attn_func, flash_attn_varlen_func, None, flash_utils._pad_input, flash_utils._unpad_input)
    monkeypatch.setattr(flash_utils, "_lazy_imports", lambda *args, **kwargs: functions)
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)


def use_flash_attention(model: PreTrainedModel, version: int = 2) -> PreTrainedModel:
    """The model under flash attention, past the check whether it is installed."""
    model.config._attn_implementation_internal = f"flash_attention_{version}"
    return model
