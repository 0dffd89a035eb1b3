"""Continuous batching: a paged cache that has room for the heads of all streams."""

import copy
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.generation.continuous_batching.continuous_api import ContinuousMixin

from .attention import STREAMS_ATTRIBUTE
from .config_view import stock_config


def init_continuous_batching(
    model: PreTrainedModel,
    generation_config: GenerationConfig | None = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    **kwargs: Any,
) -> Any:
    """transformers' method of the same name, for a causal LM whose decoder runs streams.

    The manager gets a shallow copy of the model, on the same modules, whose configuration has `P` times the heads:
    from it the manager sizes its cache.

    Raises:
        ValueError: as transformers' own.
    """
    num_streams = getattr(model.get_decoder(), STREAMS_ATTRIBUTE).layout.num_streams
    stock = ContinuousMixin.init_continuous_batching
    if num_streams == 1:
        return stock(model, generation_config, continuous_batching_config, **kwargs)
    sized = copy.copy(model)
    sized.config = _with_heads_of_streams(model.config, num_streams)
    # Flash attention's decoding path writes into the pages itself, where a prefix can't be put in front.
    continuous_batching_config = copy.copy(continuous_batching_config or ContinuousBatchingConfig())
    continuous_batching_config.max_blocks_per_request = 0
    return stock(sized, generation_config, continuous_batching_config, **kwargs)


def _with_heads_of_streams(config: PreTrainedConfig, num_streams: int) -> PreTrainedConfig:
    config = copy.deepcopy(stock_config(config))
    text_config = config.get_text_config()
    if getattr(text_config, "head_dim", None) is None:
        text_config.head_dim = text_config.hidden_size // text_config.num_attention_heads
    if getattr(text_config, "num_key_value_heads", None) is not None:
        text_config.num_key_value_heads *= num_streams
    text_config.num_attention_heads *= num_streams
    return config
