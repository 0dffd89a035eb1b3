"""Qwen2ForCausalLM in parallel streams (ParScale, arXiv 2505.10475), in one file for torch and transformers alone.

Load it with `AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`.

Written by parscale_adapt 0.1.0, whose modules it joins: streams, aggregator, config_view, joined, layout, varlen,
attention, cache, masks, decoder, paged, prefix, transforms, modeling.
"""
# SPDX-License-Identifier: Apache-2.0

import copy
import inspect
import math
import sys
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.generation.continuous_batching.cache import SLIDING_ATTENTION, group_layers_by_attn_type
from transformers.generation.continuous_batching.continuous_api import ContinuousMixin
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    padding_mask_function,
    prepare_padding_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM, Qwen2Model


# --- streams ---------------------------------------------------------------------------------------------------------
#
# Tensor functions of parallel streams; they know nothing of models, PEFT or caches.
#
# Shapes: `P` streams, `B` batch, `T` tokens, `H` hidden size, `n` prefix tokens, `h` heads, `d` head size.
# Rows are stream-major: row `p * B + b` is stream `p` of sample `b`.


def replicate(tensor: torch.Tensor, num_streams: int) -> torch.Tensor:
    """Repeat every sample once per stream: `[B, ...]` to `[P * B, ...]`, stream-major."""
    return tensor.repeat(num_streams, *[1] * (tensor.dim() - 1))


def fold_streams_into_heads(states: torch.Tensor, num_streams: int) -> torch.Tensor:
    """`[P * B, h, ...]` to `[B, P * h, ...]`: streams become heads, stream index major."""
    by_stream = states.reshape(num_streams, -1, *states.shape[1:]).transpose(0, 1)
    return by_stream.reshape(by_stream.shape[0], -1, *states.shape[2:])


def unfold_streams_from_heads(states: torch.Tensor, num_streams: int) -> torch.Tensor:
    """`[B, P * h, ...]` to `[P * B, h, ...]`, the inverse of [`fold_streams_into_heads`]."""
    batch_size, num_folded_heads = states.shape[:2]
    by_sample = states.view(batch_size, num_streams, num_folded_heads // num_streams, *states.shape[2:])
    return by_sample.transpose(0, 1).flatten(0, 1)


def unfold_streams_of_output(output: torch.Tensor, num_streams: int) -> torch.Tensor:
    """`[B, T, P * h, d]`, as attention functions return it, to a contiguous `[P * B, T, h, d]`."""
    by_sample = output.unflatten(2, (num_streams, -1))
    return by_sample.permute(2, 0, 1, 3, 4).flatten(0, 1).contiguous()


def aggregation_features(hidden_states: torch.Tensor, num_streams: int) -> torch.Tensor:
    """The aggregator's input: `[P * B, T, H]` to `[B, T, H * P]`, hidden index major (element `h * P + p`)."""
    by_stream = hidden_states.view(num_streams, -1, *hidden_states.shape[1:])
    return by_stream.permute(1, 2, 3, 0).flatten(-2)


def smooth_weights(logits: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Softmax in float32, then `w * (1 - smoothing) + smoothing / P` (paper, section 2): `[B, T, P]` to `[B, T, P]`."""
    weights = torch.softmax(logits, dim=-1, dtype=torch.float32)
    return weights * (1 - smoothing) + smoothing / logits.shape[-1]


def weighted_sum(hidden_states: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mix the streams: `[P * B, T, H]` hidden states and `[B, T, P]` weights to `[B, T, H]`, in the states' dtype."""
    by_stream = hidden_states.view(weights.shape[-1], -1, *hidden_states.shape[1:])
    return torch.einsum("btp,pbth->bth", weights, by_stream.to(weights.dtype)).to(hidden_states.dtype)


# --- aggregator ------------------------------------------------------------------------------------------------------
#
# Aggregators: P final hidden states to one (paper, section 2, equation 3; compared in Appendix A, Table 6).


class Aggregator(nn.Module):
    """What all aggregators share: a weighted sum of the streams of every token. A subclass gives the `logits`.

    `last_weights` holds the detached weights `[B, T, P]` of the latest forward while `record_weights` is set, for
    logging.

    Args:
        hidden_size: `H`, the size of the decoder's final hidden states.
        num_streams: `P`, at least 2.
        smoothing: `eps` in `w * (1 - eps) + eps / P`; keeps every stream in the gradient.
    """

    def __init__(self, hidden_size: int, num_streams: int, smoothing: float):
        super().__init__()
        self.hidden_size = hidden_size
        self.num_streams = num_streams
        self.smoothing = smoothing
        self.record_weights = False
        self.last_weights: torch.Tensor | None = None

    def reset_parameters(self, init_std: float) -> None:
        """Give new parameters their first values."""
        raise NotImplementedError

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[P * B, T, H]` to `[B, T, P]`."""
        raise NotImplementedError

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[P * B, T, H]` to `[B, T, H]`."""
        weights = smooth_weights(self.logits(hidden_states), self.smoothing)
        if self.record_weights:
            self.last_weights = weights.detach()
        return weighted_sum(hidden_states, weights)


class DynamicAggregator(Aggregator):
    """The paper's choice, a small MLP that sees all streams: `Linear(P * H, H)`, `SiLU`, `Linear(H, P)`.

    The layers keep the published names `0` and `2`.
    """

    def __init__(self, hidden_size: int, num_streams: int, smoothing: float):
        super().__init__(hidden_size, num_streams, smoothing)
        layers = (
            nn.Linear(num_streams * hidden_size, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, num_streams),
        )
        for index, layer in enumerate(layers):
            self.add_module(str(index), layer)

    def reset_parameters(self, init_std: float) -> None:
        """Weights from N(0, `init_std`), biases at 0."""
        for linear in (self[0], self[2]):
            nn.init.normal_(linear.weight, std=init_std)
            nn.init.zeros_(linear.bias)

    def __getitem__(self, index: int) -> nn.Module:
        return self.get_submodule(str(index))

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[P * B, T, H]` to `[B, T, P]`."""
        features = aggregation_features(hidden_states, self.num_streams)
        if not torch.is_autocast_enabled(features.device.type):
            features = features.to(self[0].weight.dtype)
        return self[2](self[1](self[0](features)))


class StaticAggregator(Aggregator):
    """One learned weight per stream, the same for every token."""

    def __init__(self, hidden_size: int, num_streams: int, smoothing: float):
        super().__init__(hidden_size, num_streams, smoothing)
        self.weight_logits = nn.Parameter(torch.empty(num_streams))

    def reset_parameters(self, init_std: float) -> None:
        """All streams start with the same weight."""
        nn.init.zeros_(self.weight_logits)

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[P * B, T, H]` to `[B, T, P]`."""
        batch_size = hidden_states.shape[0] // self.num_streams
        return self.weight_logits.expand(batch_size, hidden_states.shape[1], -1)


class MeanAggregator(Aggregator):
    """The mean of the streams; nothing is learned."""

    def reset_parameters(self, init_std: float) -> None:
        """Nothing to set."""

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[P * B, T, H]` to zeros `[B, T, P]`."""
        batch_size = hidden_states.shape[0] // self.num_streams
        return hidden_states.new_zeros(batch_size, hidden_states.shape[1], self.num_streams)


AGGREGATORS: dict[str, type[Aggregator]] = {
    "dynamic": DynamicAggregator,
    "static": StaticAggregator,
    "mean": MeanAggregator,
}


# --- config_view -----------------------------------------------------------------------------------------------------
#
# A view of a model's configuration in which the attention implementation has another name.
#
# transformers looks up attention and mask functions by `config._attn_implementation`. Attention modules and the decoder
# get a view of their configuration that adds a prefix to that name; the model's own configuration keeps the stock name,
# which generation, continuous batching and trainers know.


STREAMS = f"{__name__}."


class _View:
    """Mixin of a view's class; see [`config_view`] for its fields."""

    __slots__ = ()
    viewed: PreTrainedConfig
    name_prefix: str
    stream_decoder: nn.Module | None

    @property
    def _attn_implementation(self) -> str | None:
        name = self.viewed._attn_implementation
        return None if name is None else self.name_prefix + name

    @_attn_implementation.setter
    def _attn_implementation(self, value: Any) -> None:
        self.viewed._attn_implementation = value

    def __deepcopy__(self, memo: dict[int, Any]) -> "PreTrainedConfig":
        return config_view(
            copy.deepcopy(self.viewed, memo), self.name_prefix, copy.deepcopy(self.stream_decoder, memo)
        )

    def __reduce__(self) -> tuple[Callable, tuple]:
        return config_view, (self.viewed, self.name_prefix, self.stream_decoder)


@lru_cache
def _config_view_view_class(config_class: type) -> type:
    namespace = {"__slots__": ("name_prefix", "stream_decoder", "viewed"), "__module__": __name__}
    return type(f"ViewOf{config_class.__name__}", (_View, config_class), namespace)


def config_view(config: PreTrainedConfig, name_prefix: str, decoder: nn.Module | None = None) -> PreTrainedConfig:
    """A configuration that shares all fields with `config`; `name_prefix` stands before its attention implementation.

    `view.viewed` is `config` itself, `view.stream_decoder` the decoder whose streams run there.
    """
    config_class: Any = type(config)
    view: Any = object.__new__(_config_view_view_class(config_class))
    for name, value in {"__dict__": config.__dict__, "viewed": config, "name_prefix": name_prefix}.items():
        object.__setattr__(view, name, value)
    object.__setattr__(view, "stream_decoder", decoder)
    return view


def stock_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration behind a view, or the argument itself."""
    return config.viewed if isinstance(config, _View) else config


# --- joined ----------------------------------------------------------------------------------------------------------
#
# Attention of a few queries over a prefix and a cache that lie apart, so that no key or value is copied.


def attend_over_prefix_and_cache(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
) -> torch.Tensor:
    """Softmax over the scores of both, joined; the prefix is visible to every query.

    Args:
        query: `[B, heads, T, key_size]`.
        key, value: `[B, key_value_heads, S, key_size or value_size]`.
        prefix_key, prefix_value: `[B, key_value_heads, n, key_size or value_size]`.
        attention_mask: True or 0 where visible, `[B or 1, heads or 1, T, S]`; None shows all keys to every query.
        scaling: of the scores, `1 / sqrt(key_size)` if None.

    Returns:
        `[B, T, heads, value_size]`.
    """
    batch_size, num_heads, num_queries, key_size = query.shape
    num_key_value_heads, num_prefix_tokens = prefix_key.shape[1:3]
    grouped = query.reshape(batch_size, num_key_value_heads, -1, key_size)
    scale = 1 / math.sqrt(key_size) if scaling is None else scaling
    scores = torch.matmul(grouped, key.transpose(-1, -2)).float() * scale
    if attention_mask is not None:
        by_head = scores.view(batch_size, num_heads, num_queries, -1)
        if attention_mask.dtype == torch.bool:
            by_head = by_head.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            by_head = by_head + attention_mask
        scores = by_head.view_as(scores)
    prefix_scores = torch.matmul(grouped, prefix_key.transpose(-1, -2)).float() * scale
    weights = torch.softmax(torch.cat([prefix_scores, scores], dim=-1), dim=-1).to(value.dtype)
    output = torch.matmul(weights[..., :num_prefix_tokens], prefix_value)
    output = output + torch.matmul(weights[..., num_prefix_tokens:], value)
    return output.view(batch_size, num_heads, num_queries, -1).transpose(1, 2)


# --- layout ----------------------------------------------------------------------------------------------------------
#
# Which row of a decoder's batch is which stream of which sample.
#
# Outside a decoder a batch has `B` samples; inside, `R` rows, one per sample and stream, stream-major. Where states keep
# batch `B` (caches, attention), the streams stand side by side as heads.


class Group(NamedTuple):
    """The samples of one batch that run the same adapter (None = the plain backbone)."""

    adapter: str | None
    num_streams: int
    samples: torch.Tensor
    rows: torch.Tensor


@dataclass(frozen=True)
class UniformLayout:
    """Every sample runs `num_streams` streams: `R = P * B`, row `p * B + b`."""

    num_streams: int

    def replicate(self, tensor: torch.Tensor) -> torch.Tensor:
        """`[B, ...]` to `[R, ...]`."""
        return replicate(tensor, self.num_streams)

    def to_heads(self, states: torch.Tensor) -> torch.Tensor:
        """`[R, h, ...]` to `[B, P * h, ...]`."""
        return fold_streams_into_heads(states, self.num_streams)

    def to_rows(self, states: torch.Tensor) -> torch.Tensor:
        """`[B, P * h, ...]` to `[R, h, ...]`."""
        return unfold_streams_from_heads(states, self.num_streams)

    def count_samples(self, num_rows: int) -> int:
        """B."""
        return num_rows // self.num_streams


class MixedLayout:
    """Samples with different adapters in one batch.

    `P` is the largest number of streams. Rows are stream-major: stream p of all samples that have one. As heads, a
    sample with fewer streams leaves the last ones at zero.

    Args:
        adapters: the adapter of every sample, None for the plain backbone.
        num_streams: how many streams each sample runs.
        device: of the batch.
    """

    def __init__(self, adapters: Sequence[str | None], num_streams: Sequence[int], device: torch.device):
        self.adapters = tuple(adapters)
        self.num_streams = max(num_streams)
        rows = [
            (sample, stream)
            for stream in range(self.num_streams)
            for sample in range(len(self.adapters))
            if stream < num_streams[sample]
        ]
        self.adapter_of_row = tuple(self.adapters[sample] for sample, _ in rows)
        self.sample_of_row = torch.tensor([sample for sample, _ in rows], device=device)
        self._slot_of_row = torch.tensor([s * self.num_streams + p for s, p in rows], device=device)
        self.groups = [self._group(adapter, num_streams) for adapter in dict.fromkeys(adapters)]

    def _group(self, adapter: str | None, num_streams: Sequence[int]) -> Group:
        samples = [sample for sample, name in enumerate(self.adapters) if name == adapter]
        device = self.sample_of_row.device
        rows = torch.isin(self.sample_of_row, torch.tensor(samples, device=device)).nonzero().flatten()
        return Group(adapter, num_streams[samples[0]], torch.tensor(samples, device=device), rows)

    def replicate(self, tensor: torch.Tensor) -> torch.Tensor:
        """`[B, ...]` to `[R, ...]`."""
        return tensor[self.sample_of_row]

    def to_heads(self, states: torch.Tensor) -> torch.Tensor:
        """`[R, h, ...]` to `[B, P * h, ...]`."""
        slots = states.new_zeros(len(self.adapters) * self.num_streams, *states.shape[1:])
        slots[self._slot_of_row] = states
        return slots.view(len(self.adapters), self.num_streams * states.shape[1], *states.shape[2:])

    def to_rows(self, states: torch.Tensor) -> torch.Tensor:
        """`[B, P * h, ...]` to `[R, h, ...]`."""
        num_heads = states.shape[1] // self.num_streams
        return states.reshape(-1, num_heads, *states.shape[2:])[self._slot_of_row]

    def count_samples(self, num_rows: int) -> int:
        """B."""
        return len(self.adapters)


StreamLayout = UniformLayout | MixedLayout


# --- varlen ----------------------------------------------------------------------------------------------------------
#
# Packed documents in one row, as flash attention takes them: lengths instead of a mask.


_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def lengths_of_documents(
    key: torch.Tensor, attention_mask: torch.Tensor | None, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Add the lengths of the documents that lie in one row, where positions tell them by starting again.

    Args:
        key: `[B, heads, S, key_size]`.
        attention_mask: `[B, S]` where tokens are padded; flash attention then goes by the mask alone.
        kwargs: of the attention call; lengths that it has already are kept.

    Returns:
        `kwargs`, with `cu_seq_lens_q` and `cu_seq_lens_k` `[num_documents + 1]` and the longest lengths if, and only if,
        several documents lie in one row.
    """
    if attention_mask is not None:
        return {name: value for name, value in kwargs.items() if name not in _LENGTHS}
    positions = kwargs.get("position_ids")
    if kwargs.get("cu_seq_lens_k") is not None or positions is None or key.shape[0] > 1:
        return dict(kwargs)
    positions = positions.flatten()
    restarts = (positions[1:] <= positions[:-1]).nonzero().flatten() + 1
    if len(restarts) == 0:
        return dict(kwargs)
    ends = restarts.new_tensor([len(positions)])
    starts = torch.cat([restarts.new_zeros(1), restarts, ends]).to(torch.int32)
    longest = int(starts.diff().max())
    return {**kwargs, **dict(zip(_LENGTHS, (starts, starts, longest, longest)))}


def put_prefix_before_documents(
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Give every document its own copy of the prefix; nothing is read back from the device.

    Args:
        key, value: `[1, heads, S, size]`, the documents one after the other; what follows the last one stays behind it.
        prefix_key, prefix_value: `[1, heads, n, size]`.
        kwargs: of the attention call, with the lengths of [`lengths_of_documents`].

    Returns:
        Keys and values `[1, heads, S + num_documents * n, size]`, and the keyword arguments with these lengths.
    """
    num_prefix_tokens, num_tokens, starts = prefix_key.shape[-2], key.shape[-2], kwargs["cu_seq_lens_k"]
    num_documents = len(starts) - 1
    tokens = torch.arange(num_tokens, device=key.device)
    ranks = torch.arange(num_prefix_tokens, device=key.device)
    num_started = torch.searchsorted(starts[:-1].long(), tokens, right=True)
    added = num_prefix_tokens * torch.arange(num_documents + 1, device=key.device, dtype=starts.dtype)
    source = tokens.new_empty(num_tokens + num_documents * num_prefix_tokens)
    source[tokens + num_prefix_tokens * num_started] = tokens + num_prefix_tokens
    source[(starts + added)[:-1, None] + ranks] = ranks
    key = torch.cat([prefix_key, key], dim=-2)[:, :, source]
    value = torch.cat([prefix_value, value], dim=-2)[:, :, source]
    return (
        key,
        value,
        {
            **kwargs,
            "cu_seq_lens_k": starts + added,
            "max_length_k": kwargs["max_length_k"] + num_prefix_tokens,
            "position_ids": None,
        },
    )


# --- attention -------------------------------------------------------------------------------------------------------
#
# The prefix inside attention, once for every implementation.
#
# transformers dispatches attention by name. `parscale_sdpa` and its siblings put the prefix of the calling module in
# front of its keys and values and hand over to the stock function of that name. Nothing travels through
# `past_key_values`, so gradient checkpointing, caches and position ids stay as they are.
#
# For attention the streams of a sample are extra heads, so that masks, packed documents and paged caches keep batch `B`.


SUPPORTED_IMPLEMENTATIONS = (
    "eager",
    "sdpa",
    "flex_attention",
    "flash_attention_2",
    "flash_attention_3",
    "paged|eager",
)
STREAMS_ATTRIBUTE = "parscale"
ARGUMENTS_PER_KEY = ("indices", "block_indices")
MAX_JOINED_QUERIES = 16


class _ModuleForHeads:
    """An attention module as its stock function should see it: with the stock configuration, and with its learned
    attention sinks `[heads]` once per stream."""

    def __init__(self, module: nn.Module, num_streams: int):
        self._module = module
        self.config = stock_config(module.config)
        if num_streams > 1 and "sinks" in module._parameters:
            self.sinks = module.sinks.repeat(num_streams)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _UpdatedPages:
    """Hands keys and values that are already up to date to an attention function that asks a paged cache for them."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, **kwargs) -> tuple[torch.Tensor, ...]:
        return key_states, value_states


def stock_function(implementation: str, module: nn.Module) -> Callable:
    """transformers' function of that name; each architecture has its own eager one.

    Raises:
        ValueError: the architecture of `module` has no eager function by the usual name.
    """
    if implementation == "eager":
        # transformers passes the eager function only as a default of the look-up.
        for module_class in type(module).__mro__:
            function = vars(sys.modules[module_class.__module__]).get("eager_attention_forward")
            if function is not None:
                return function
        raise ValueError(
            f"{type(module).__name__} has no eager attention function that streams can call; load the backbone with "
            '`attn_implementation="sdpa"`.'
        )
    return ALL_ATTENTION_FUNCTIONS[implementation]


def refuse_arguments_per_key(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Refuse sparse attention, among whose chosen keys there is no place for a prefix.

    Raises:
        ValueError: the attention function was told which single keys to look at.
    """
    for name in ARGUMENTS_PER_KEY:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} picks single keys (`{name}`), which streams don't support: there is no "
                "place for a prefix among them."
            )


def _stream_attention(implementation: str) -> Callable:
    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of `query` `[R, heads, T, d]`; keys and values come as rows or with streams as heads."""
        refuse_arguments_per_key(module, kwargs)
        layout = module.config.stream_decoder.parscale.layout
        if kwargs.get("cache") is not None and layout.num_streams > 1:
            key, value = layout.to_heads(key), layout.to_heads(value)
            key, value = kwargs.pop("cache").update(key, value, layer_idx=module.layer_idx, kwargs=kwargs)
            kwargs |= {"cache": _UpdatedPages()} if implementation == "paged|eager" else {}
        if isinstance(layout, MixedLayout):
            return _attend_by_group(implementation, module, query, key, value, attention_mask, layout, kwargs)
        adapter = module.config.stream_decoder.parscale.current_adapter
        return _attend(implementation, module, query, key, value, attention_mask, layout, adapter, kwargs)

    return attention


def _attend_by_group(
    implementation: str,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    layout: MixedLayout,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    """Every adapter of a mixed batch attends for its own samples, as if it were alone."""
    num_rows = query.shape[0]
    outputs = []
    for group in layout.groups:
        select = partial(_select, group=group, num_rows=num_rows, num_samples=layout.count_samples(num_rows))
        num_heads = key.shape[1]
        if key.shape[0] != num_rows:
            num_heads = group.num_streams * (num_heads // layout.num_streams)
        output, _ = _attend(
            implementation,
            module,
            query[group.rows],
            select(key)[:, :num_heads],
            select(value)[:, :num_heads],
            select(attention_mask),
            UniformLayout(group.num_streams),
            group.adapter,
            {name: select(argument) for name, argument in kwargs.items()},
        )
        outputs.append(output)
    order = torch.cat([group.rows for group in layout.groups]).argsort()
    return torch.cat(outputs)[order], None


def _select(value: Any, group: Group, num_rows: int, num_samples: int) -> Any:
    """What is laid out by row or by sample, for one group only."""
    if not isinstance(value, torch.Tensor) or value.dim() < 2:
        return value
    if value.shape[0] == num_rows:
        return value[group.rows]
    return value[group.samples] if value.shape[0] == num_samples else value


def _attend(
    implementation: str,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    layout: UniformLayout,
    adapter: str | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if layout.num_streams == 1:
        stock = stock_function(implementation, module)
        return stock(_seen_module(implementation, module, 1), query, key, value, attention_mask, **kwargs)
    streams = getattr(module, STREAMS_ATTRIBUTE, None)
    prefix = None if streams is None else streams(adapter, key.dtype)
    num_rows = query.shape[0]
    has_mask_per_row = attention_mask is not None and attention_mask.shape[0] == num_rows
    if implementation == "eager" or has_mask_per_row:
        if key.shape[0] != num_rows:
            key, value = layout.to_rows(key), layout.to_rows(value)
        if isinstance(attention_mask, torch.Tensor) and not has_mask_per_row and attention_mask.shape[0] > 1:
            attention_mask = layout.replicate(attention_mask)
        if prefix is not None:
            batch_size = num_rows // layout.num_streams
            prefix = tuple(states.repeat_interleave(batch_size, dim=0) for states in prefix)
        return _attend_behind_prefix(implementation, module, query, key, value, attention_mask, prefix, kwargs)

    if key.shape[0] == num_rows:
        key, value = layout.to_heads(key), layout.to_heads(value)
    if prefix is not None:
        prefix = tuple(states.flatten(0, 1)[None] for states in prefix)
    arguments = {name: _argument_for_heads(name, argument, num_rows, layout) for name, argument in kwargs.items()}
    module = _seen_module(implementation, module, layout.num_streams)
    query = layout.to_heads(query)
    output, _ = _attend_behind_prefix(implementation, module, query, key, value, attention_mask, prefix, arguments)
    return unfold_streams_of_output(output, layout.num_streams), None


def _seen_module(implementation: str, module: nn.Module, num_streams: int) -> Any:
    # eager, sdpa and flex_attention read neither the configuration nor anything else that streams change.
    return module if implementation in ("eager", "sdpa", "flex_attention") else _ModuleForHeads(module, num_streams)


def _argument_for_heads(name: str, argument: Any, num_rows: int, layout: UniformLayout) -> Any:
    if not isinstance(argument, torch.Tensor):
        return argument
    if name == "s_aux":
        return argument.repeat(layout.num_streams)
    if argument.dim() < 2:
        return argument
    if name == "position_bias":
        has_rows = argument.shape[0] == num_rows
        return layout.to_heads(argument) if has_rows else argument.repeat(1, layout.num_streams, 1, 1)
    # What is laid out by row is the same for all streams of a sample.
    return argument[: num_rows // layout.num_streams] if argument.shape[0] == num_rows else argument


def _attend_behind_prefix(
    implementation: str,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    prefix: tuple[torch.Tensor, ...] | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Stock attention with the prefix in front of keys and values.

    Args:
        query: `[N, heads, T, key_size]`, with `N` = R rows, or N = B samples and streams among the heads.
        key, value: `[N, key_value_heads, S, key_size or value_size]`.
        attention_mask: as the mask function of that implementation made it.
        prefix: keys and values `[N or 1, key_value_heads, n, key_size or value_size]`, or None.
    """
    stock = stock_function(implementation, module)
    if prefix is None:
        return stock(module, query, key, value, attention_mask, **kwargs)
    num_prefix_tokens, num_queries = prefix[0].shape[-2], query.shape[-2]
    prefix_key, prefix_value = (states.expand(key.shape[0], -1, -1, -1) for states in prefix)
    if _can_join(implementation, query, attention_mask, kwargs):
        scaling = kwargs.get("scaling")
        output = attend_over_prefix_and_cache(query, key, value, prefix_key, prefix_value, attention_mask, scaling)
        return output, None
    if implementation.startswith("flash"):
        kwargs = lengths_of_documents(key, attention_mask, kwargs)
        _refuse_window(key, kwargs)
        if kwargs.get("cu_seq_lens_k") is not None:
            key, value, kwargs = put_prefix_before_documents(key, value, prefix_key, prefix_value, kwargs)
            return stock(module, query, key, value, None, **kwargs)
    key, value = torch.cat([prefix_key, key], dim=-2), torch.cat([prefix_value, value], dim=-2)
    bias = kwargs.get("position_bias")
    if attention_mask is None and implementation == "sdpa" and num_queries > 1:
        # sdpa's causal flag aligns to the upper left: with n zero queries in front, token t sees prefix and 0..t.
        query = F.pad(query, (0, 0, num_prefix_tokens, 0))
        if bias is not None:
            kwargs = {**kwargs, "position_bias": F.pad(bias, (num_prefix_tokens, 0, num_prefix_tokens, 0))}
        output, weights = stock(module, query, key, value, None, **kwargs)
        return output[:, num_prefix_tokens:], weights
    if bias is not None:
        kwargs = {**kwargs, "position_bias": F.pad(bias, (num_prefix_tokens, 0))}
    if isinstance(attention_mask, torch.Tensor):
        attention_mask = _show_prefix(attention_mask, num_prefix_tokens)
    return stock(module, query, key, value, attention_mask, **kwargs)


def _can_join(implementation: str, query: torch.Tensor, attention_mask: Any, kwargs: dict[str, Any]) -> bool:
    """Whether scores of prefix and cache can be joined instead of copying the cache behind the prefix."""
    num_queries = query.shape[-2]
    is_decoding = num_queries == 1 or (attention_mask is not None and num_queries <= MAX_JOINED_QUERIES)
    is_plain = kwargs.get("position_bias") is None and not kwargs.get("dropout")
    return implementation == "sdpa" and is_decoding and is_plain


def _show_prefix(attention_mask: torch.Tensor, num_prefix_tokens: int) -> torch.Tensor:
    """Add `n` visible columns on the left of a `[..., T, S]` or `[N, S]` mask."""
    visible = 0.0 if attention_mask.dtype.is_floating_point else 1
    return F.pad(attention_mask, (num_prefix_tokens, 0), value=visible)


def _refuse_window(key: torch.Tensor, kwargs: dict[str, Any]) -> None:
    window, longest = kwargs.pop("sliding_window", None), kwargs.get("max_length_k") or key.shape[-2]
    if window is not None and longest > window:
        raise ValueError(
            f"Flash attention can't show a prefix to tokens behind its sliding window of {window} tokens, got "
            f'{longest}: load the backbone with `attn_implementation="sdpa"` or "flex_attention".'
        )


for _implementation in SUPPORTED_IMPLEMENTATIONS:
    AttentionInterface.register(STREAMS + _implementation, _stream_attention(_implementation))


# --- cache -----------------------------------------------------------------------------------------------------------
#
# A view of any transformers cache in which streams are extra heads.
#
# The cache keeps batch B, so reordering beams, repeating, selecting, cropping and mask sizes stay as they are.


_OWNER = "parscale_owner"
CacheOwner = str | None | tuple[str | None, ...]


class _StreamFolding(Cache):
    """Mixin whose `update` stores `[R, h, T, d]` as `[B, P * h, T, d]`; see [`stream_view`] for its fields."""

    __slots__ = ()
    layout: StreamLayout
    attended_layers: Set[int]
    viewed: Cache

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        key_states, value_states = self.layout.to_heads(key_states), self.layout.to_heads(value_states)
        key_states, value_states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx in self.attended_layers:
            return key_states, value_states
        # The layer computes its keys and values from what it caches (latent attention, for one) and expects rows.
        return self.layout.to_rows(key_states), self.layout.to_rows(value_states)

    def show_states_as_rows(self) -> None:
        """Lay the states of recurrent layers, which their layers change in place, out by row; on the way in."""
        self._arrange_states(self.layout.to_rows)

    def hide_streams_of_states(self) -> None:
        """Undo [`show_states_as_rows`], so that the cache keeps batch `B`; on the way out."""
        self._arrange_states(self.layout.to_heads)

    def _arrange_states(self, arrange: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for layer in self.layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                for states in (layer.conv_states, layer.recurrent_states):
                    for index, state in states.items():
                        states[index] = None if state is None else arrange(state)


def claim_cache(cache: Cache, owner: CacheOwner) -> None:
    """Note whose keys and values `cache` will hold: those of the adapter `owner`, (None) of the plain backbone, or
    (a tuple) of one of these for every sample.

    Raises:
        ValueError: it is filled with those of another owner.
    """
    previous = getattr(cache, _OWNER, None)
    if previous == owner:
        return
    if any(_is_filled(layer) for layer in cache.layers):
        raise ValueError(
            f"`past_key_values` was filled by {_describe(previous)} and can't be continued by {_describe(owner)}: "
            "start again from an empty cache after switching adapters."
        )
    for layer in cache.layers:
        _forget_allocation(layer)
    mark_cache(cache, owner)


def mark_cache(cache: Cache, owner: CacheOwner) -> None:
    """Note whose keys and values `cache` holds, without a check."""
    setattr(cache, _OWNER, owner)


def claim_pages(cache: Any, owner: CacheOwner) -> None:
    """As [`claim_cache`], for the paged cache of continuous batching, which serves one owner for as long as it lives.

    Raises:
        ValueError: it serves another owner.
    """
    previous = vars(cache).setdefault(_OWNER, owner)
    if previous != owner:
        raise ValueError(
            f"The manager of continuous batching serves {_describe(previous)} and can't go on with {_describe(owner)}: "
            "stop it, or call `destroy_cached_continuous_batching_manager`, before switching adapters."
        )


def _is_filled(layer: CacheLayerMixin | LinearAttentionCacheLayerMixin) -> bool:
    has_states = isinstance(layer, LinearAttentionCacheLayerMixin) and any(layer.has_previous_state.values())
    return has_states or (isinstance(layer, CacheLayerMixin) and bool(layer.get_seq_length() > 0))


def _forget_allocation(layer: CacheLayerMixin | LinearAttentionCacheLayerMixin) -> None:
    """An empty cache may come allocated for another number of heads or rows."""
    layer.is_initialized = False
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        for index in layer.conv_states:
            layer.conv_states[index] = layer.recurrent_states[index] = None
            layer.is_conv_states_initialized[index] = layer.is_recurrent_states_initialized[index] = False


def _describe(owner: CacheOwner) -> str:
    if isinstance(owner, tuple):
        return f"a batch of {', '.join(map(_describe, owner))}"
    return "the plain backbone" if owner is None else f"the adapter {owner!r}"


_view_classes: dict[type, type] = {}  # not `lru_cache`, of which torch.compile warns


def _cache_view_class(cache_class: type) -> type:
    if cache_class not in _view_classes:
        namespace = {"__slots__": ("attended_layers", "layout", "viewed"), "__module__": __name__}
        _view_classes[cache_class] = type(
            f"StreamView{cache_class.__name__}", (_StreamFolding, cache_class), namespace
        )
    return _view_classes[cache_class]


def stream_view(cache: Cache, layout: StreamLayout, attended_layers: Set[int]) -> _StreamFolding:
    """A cache object that shares all state with `cache` and folds streams into heads on `update`.

    `update` returns `[B, P * h, T, d]` in `attended_layers`, whose attention functions get just what it returns, and
    `[R, h, T, d]` elsewhere. `view.viewed` is `cache` itself.
    """
    cache_class: Any = type(cache)
    view: Any = object.__new__(_cache_view_class(cache_class))
    view.__dict__ = cache.__dict__
    view.layout = layout
    view.attended_layers = attended_layers
    view.viewed = cache
    return view


def viewed_cache(cache: Cache | None) -> Cache | None:
    """The caller's cache behind a view, or the argument itself."""
    return cache.viewed if isinstance(cache, _StreamFolding) else cache


# --- masks -----------------------------------------------------------------------------------------------------------
#
# Attention masks for streams: built once per sample, not once per stream.


def _stream_mask(implementation: str) -> Callable:
    stock = ALL_MASK_ATTENTION_FUNCTIONS[implementation]

    def mask(batch_size: int, attention_mask: torch.Tensor | None, config: PreTrainedConfig, **kwargs: Any) -> Any:
        """The mask of `batch_size` = R rows of tokens: one for each of their B samples, or, where the architecture
        computes with its masks (`masks_per_row`), one for each row."""
        streams = config.stream_decoder.parscale
        if not streams.masks_per_row:
            batch_size = streams.layout.count_samples(batch_size)
            attention_mask = None if attention_mask is None else attention_mask[:batch_size]  # those of stream 0
        if implementation == "flex_attention":
            if isinstance(streams.layout, MixedLayout):
                raise ValueError(
                    "`adapter_names` can't mix adapters under flex_attention, whose block mask has no rows to select: "
                    'load the backbone with `attn_implementation="sdpa"`.'
                )
            if streams.num_prefix_tokens > 0:
                kwargs |= _behind_prefix(streams.num_prefix_tokens, attention_mask, **kwargs)
                attention_mask = None
        return stock(batch_size=batch_size, attention_mask=attention_mask, config=config, **kwargs)

    return mask


def _behind_prefix(
    num_prefix_tokens: int,
    attention_mask: torch.Tensor | None,
    mask_function: Callable,
    kv_length: int,
    kv_offset: int,
    **kwargs: Any,
) -> dict[str, Any]:
    """The arguments of a block mask that has `n` visible keys in front and knows the padding."""
    if attention_mask is not None and not attention_mask.all():
        padding_mask = prepare_padding_mask(attention_mask, kv_length, kv_offset)
        mask_function = and_masks(mask_function, padding_mask_function(padding_mask))

    def shows(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> torch.Tensor:
        token = kv_idx.clamp(min=kv_offset)
        # Not `|`, for which torch 2.13 generates C++ that doesn't compile.
        return torch.where(kv_idx < kv_offset, True, mask_function(batch_idx, head_idx, q_idx, token))

    return {
        "mask_function": shows,
        "kv_length": kv_length + num_prefix_tokens,
        "kv_offset": kv_offset - num_prefix_tokens,
    }


def register_stream_masks() -> None:
    """Make transformers find the mask functions under the names of the attention functions."""
    for implementation in SUPPORTED_IMPLEMENTATIONS:
        if implementation in ALL_MASK_ATTENTION_FUNCTIONS:
            AttentionMaskInterface.register(STREAMS + implementation, _stream_mask(implementation))


# --- decoder ---------------------------------------------------------------------------------------------------------
#
# Streams around a decoder: rows are replicated on the way in and aggregated on the way out.
#
# The aggregation happens inside the decoder's own call, so that the LM head, and losses that call the decoder without
# the causal-LM forward, see B rows.


_ARGUMENTS_BY_TOKEN = ("input_ids", "inputs_embeds", "position_ids")
_CACHES = ("past_key_values", "cache_params")  # the latter where no layer has attention


def attach_stream_hooks(decoder: PreTrainedModel) -> list[RemovableHandle]:
    """Run `decoder` in as many streams as its child `parscale` says.

    What the child must offer:

    - called on `last_hidden_state` `[R, T, H]`, it returns `[B, T, H]`;
    - `lay_out(batch_size, device)` and `layout`, the [`StreamLayout`] of the coming or running call;
    - `num_prefix_tokens`, `current_adapter` (None = the plain backbone) and `cache_owner`, whose keys and values a
      cache holds;
    - `attended_layers`, as in [`parscale_adapt.cache.stream_view`], and `masks_per_row`, as in [`parscale_adapt.masks`].
    """
    return [
        decoder.register_forward_pre_hook(_enter_streams, with_kwargs=True, prepend=True),
        decoder.register_forward_hook(_leave_streams, with_kwargs=True),
    ]


def route_through_streams(module: nn.Module, decoder: PreTrainedModel) -> None:
    """Let `module`, the decoder or one of its attention modules, look up the functions that know streams."""
    module.config = config_view(stock_config(module.config), STREAMS, decoder)


def restore_stock_functions(module: nn.Module) -> None:
    """Undo [`route_through_streams`]."""
    module.config = stock_config(module.config)


def refuse_unsupported_attention(decoder: PreTrainedModel) -> None:
    """Check the attention implementation that is set now.

    Raises:
        ValueError: it has no counterpart that knows streams.
    """
    name = stock_config(decoder.config)._attn_implementation
    if name not in SUPPORTED_IMPLEMENTATIONS:
        raise ValueError(
            f"`attn_implementation` must be one of {', '.join(SUPPORTED_IMPLEMENTATIONS)} for streams, got {name!r}: "
            'load the backbone with `attn_implementation="sdpa"`.'
        )


def _enter_streams(
    decoder: PreTrainedModel, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    streams = getattr(decoder, STREAMS_ATTRIBUTE)
    refuse_unsupported_attention(decoder)
    arguments = _arguments_by_name(decoder, args, kwargs)
    tokens = arguments["input_ids"] if arguments.get("input_ids") is not None else arguments["inputs_embeds"]
    layout = streams.lay_out(tokens.shape[0], tokens.device)
    cache_name = next((name for name in _CACHES if isinstance(arguments.get(name), Cache)), "past_key_values")
    cache = arguments.get(cache_name)
    if cache is not None:
        claim_cache(cache, streams.cache_owner)
    is_paged = arguments.get("cache") is not None
    if is_paged:
        claim_pages(arguments["cache"], streams.cache_owner)
    if layout.num_streams == 1:
        return None
    if cache is None and _wants_cache(decoder, arguments.get("use_cache")):
        cache = DynamicCache(config=stock_config(decoder.config))
        claim_cache(cache, streams.cache_owner)
    arguments = _with_positions(decoder, arguments, tokens.shape[1])
    arguments = {
        name: _replicate_rows(name, value, tokens.shape[0], layout)
        if not is_paged or name in _ARGUMENTS_BY_TOKEN
        else value
        for name, value in arguments.items()
    }
    if cache is not None:
        view = stream_view(cache, layout, streams.attended_layers)
        view.show_states_as_rows()
        arguments[cache_name] = view
    return (), arguments


def _with_positions(decoder: PreTrainedModel, arguments: dict[str, Any], num_tokens: int) -> dict[str, Any]:
    """Count positions from the first real token of every sample, as `generate` does, where they aren't given.

    Rotary backbones see differences of positions only and don't care. Prefix keys aren't rotated, so for streams the
    padding on the left of a sample would shift its tokens away from them.
    """
    mask = arguments.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or arguments.get("position_ids") is not None:
        return arguments
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        return arguments
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -num_tokens:]
    return {**arguments, "position_ids": positions}


def _wants_cache(decoder: PreTrainedModel, use_cache: bool | None) -> bool:
    if "past_key_values" not in inspect.signature(decoder.forward).parameters:
        return False
    # The same rule as in transformers' `merge_with_config_defaults`; with a cache, packed documents aren't recognised.
    if decoder.training and getattr(decoder, "gradient_checkpointing", False):
        return False
    return getattr(decoder.config, "use_cache", False) if use_cache is None else use_cache


def _arguments_by_name(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    if not args:
        return kwargs
    positional = [
        parameter.name
        for parameter in inspect.signature(decoder.forward).parameters.values()
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    return {**dict(zip(positional, args)), **kwargs}


def _replicate_rows(name: str, value: Any, batch_size: int, layout: StreamLayout) -> Any:
    """Replicate what is laid out by sample: tensors of two or more dimensions with `batch_size` rows.

    Masks that are ready for attention, of four dimensions, stay, since attention keeps batch `B`.
    """
    if isinstance(value, dict):
        return {key: _replicate_rows(name, item, batch_size, layout) for key, item in value.items()}
    if not isinstance(value, torch.Tensor) or value.dim() < 2:
        return value
    if name == "attention_mask" and value.dim() == 4:
        return value
    if name == "position_ids" and value.dim() == 3:  # `[axes, B, T]`, positions of several axes
        return layout.replicate(value.transpose(0, 1)).transpose(0, 1)
    return layout.replicate(value) if value.shape[0] == batch_size else value


def _leave_streams(decoder: PreTrainedModel, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    streams = getattr(decoder, STREAMS_ATTRIBUTE)
    layout = streams.layout
    if layout.num_streams == 1:
        for item in output if isinstance(output, tuple) else output.values():
            if isinstance(item, Cache):
                mark_cache(item, streams.cache_owner)
        return None
    view = next((kwargs[name] for name in _CACHES if isinstance(kwargs.get(name), Cache)), None)
    if view is not None:
        view.hide_streams_of_states()
    if isinstance(output, tuple):
        rest = [_caller_cache(item, streams) if isinstance(item, Cache) else item for item in output[1:]]
        return (streams(output[0]), *rest)
    output["last_hidden_state"] = streams(output["last_hidden_state"])
    if output.get("hidden_states") is not None:
        output["hidden_states"] = (*output["hidden_states"][:-1], output["last_hidden_state"])
    for name in _CACHES:
        if isinstance(output.get(name), Cache):
            output[name] = _caller_cache(output[name], streams)
    if output.get("router_logits") is not None and isinstance(layout, UniformLayout):
        # One entry per layer and stream, so that the backbone's balancing loss finds B * T tokens in each.
        output["router_logits"] = tuple(
            stream for layer in output["router_logits"] for stream in layer.chunk(layout.num_streams)
        )
    return output


def _caller_cache(cache: Cache, streams: Any) -> Cache:
    """The cache behind a view; one that a decoder without attention made itself gets batch `B`."""
    if viewed_cache(cache) is cache:
        stream_view(cache, streams.layout, frozenset()).hide_streams_of_states()
        mark_cache(cache, streams.cache_owner)
    return viewed_cache(cache)


register_stream_masks()


# --- paged -----------------------------------------------------------------------------------------------------------
#
# Continuous batching: a paged cache that has room for the heads of all streams.


def init_continuous_batching(
    model: PreTrainedModel,
    generation_config: GenerationConfig | None = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    **kwargs: Any,
) -> Any:
    """transformers' method of the same name, for a causal LM whose decoder runs streams.

    The manager gets a view of the model whose configuration has `P` times the heads: from it the manager sizes its
    cache.

    Raises:
        ValueError: a manager was kept for another adapter; flash attention was chosen for streams with sliding windows;
            or as transformers' own.
    """
    streams = getattr(model.get_decoder(), STREAMS_ATTRIBUTE)
    stock = ContinuousMixin.init_continuous_batching
    kept = getattr(model, "_cached_continuous_batching_manager", None)
    if kept is not None:
        claim_pages(kept.batch_processor.cache, streams.cache_owner)
        return stock(kept.model)
    if streams.layout.num_streams == 1:
        return stock(model, generation_config, continuous_batching_config, **kwargs)
    continuous_batching_config = copy.copy(continuous_batching_config or ContinuousBatchingConfig())
    # Flash attention's decoding path writes into the pages itself, where a prefix can't be put in front.
    continuous_batching_config.max_blocks_per_request = 0
    if streams.num_prefix_tokens > 0 and SLIDING_ATTENTION in group_layers_by_attn_type(
        model.config.get_text_config()
    ):
        _refuse_flash_attention(model)
        continuous_batching_config.auto_switch_to_flash = False
    sized = _view_with_heads_of_streams(model, streams.layout.num_streams)
    return stock(sized, generation_config, continuous_batching_config, **kwargs)


def _refuse_flash_attention(model: PreTrainedModel) -> None:
    name = model.config._attn_implementation
    if name.startswith("flash"):
        raise ValueError(
            f"Continuous batching can't run streams through the sliding windows of {type(model).__name__} under "
            f'{name}, which shows no prefix behind a window: call `set_attn_implementation("sdpa")` first.'
        )


@lru_cache
def _paged_view_class(model_class: type) -> type:
    namespace = {"__slots__": ("config",), "__module__": model_class.__module__}
    return type(model_class.__name__, (model_class,), namespace)


def _view_with_heads_of_streams(model: PreTrainedModel, num_streams: int) -> PreTrainedModel:
    """The same model, with all its state, under a configuration of its own."""
    config = copy.deepcopy(stock_config(model.config))
    text_config = config.get_text_config()
    if getattr(text_config, "head_dim", None) is None:
        text_config.head_dim = text_config.hidden_size // text_config.num_attention_heads
    if getattr(text_config, "num_key_value_heads", None) is not None:
        text_config.num_key_value_heads *= num_streams
    text_config.num_attention_heads *= num_streams
    model_class: Any = type(model)
    view: Any = object.__new__(_paged_view_class(model_class))
    view.__dict__ = model.__dict__
    object.__setattr__(view, "config", config)
    return view


# --- prefix ----------------------------------------------------------------------------------------------------------
#
# Learned prefix keys or values of one attention layer: how they are stored and how they start.


class StreamPrefix(nn.Module):
    """The prefix keys (or values) of one attention layer, one set per stream.

    The tensor is read in this module's own forward only, as DeepSpeed ZeRO-3 and FSDP require.

    Args:
        shape: `[P, num_key_value_heads, n, head_size]`.
    """

    def __init__(self, shape: tuple[int, int, int, int]):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))

    def reset_parameters(self, init_std: float) -> None:
        """Prefix from N(0, `init_std`) (paper, Appendix A)."""
        nn.init.normal_(self.weight, std=init_std)

    def forward(self, dtype: torch.dtype) -> torch.Tensor:
        """The prefix `[P, num_key_value_heads, n, head_size]` as a new tensor, which outlives a sharded parameter."""
        return self.weight.to(dtype, copy=True)


class ReparameterizedPrefix(nn.Module):
    """A prefix computed from a small matrix by an MLP while training; [`folded`] gives the plain tensor.

    As in prefix tuning (Li and Liang, 2021, section 4.3), which the paper's Appendix A follows; here the MLP belongs
    to one layer, so that it runs inside that layer's checkpointed block.

    Args:
        shape: `[P, num_key_value_heads, n, head_size]` of the computed prefix.
    """

    def __init__(self, shape: tuple[int, int, int, int]):
        super().__init__()
        num_streams, num_heads, num_prefix_tokens, head_size = shape
        self.shape = shape
        self.embedding = nn.Parameter(torch.empty(num_streams, num_prefix_tokens, head_size))
        self.hidden = nn.Linear(head_size, 2 * head_size)
        self.output = nn.Linear(2 * head_size, num_heads * head_size)

    def reset_parameters(self, init_std: float) -> None:
        """The matrix from N(0, 1), weights from N(0, `init_std`), biases at 0."""
        nn.init.normal_(self.embedding)
        for linear in (self.hidden, self.output):
            nn.init.normal_(linear.weight, std=init_std)
            nn.init.zeros_(linear.bias)

    def folded(self) -> torch.Tensor:
        """The prefix as a plain tensor `[P, num_key_value_heads, n, head_size]`."""
        num_streams, num_heads, num_prefix_tokens, head_size = self.shape
        prefix = self.output(torch.tanh(self.hidden(self.embedding)))
        return prefix.view(num_streams, num_prefix_tokens, num_heads, head_size).transpose(1, 2)

    def forward(self, dtype: torch.dtype) -> torch.Tensor:
        """Compute the prefix, as [`StreamPrefix.forward`]."""
        return self.folded().to(dtype)


# --- transforms ------------------------------------------------------------------------------------------------------
#
# What else than a prefix can make streams differ: low-rank weights or a bias per stream (paper, Appendix A, Table 6).
#
# Both add to the output of a linear layer of the backbone. Shapes as in [`parscale_adapt.streams`].


class StreamLora(nn.Module):
    """Low-rank weights per stream (LoRA, Hu et al., 2021): adds `alpha / rank * B_p A_p x` in stream p.

    `B` starts at zero, so that all streams start as the backbone; since each has an `A` of its own, their gradients
    differ from the first step on.

    Args:
        num_streams: `P`.
        in_features, out_features: sizes of the linear layer's input and output.
        rank: rows of `A`.
        alpha: numerator of the scale.
    """

    def __init__(self, num_streams: int, in_features: int, out_features: int, rank: int, alpha: float):
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(num_streams, rank, in_features))
        self.lora_B = nn.Parameter(torch.empty(num_streams, out_features, rank))
        self.scaling = alpha / rank

    def reset_parameters(self, init_std: float) -> None:
        """`A` uniform as in PEFT's LoRA, `B` at zero."""
        with torch.no_grad():
            for matrix in self.lora_A:
                nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """What to add to the output `[P * B, T, out_features]` of an input `[P * B, T, in_features]`."""
        by_stream = states.reshape(self.lora_A.shape[0], -1, states.shape[-1])
        if not torch.is_autocast_enabled(states.device.type):
            by_stream = by_stream.to(self.lora_A.dtype)
        change = by_stream @ self.lora_A.mT @ self.lora_B.mT * self.scaling
        return change.view(*states.shape[:-1], -1)


class StreamBias(nn.Module):
    """A bias per stream (BitFit, Ben Zaken et al., 2021).

    Args:
        num_streams: `P`.
        out_features: size of the linear layer's output.
    """

    def __init__(self, num_streams: int, out_features: int):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(num_streams, out_features))

    def reset_parameters(self, init_std: float) -> None:
        """From N(0, `init_std`), so that the streams differ from the start."""
        nn.init.normal_(self.bias, std=init_std)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """What to add to an output of `P * B` rows: `[P * B, 1, out_features]`."""
        return self.bias.repeat_interleave(states.shape[0] // self.bias.shape[0], dim=0)[:, None]


# --- modeling --------------------------------------------------------------------------------------------------------
#
# Causal LMs that own their streams: the classes of standalone checkpoints.
#
# Such a class is one of the mixins below before a class of transformers. `config.parscale` says how the streams are laid
# out; `base_model` is the name of the base model in the causal LM, all other names are relative to it, `""` is itself:
#
# - `num_streams`, `aggregator`, `aggregator_smoothing`, `stream_transform` as in an adapter's configuration, with
#   `num_prefix_tokens` (0 without prefixes) or `stream_lora_rank` and `stream_lora_alpha`;
# - `decoder`, the module whose output is aggregated, and its `hidden_size`;
# - `attention_shapes`: key-value heads, key size and value size of every attention module;
# - `attended_layers` and `masks_per_row`, as in [`parscale_adapt.decoder`];
# - `projection_shapes`: input and output size of every linear layer in which streams differ.


_INIT_STD = 0.02


class OwnedPrefixes(nn.Module):
    """The prefixes of one attention module, as [`parscale_adapt.attention`] asks for them.

    Args:
        num_streams: `P`.
        num_prefix_tokens: `n`.
        shape: key-value heads, key size and value size.
    """

    def __init__(self, num_streams: int, num_prefix_tokens: int, shape: tuple[int, int, int]):
        super().__init__()
        num_heads, key_size, value_size = shape
        self.prefix_k = StreamPrefix((num_streams, num_heads, num_prefix_tokens, key_size))
        self.prefix_v = StreamPrefix((num_streams, num_heads, num_prefix_tokens, value_size))

    def forward(self, adapter: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Prefix keys and values `[P, num_key_value_heads, n, key_size or value_size]`."""
        return self.prefix_k(dtype), self.prefix_v(dtype)


class OwnedStreams(nn.Module):
    """The streams of a decoder, as [`parscale_adapt.decoder`] asks for them; there is no adapter to switch.

    Args:
        streams: `config.parscale`.
    """

    current_adapter = cache_owner = "parscale"

    def __init__(self, streams: dict[str, Any]):
        super().__init__()
        num_streams, smoothing = streams["num_streams"], streams["aggregator_smoothing"]
        self.layout = UniformLayout(num_streams)
        self.num_prefix_tokens = streams["num_prefix_tokens"]
        self.attended_layers = frozenset(streams["attended_layers"])
        self.masks_per_row = streams["masks_per_row"]
        self.aggregator = AGGREGATORS[streams["aggregator"]](streams["hidden_size"], num_streams, smoothing)

    def lay_out(self, batch_size: int, device: torch.device) -> UniformLayout:
        """The same for every batch."""
        return self.layout

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Mix the streams: `[P * B, T, H]` to `[B, T, H]`."""
        return self.aggregator(hidden_states)


class _Initialized(nn.Module):
    """Mixin that initializes what a checkpoint doesn't hold."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # transformers marks what it has read. Its guard would not see the mark in slices of a parameter.
        was_read = all(getattr(parameter, "_is_hf_initialized", False) for parameter in module.parameters())
        if isinstance(module, Aggregator | StreamPrefix | StreamLora | StreamBias) and not was_read:
            module.reset_parameters(_INIT_STD)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For code from outside, transformers skips modules without parameters of their own; some models initialize
        # the buffers of other modules from there.
        super()._initialize_weights(module)


class StreamedModel(_Initialized):
    """Mixin of a base model that runs in streams; `last_hidden_state` is the aggregated `[batch, tokens, hidden]`."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        add_streams(self)
        self.post_init()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As [`transformers.PreTrainedModel.save_pretrained`], with the configuration behind the decoder's view of it."""
        view = self.config  # type: ignore[has-type]
        self.config = stock_config(view)
        try:
            super().save_pretrained(*args, **kwargs)
        finally:
            self.config = view


class StreamedCausalLM(_Initialized):
    """Mixin of the causal LM over a base model of class `streamed_class`, which is a [`StreamedModel`]."""

    streamed_class: type[StreamedModel]

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        self.run_in_streams()
        self.post_init()

    def run_in_streams(self) -> None:
        """Make the base model, so far a stock one, a [`StreamedModel`]."""
        base_model = self.get_submodule(self.config.parscale["base_model"])
        base_model.__class__ = self.streamed_class
        add_streams(base_model)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """See [`parscale_adapt.paged.init_continuous_batching`]."""
        return init_continuous_batching(self, *args, **kwargs)


def add_streams(base_model: PreTrainedModel) -> None:
    """Give a base model the modules that `config.parscale` describes, and run its decoder in streams.

    They stay in float32 where the rest is in half precision, as PEFT keeps those of an adapter.
    """
    streams = base_model.config.parscale
    decoder = base_model.get_submodule(streams["decoder"])
    decoder.parscale = OwnedStreams(streams)
    attach_stream_hooks(decoder)
    if streams["attention_shapes"]:
        route_through_streams(decoder, decoder)
    num_streams, num_prefix_tokens = streams["num_streams"], streams["num_prefix_tokens"]
    for name, shape in streams["attention_shapes"].items():
        attention = base_model.get_submodule(name)
        route_through_streams(attention, decoder)
        if num_prefix_tokens > 0:
            attention.parscale = OwnedPrefixes(num_streams, num_prefix_tokens, shape)
    for name, (in_features, out_features) in streams["projection_shapes"].items():
        linear = base_model.get_submodule(name)
        if streams["stream_transform"] == "lora":
            rank, alpha = streams["stream_lora_rank"], streams["stream_lora_alpha"]
            linear.parscale = StreamLora(num_streams, in_features, out_features, rank, alpha)
        else:
            linear.parscale = StreamBias(num_streams, out_features)
        linear.register_forward_hook(_add_transform)
    kept = base_model._keep_in_fp32_modules_strict or ()
    base_model._keep_in_fp32_modules_strict = {*kept, STREAMS_ATTRIBUTE}


def _add_transform(linear: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    return output + linear.parscale(args[0]).to(output.dtype)


def inherit_weight_names(config_class: type[PreTrainedConfig], *model_classes: type[PreTrainedModel]) -> None:
    """Let transformers convert tensor names and layouts of these classes as it does for those that they derive from."""
    stock_config: Any = config_class.__base__
    pairs = [(config_class.model_type, stock_config.model_type)]
    pairs += [(model_class.__name__, model_class.__bases__[-1].__name__) for model_class in model_classes]
    for name, stock_name in pairs:
        conversions = get_checkpoint_conversion_mapping(stock_name)
        if conversions is not None:
            register_checkpoint_conversion_mapping(name, conversions, overwrite=True)


# --- this checkpoint -------------------------------------------------------------------------------------------------


class ParScaleQwen2Config(Qwen2Config):
    """The configuration of Qwen2ForCausalLM and `parscale`, which says how the streams are laid out."""

    model_type = "parscale_qwen2"


class ParScaleQwen2Model(StreamedModel, Qwen2Model):
    """Qwen2Model in parallel streams; `last_hidden_state` is the aggregated one."""

    config_class = ParScaleQwen2Config


class ParScaleQwen2ForCausalLM(StreamedCausalLM, Qwen2ForCausalLM):
    """The LM head over [`ParScaleQwen2Model`]."""

    config_class = ParScaleQwen2Config
    streamed_class = ParScaleQwen2Model


inherit_weight_names(ParScaleQwen2Config, ParScaleQwen2Model, ParScaleQwen2ForCausalLM)
