"""How many parameters a backbone and its ParScale adapter have, embeddings not counted (the N of the scaling law)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Qwen2Shape:
    """A Qwen2-type backbone, the kind that the paper trains.

    Attributes:
        hidden_size: width of the residual stream.
        intermediate_size: inner width of the gated MLP.
        num_layers: decoder layers.
        num_heads: query heads; a head has hidden_size / num_heads channels.
        num_key_value_heads: heads of keys and values.
        vocab_size: rows of the embedding, which the output layer shares.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int = 36
    num_heads: int = 16
    num_key_value_heads: int = 2
    vocab_size: int = 151936

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"`{name}` of a backbone must be at least 1, got {value}")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"`hidden_size` must be a multiple of `num_heads`, got {self.hidden_size} and {self.num_heads}"
            )

    @property
    def key_value_size(self) -> int:
        """Width of one token's keys in one layer."""
        return self.num_key_value_heads * self.hidden_size // self.num_heads


# The six sizes of the paper's section 3.2, by the names of its figures; N without embeddings gives the names.
PAPER_SHAPES = {
    "0.5B": Qwen2Shape(896, 4864),
    "0.7B": Qwen2Shape(1024, 5504),
    "1.1B": Qwen2Shape(1280, 6912),
    "1.6B": Qwen2Shape(1536, 8320),
    "2.8B": Qwen2Shape(2048, 11008),
    "4.4B": Qwen2Shape(2560, 13824),
}
PAPER_PREFIX_TOKENS = 48


def backbone_parameters(shape: Qwen2Shape) -> int:
    """Non-embedding parameters of the backbone: projections, query-key-value biases, gated MLP, norms."""
    hidden, key_value = shape.hidden_size, shape.key_value_size
    attention = 2 * hidden * hidden + hidden + 2 * (hidden * key_value + key_value)
    mlp = 3 * hidden * shape.intermediate_size
    norms = 2 * hidden
    return shape.num_layers * (attention + mlp + norms) + hidden


def adapter_parameters(
    *,
    num_layers: int,
    hidden_size: int,
    key_value_size: int,
    num_streams: int,
    num_prefix_tokens: int = PAPER_PREFIX_TOKENS,
) -> int:
    """Parameters that ParScale adds: prefix keys and values in every layer, and the aggregator.

    `key_value_size` is the width of one token's keys in one layer: key-value heads times channels of a head.

    The aggregator is Linear(P * hidden, hidden) and Linear(hidden, P), with biases. One stream adds nothing.
    """
    if num_streams < 1 or num_prefix_tokens < 0:
        raise ValueError(
            f"the number of streams must be at least 1 and of prefix tokens at least 0, "
            f"got {num_streams} and {num_prefix_tokens}"
        )
    if num_streams == 1:
        return 0
    prefix = 2 * num_layers * num_streams * num_prefix_tokens * key_value_size
    aggregator = num_streams * hidden_size * hidden_size + hidden_size + hidden_size * num_streams + num_streams
    return prefix + aggregator


def parscale_parameters(shape: Qwen2Shape, num_streams: int, num_prefix_tokens: int = PAPER_PREFIX_TOKENS) -> int:
    """Non-embedding parameters of backbone and adapter together: the N of the paper's tables."""
    return backbone_parameters(shape) + adapter_parameters(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        key_value_size=shape.key_value_size,
        num_streams=num_streams,
        num_prefix_tokens=num_prefix_tokens,
    )
