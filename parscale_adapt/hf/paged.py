"""Continuous batching: a paged cache that has room for the heads of all streams."""

import copy
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import transformers
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel

from ..version import TESTED_TRANSFORMERS
from .cache import claim_pages
from .config_view import stock_config
from .stream_call import STREAMS_ATTRIBUTE


def init_continuous_batching(
    model: PreTrainedModel,
    generation_config: GenerationConfig | None = None,
    continuous_batching_config: Any = None,
    **kwargs: Any,
) -> Any:
    """transformers' method of the same name, for a causal LM whose decoder runs streams.

    The manager gets a view of the model whose configuration has `P` times the heads: from it the manager sizes its
    cache.

    Args:
        model: the causal LM.
        generation_config, continuous_batching_config, kwargs: as transformers' own.

    Raises:
        ImportError: this version of transformers batches in another way.
        ValueError: a manager was kept for another adapter; flash attention was chosen for streams with sliding windows;
            or as transformers' own.
    """
    streams = getattr(model.get_decoder(), STREAMS_ATTRIBUTE)
    stock, config_class = _stock_method_and_config()
    kept = getattr(model, "_cached_continuous_batching_manager", None)
    if kept is not None:
        claim_pages(kept.batch_processor.cache, streams.cache_owner)
        return stock(kept.model)
    if streams.running.layout.num_streams == 1:
        return stock(model, generation_config, continuous_batching_config, **kwargs)
    continuous_batching_config = copy.copy(continuous_batching_config or config_class())
    # Flash attention's decoding path writes into the pages itself, where a prefix can't be put in front.
    continuous_batching_config.max_blocks_per_request = 0
    if streams.running.num_prefix_tokens > 0 and _has_sliding_windows(model.config.get_text_config()):
        _refuse_flash_attention(model)
        continuous_batching_config.auto_switch_to_flash = False
    sized = _view_with_heads_of_streams(model, streams.running.layout.num_streams)
    return stock(sized, generation_config, continuous_batching_config, **kwargs)


def _stock_method_and_config() -> tuple[Callable, type]:
    """Looked up at the call, so that a version of transformers without them runs everything else."""
    try:
        from transformers import ContinuousBatchingConfig

        return GenerationMixin.init_continuous_batching, ContinuousBatchingConfig
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"Continuous batching in streams needs transformers {TESTED_TRANSFORMERS}, got {transformers.__version__}, "
            f"which has it under other names ({error}): use `generate`, or install a version in that range."
        ) from error


def _has_sliding_windows(config: PreTrainedConfig) -> bool:
    """Whether the paged cache has layers with a window; it goes by the types of layers, or else by the window."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return getattr(config, "sliding_window", None) is not None
    return "sliding_attention" in layer_types


def _refuse_flash_attention(model: PreTrainedModel) -> None:
    name = model.config._attn_implementation
    if name.startswith("flash"):
        raise ValueError(
            f"Continuous batching can't run streams through the sliding windows of {type(model).__name__} under "
            f'{name}, which shows no prefix behind a window: call `set_attn_implementation("sdpa")` first.'
        )


@lru_cache
def _sized_class(model_class: type) -> type:
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
    view: Any = object.__new__(_sized_class(model_class))
    view.__dict__ = model.__dict__
    object.__setattr__(view, "config", config)
    return view
