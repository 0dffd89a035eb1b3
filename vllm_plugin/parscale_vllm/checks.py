"""What the engine's options must be for streams; vLLM calls this before weights load and before its own defaults."""

import logging
from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from .reference import find_reference


logger = logging.getLogger("vllm.parscale")

_SMALLEST_BLOCK = 16  # of the attention kernels, on CPU and GPU
_BLOCK_SIZES = (128, 64, 32, 16)


class EngineChecks(VerifyAndUpdateConfig):
    """Refuses options that don't go with streams, and sets those that follow from their number."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """As vLLM calls it for the architectures of this plugin.

        Raises:
            ValueError: an option does not go with streams, or the export has no reference.
        """
        streams = vllm_config.model_config.hf_config.parscale
        refuse_options(vllm_config)
        find_reference(vllm_config.model_config)
        set_block_size(vllm_config.cache_config, streams["num_prefix_tokens"])
        divide_token_budget(vllm_config.scheduler_config, streams["num_streams"])


def refuse_options(vllm_config: Any) -> None:
    """Check what would be ignored or give other outputs.

    Raises:
        ValueError: such an option is set.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    problems = {
        "LoRA adapters (--enable-lora)": vllm_config.lora_config is not None,
        "speculative decoding": vllm_config.speculative_config is not None,
        f"quantized weights ({model.quantization})": model.quantization is not None,
        f"a quantized cache ({vllm_config.cache_config.cache_dtype})": vllm_config.cache_config.cache_dtype
        not in ("auto", "float16", "bfloat16", "float32"),
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism": parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
        "sleep mode, which empties the cache that holds the prefixes": model.enable_sleep_mode,
        "transfer of cached keys between engines": vllm_config.kv_transfer_config is not None,
        f"the task {model.runner_type}": model.runner_type != "generate",
    }
    for option, is_set in problems.items():
        if is_set:
            raise ValueError(f"A model in parallel streams can't be served with {option}: leave that option out.")


def set_block_size(cache: Any, num_prefix_tokens: int) -> None:
    """Let the prefix fill whole blocks of the cache.

    Raises:
        ValueError: it can't.
    """
    if num_prefix_tokens % _SMALLEST_BLOCK or num_prefix_tokens == 0:
        raise ValueError(
            f"`num_prefix_tokens` must be a multiple of {_SMALLEST_BLOCK}, such as 16, 32, 48 or 64, to fill whole blocks of "
            f"vLLM's cache, got {num_prefix_tokens}: train streams of such a length, or use `parscale serve`."
        )
    if cache.user_specified_block_size:
        if cache.block_size % _SMALLEST_BLOCK or num_prefix_tokens % cache.block_size:
            fitting = [size for size in range(16, num_prefix_tokens + 1, 16) if num_prefix_tokens % size == 0]
            raise ValueError(
                f"--block-size must be one of {', '.join(map(str, fitting))} to fit a prefix of {num_prefix_tokens} "
                f"tokens, got {cache.block_size}: leave it out."
            )
        return
    cache.block_size = next(size for size in _BLOCK_SIZES if num_prefix_tokens % size == 0)
    cache.user_specified_block_size = True  # or else the platform's default takes its place


def divide_token_budget(scheduler: Any, num_streams: int) -> None:
    """Let a step compute as many rows as it was given tokens: each token is one row per stream."""
    if not scheduler.enable_chunked_prefill:
        return  # a step must hold a whole prompt
    budget = scheduler.max_num_batched_tokens
    scheduler.max_num_batched_tokens = max(budget // num_streams, scheduler.max_num_seqs)
    logger.info(
        "Each token is computed in %d streams: a step takes up to %d tokens instead of %d, and a cached token the room of "
        "%d.",
        num_streams,
        scheduler.max_num_batched_tokens,
        budget,
        num_streams,
    )
