"""Single prompts through a model behind the prefix of its cache, before there are requests."""

from typing import Any

import torch
from vllm.forward_context import set_forward_context
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.utils import select_common_block_size


class ScratchRun:
    """Runs single prompts through a model behind the prefix of its cache.

    `num_tokens` is the length for which the cache has room.
    """

    def __init__(self, model: Any):
        self.model, self.config = model, model.vllm_config
        layer = model.attention_layers[0]
        self.first_slot = layer.first_free_block * self.config.cache_config.block_size
        self.num_tokens = layer.num_slots - self.first_slot
        spec = layer.get_kv_cache_spec(self.config)
        self.block_size = select_common_block_size(spec.block_size, [layer.attn_backend], [spec])
        self.names = [layer.layer_name for layer in model.attention_layers]
        self.device = layer.kv_cache.device
        self.builder = layer.attn_backend.get_builder_cls()(
            spec.copy_with_new_block_size(self.block_size), self.names, self.config, self.device
        )

    def logits(self, tokens: torch.Tensor, num_compared: int) -> dict[str, torch.Tensor | None]:
        """Logits `[num_compared, V]` of the last tokens of a prompt `[T]`, in float32 on the CPU, or None on a rank that
        gets none: `served`, and of the first stream alone, `single`."""
        num_tokens = len(tokens)
        slots = torch.arange(self.first_slot, self.first_slot + num_tokens, device=self.device)
        metadata = self.builder.build(0, self._batch_of_one(num_tokens, slots))
        with set_forward_context(
            dict.fromkeys(self.names, metadata),
            self.config,
            num_tokens=num_tokens,
            slot_mapping=dict.fromkeys(self.names, slots),
        ):
            positions = torch.arange(num_tokens, device=self.device)
            rows = self.model.rows(self.model.embed_input_ids(tokens.to(self.device)), positions)
        states = {"served": self.model.aggregator(rows)[0], "single": rows[0]}
        return {name: self._logits(hidden[-num_compared:]) for name, hidden in states.items()}

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        logits = self.model.compute_logits(hidden_states)
        return None if logits is None else logits.float().cpu()

    def _batch_of_one(self, num_tokens: int, slots: torch.Tensor) -> CommonAttentionMetadata:
        first_block = self.first_slot // self.block_size
        blocks = torch.arange(first_block, first_block + cdiv(num_tokens, self.block_size), dtype=torch.int32)
        starts, lengths = (torch.tensor(values, dtype=torch.int32) for values in ([0, num_tokens], [num_tokens]))
        return CommonAttentionMetadata(
            query_start_loc=starts.to(self.device),
            query_start_loc_cpu=starts,
            seq_lens=lengths.to(self.device),
            seq_lens_cpu_upper_bound=lengths,
            num_reqs=1,
            num_actual_tokens=num_tokens,
            max_query_len=num_tokens,
            max_seq_len=num_tokens,
            block_table_tensor=blocks[None].to(self.device),
            slot_mapping=slots,
        )
