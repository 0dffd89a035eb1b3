"""Attention in which the streams of a token are heads, behind a prefix that lies in the first blocks of the cache.

The idea is that of vLLM's `StaticSinkAttention`: learned keys and values lie in reserved blocks, which stand in front of
every request's block table, so that a request needs no dummy tokens and loses nothing of `max_model_len`. That class
itself can't be used in 0.32: its cache manager reserves no blocks, so that requests overwrite the prefix; a Triton kernel
writes it, which a CPU build lacks; it is written once, so that a cache that is bound later has none; and its builder adds
the length of the prefix to the runner's own lengths.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.transformers import vllm_attention_forward
from vllm.model_executor.utils import set_weight_attrs
from vllm.v1.attention.backend import (
    AttentionBackend,
    CommonAttentionMetadata,
    MultipleOf,
    subclass_attention_backend_with_overrides,
)
from vllm.v1.attention.selector import get_attn_backend
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, SinkFullAttentionSpec, get_kv_quant_mode
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from .core.layout import UniformLayout
from .core.prefix import StreamPrefix


logger = logging.getLogger("vllm.parscale")

STREAM_ATTENTION = "parscale_vllm"
_FIRST_BLOCK = 1  # of the prefix; block 0 is vLLM's null block


@dataclass(frozen=True, kw_only=True)
class PrefixedSpec(SinkFullAttentionSpec):
    """The cache of a layer with a prefix of `sink_len` tokens."""

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Of one request of the greatest length and the prefix."""
        return super().max_memory_usage_bytes(vllm_config) + self.num_prefix_blocks * self.page_size_bytes

    @property
    def num_prefix_blocks(self) -> int:
        assert self.sink_len is not None
        return self.sink_len // self.block_size


class PrefixedManager(FullAttentionManager):
    """Gives requests all blocks but those of the prefix."""

    def __init__(self, kv_cache_spec: PrefixedSpec, block_pool: Any, **kwargs: Any):
        super().__init__(kv_cache_spec, block_pool=block_pool, **kwargs)
        num_blocks = kv_cache_spec.num_prefix_blocks
        reserved = block_pool.free_block_queue.popleft_n(num_blocks)
        if [block.block_id for block in reserved] != list(range(_FIRST_BLOCK, _FIRST_BLOCK + num_blocks)):
            raise RuntimeError("The first blocks of the cache are taken, so that the prefix has no place.")
        # The pool counts what is in use from this number, and resets only when that is nothing.
        block_pool.num_gpu_blocks -= num_blocks
        logger.info(
            "The cache has room for %d tokens in all streams, behind a prefix of %d. (vLLM's own line counts the prefix once "
            "for every request.)",
            block_pool.get_num_free_blocks() * self.block_size,
            kv_cache_spec.sink_len,
        )


# The registry fills itself with vLLM's own kinds only while it is empty.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(PrefixedSpec, PrefixedManager, uniform_type_base_spec=FullAttentionSpec)


@lru_cache
def prefixed_backend(backend: type[AttentionBackend], num_prefix_tokens: int) -> type[AttentionBackend]:
    """An attention backend whose requests begin with the blocks of the prefix.

    Raises:
        ValueError: keys and values can be written into its cache only together with attention.
    """
    if backend.forward_includes_kv_cache_update:
        raise ValueError(
            f"The attention backend must be one that writes keys apart from attending, such as FLASH_ATTN, got "
            f"{backend.get_name()}: choose another with --attention-backend."
        )
    underlying: Any = backend.get_builder_cls()

    class PrefixedBuilder(underlying):
        """Puts the prefix in front of block tables and lengths, in tensors of its own, at addresses that stay."""

        _tables: torch.Tensor | None = None

        def build(
            self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, *args: Any, **kwargs: Any
        ) -> Any:
            return super().build(common_prefix_len, self._with_prefix(common_attn_metadata), *args, **kwargs)

        def _with_prefix(self, batch: CommonAttentionMetadata) -> CommonAttentionMetadata:
            tables, lengths = batch.block_table_tensor, batch.seq_lens
            num_blocks = num_prefix_tokens // self.kv_cache_spec.block_size
            width = num_blocks + tables.shape[1]
            if self._tables is None or len(self._tables) < len(tables) or self._tables.shape[1] != width:
                num_rows = max(len(tables), self.vllm_config.scheduler_config.max_num_seqs)
                self._tables = tables.new_zeros(num_rows, width)
                # Where the cache's blocks are split into smaller ones, block 1 begins at a higher one.
                split = self.vllm_config.cache_config.block_size // self.kv_cache_spec.block_size
                first = _FIRST_BLOCK * split
                self._tables[:, :num_blocks] = torch.arange(first, first + num_blocks, device=tables.device)
                self._lengths = lengths.new_zeros(num_rows)
            own_tables, own_lengths = self._tables[: len(tables)], self._lengths[: len(lengths)]
            own_tables[:, num_blocks:] = tables
            own_lengths.copy_(torch.where(lengths > 0, lengths + num_prefix_tokens, 0))
            bound = batch.seq_lens_cpu_upper_bound
            return batch.replace(
                block_table_tensor=own_tables,
                seq_lens=own_lengths,
                seq_lens_cpu_upper_bound=None if bound is None else bound + num_prefix_tokens * (bound > 0),
                max_seq_len=batch.max_seq_len + num_prefix_tokens,
            )

    return subclass_attention_backend_with_overrides(
        "Prefixed",
        backend,
        {
            "get_builder_cls": staticmethod(lambda: PrefixedBuilder),
            # The CPU kernels take blocks of 16 too, only slower, but their backend asks for 32.
            "get_supported_kernel_block_sizes": staticmethod(lambda *args, **kwargs: [MultipleOf(16)])
            if backend.get_name() == "CPU_ATTN"
            else backend.get_supported_kernel_block_sizes,
        },
    )


class StreamAttention(Attention):
    """The attention of one layer for `P` times its heads, with its prefix.

    Args:
        num_heads, num_kv_heads: of one stream, on this rank.
        num_streams: `P`.
        num_prefix_tokens: `n`.
        kwargs: as [`Attention`] takes them.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        *,
        num_streams: int,
        num_prefix_tokens: int,
        head_size: int,
        cache_config: Any = None,
        **kwargs: Any,
    ):
        cache_dtype = "auto" if cache_config is None else cache_config.cache_dtype
        backend = get_attn_backend(head_size, torch.get_default_dtype(), cache_dtype)
        super().__init__(
            num_heads=num_streams * num_heads,
            num_kv_heads=num_streams * num_kv_heads,
            head_size=head_size,
            cache_config=cache_config,
            attn_backend=prefixed_backend(backend, num_prefix_tokens),
            **kwargs,
        )
        self.vllm_config = get_current_vllm_config()
        self.layout = UniformLayout(num_streams)
        self.num_prefix_tokens = num_prefix_tokens
        self.on_bound: Callable[[], None] = lambda: None
        shape = (num_streams, num_kv_heads, num_prefix_tokens, head_size)
        self.prefix_k, self.prefix_v = _sharded_prefix(shape), _sharded_prefix(shape)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> PrefixedSpec:
        """All layers have full attention, so that they share one kind of cache and its blocks."""
        return PrefixedSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            head_size_v=self.head_size_v,
            sink_len=self.num_prefix_tokens,
            dtype=self.kv_cache_torch_dtype,
            kv_quant_mode=get_kv_quant_mode(self.kv_cache_dtype),
        )

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """As vLLM calls it for every cache that it allocates, one for profiling included."""
        super().bind_kv_cache(kv_cache)
        if kv_cache.numel():
            self.on_bound()

    @property
    def block_size(self) -> int:
        """Of the cache as the scheduler counts it."""
        return self.vllm_config.cache_config.block_size

    @property
    def first_free_block(self) -> int:
        """The first one that requests may take."""
        return _FIRST_BLOCK + self.num_prefix_tokens // self.block_size

    @property
    def num_slots(self) -> int:
        """Tokens of the bound cache."""
        return self.kv_cache.numel() // (self.num_kv_heads * (self.head_size + self.head_size_v))

    @property
    def has_room(self) -> bool:
        """Whether the bound cache holds the prefix and a block; one for profiling may be smaller."""
        return self.num_slots > self.first_free_block * self.block_size

    @torch.no_grad()
    def write_prefix(self, empty: bool = False) -> None:
        """Write the prefix, or an empty one of zeros, into its blocks of the bound cache."""
        dtype, device = self.kv_cache_torch_dtype, self.kv_cache.device
        key, value = (
            # `[P, h, n, d]` to one token of all streams' heads a row
            prefix(dtype).to(device).permute(2, 0, 1, 3).flatten(1, 2).contiguous()
            for prefix in (self.prefix_k, self.prefix_v)
        )
        if empty:
            key, value = torch.zeros_like(key), torch.zeros_like(value)
        first = _FIRST_BLOCK * self.block_size
        slots = torch.arange(first, first + self.num_prefix_tokens, device=device)
        self.impl.do_kv_cache_update(self, key, value, self.kv_cache, slots)


def _sharded_prefix(shape: tuple[int, int, int, int]) -> StreamPrefix:
    """A prefix of the heads of this rank, kept in float32 as in the export."""
    with torch.device("cpu"):
        prefix = StreamPrefix(shape).float()
    prefix.weight.requires_grad_(False)
    set_weight_attrs(prefix.weight, {"weight_loader": load_heads})
    return prefix


def load_heads(parameter: torch.nn.Parameter, whole: torch.Tensor) -> None:
    """Take this rank's key-value heads from `[P, h, n, d]`; where there are more ranks than heads, each head is on several."""
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    rank, num_ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    num_heads, num_all = parameter.shape[1], whole.shape[1]
    ranks_per_head = max(1, num_ranks // num_all)
    default_weight_loader(parameter, whole.narrow(1, rank // ranks_per_head * num_heads, num_heads))


def attend_in_streams(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: `query` `[P, heads, T, d]`, one row per stream, to `[P, T, heads, d]`."""
    layout = module.attn.layout
    query, key, value = (layout.to_heads(states) for states in (query, key, value))
    output, _ = vllm_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return layout.output_to_rows(output.view(1, query.shape[2], query.shape[1], -1)), None


ALL_ATTENTION_FUNCTIONS.register(STREAM_ATTENTION, attend_in_streams)
