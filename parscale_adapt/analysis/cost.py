"""Memory and latency of generating with P parallel streams: the formulas behind the paper's figure 4.

The paper's cost script takes its formulas from llm-analysis, itself after Korthikanti et al. (arXiv 2205.05198), and
corrects three things for ParScale. A forward pass of `rows` sequences of `length` tokens takes, for each layer's
attention and MLP, the larger of the time of its arithmetic and the time to move its weights and activations; norms,
embedding and output layer are added. Streams are extra rows, prefix tokens extra positions; the streams share the
embedding and the output layer. `docs/analysis.md` lists what these published formulas leave out.
"""

from dataclasses import dataclass

from .backbone_shape import BackboneShape
from .devices import Device
from .parameter_count import PAPER_PREFIX_TOKENS


GIB = 2**30


@dataclass(frozen=True)
class Precision:
    """Bytes per number; arithmetic runs at the rate of the activations' type."""

    weight_bytes: float
    activation_bytes: float

    @property
    def is_float32(self) -> bool:
        """Whether arithmetic runs at the 32-bit rate."""
        return self.activation_bytes == 4


# int8 and int4 mean quantised weights under 16-bit activations; embeddings and adapter stay in 16 bits.
PRECISIONS = {
    "bfloat16": Precision(2, 2),
    "float16": Precision(2, 2),
    "float32": Precision(4, 4),
    "int8": Precision(1, 2),
    "int4": Precision(0.5, 2),
}


@dataclass(frozen=True)
class Workload:
    """One batch to generate: rows, and tokens read and written by each row."""

    batch_size: int
    input_len: int
    output_len: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")


@dataclass(frozen=True)
class Cost:
    """Peak memory in bytes and time in seconds, by what causes them.

    `prefix_bytes` is what the prefix tokens occupy in the KV cache of every row; `kv_cache_bytes` is the rest of it.
    """

    weight_bytes: float
    kv_cache_bytes: float
    prefix_bytes: float
    aggregator_bytes: float
    activation_bytes: float
    prefill_seconds: float
    decode_seconds: float
    aggregator_seconds: float

    @property
    def memory_gib(self) -> float:
        """All memory, in GiB."""
        parts = (
            self.weight_bytes,
            self.kv_cache_bytes,
            self.prefix_bytes,
            self.aggregator_bytes,
            self.activation_bytes,
        )
        return sum(parts) / GIB

    @property
    def latency_seconds(self) -> float:
        """All time for the batch, in seconds."""
        return self.prefill_seconds + self.decode_seconds + self.aggregator_seconds


@dataclass(frozen=True)
class CostModel:
    """A backbone on a device.

    Attributes:
        shape: the backbone.
        device: where it runs.
        precision: bytes per number.
        num_prefix_tokens: prefix tokens of every stream when P > 1.
        flops_efficiency: share of peak arithmetic that is reached (the paper uses 0.7).
        bandwidth_efficiency: share of the memory bandwidth that is reached (the paper uses 0.9).
    """

    shape: BackboneShape
    device: Device
    precision: Precision = PRECISIONS["bfloat16"]
    num_prefix_tokens: int = PAPER_PREFIX_TOKENS
    flops_efficiency: float = 0.7
    bandwidth_efficiency: float = 0.9

    def __post_init__(self) -> None:
        for name in ("flops_efficiency", "bandwidth_efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is a share between 0 and 1, got {getattr(self, name)}")
        if self.num_prefix_tokens < 0:
            raise ValueError(f"`num_prefix_tokens` must be at least 0, got {self.num_prefix_tokens}")

    def estimate(self, workload: Workload, num_streams: int) -> Cost:
        """Memory and time of one workload with P streams."""
        if num_streams < 1:
            raise ValueError(f"the number of streams must be at least 1, got {num_streams}")
        shape, batch = self.shape, workload.batch_size
        rows = batch * num_streams
        prefix = self.num_prefix_tokens if num_streams > 1 else 0
        prompt = workload.input_len + prefix
        token_bytes = 2 * shape.num_layers * shape.key_value_size * self.precision.activation_bytes
        cache_bytes = rows * (prompt + workload.output_len) * token_bytes
        # The cost script has no bias and no second layer here; they are below a hundredth of a percent.
        aggregator = (shape.hidden_size + 1) * shape.hidden_size * num_streams if num_streams > 1 else 0.0
        decode_step = self._forward_seconds(rows, 1, output_rows=batch) + self._transfer_seconds(2 * cache_bytes)
        # Prompt tokens go through the shared output layer once, prefix positions once per stream.
        output_rows = batch * workload.input_len + rows * prefix
        generated = batch, workload.input_len + workload.output_len
        return Cost(
            weight_bytes=self._weight_bytes(),
            kv_cache_bytes=cache_bytes - rows * prefix * token_bytes,
            prefix_bytes=rows * prefix * token_bytes,
            aggregator_bytes=aggregator * self.precision.activation_bytes,
            activation_bytes=max(self._layer_activation_bytes(rows, prompt), self._logit_bytes(batch * prompt)),
            prefill_seconds=self._forward_seconds(rows, prompt, output_rows),
            decode_seconds=workload.output_len * decode_step,
            aggregator_seconds=aggregator / shape.mlp_weights * self._mlp_seconds(*generated),
        )

    def fits(self, cost: Cost) -> bool:
        """Whether the device has the memory."""
        return cost.memory_gib * GIB <= self.device.memory * 1e9

    def _weight_bytes(self) -> float:
        shape = self.shape
        layer = shape.attention_weights + shape.mlp_weights + shape.vector_weights
        inner = (shape.num_layers * layer + shape.final_weights) * self.precision.weight_bytes
        return inner + shape.embedding_weights * self.precision.activation_bytes

    def _attention_activation_bytes(self, rows: int, length: int) -> float:
        """Queries, keys and values, all counted as wide as the queries; flash attention needs less beside them."""
        return 3 * rows * length * self.shape.query_size * self.precision.activation_bytes

    def _mlp_activation_bytes(self, rows: int, length: int) -> float:
        width = max(self.shape.hidden_size, self.shape.intermediate_size)
        return rows * length * width * self.precision.activation_bytes

    def _layer_activation_bytes(self, rows: int, length: int) -> float:
        return max(self._attention_activation_bytes(rows, length), self._mlp_activation_bytes(rows, length))

    def _logit_bytes(self, tokens: int) -> float:
        return self.shape.vocab_size * tokens * self.precision.activation_bytes

    def _forward_seconds(self, rows: int, length: int, output_rows: int) -> float:
        """One forward pass; `output_rows` tokens of it go through the output layer."""
        shape = self.shape
        layer = (
            self._attention_seconds(rows, length)
            + self._mlp_seconds(rows, length)
            + 2 * self._norm_seconds(rows * length)
        )
        embedding = self._transfer_seconds(shape.vocab_size * shape.hidden_size * self.precision.activation_bytes)
        output = self._arithmetic_seconds(2 * output_rows * shape.vocab_size * shape.hidden_size)
        return shape.num_layers * layer + embedding + output

    def _attention_seconds(self, rows: int, length: int) -> float:
        weights, tokens = self.shape.attention_weights, rows * length
        scores = 4 * tokens * length * self.shape.query_size
        moved = weights * self.precision.weight_bytes + self._attention_activation_bytes(rows, length)
        return max(self._arithmetic_seconds(2 * tokens * weights + scores), self._transfer_seconds(moved))

    def _mlp_seconds(self, rows: int, length: int) -> float:
        weights = self.shape.mlp_weights
        moved = weights * self.precision.weight_bytes + self._mlp_activation_bytes(rows, length)
        return max(self._arithmetic_seconds(2 * rows * length * weights), self._transfer_seconds(moved))

    def _norm_seconds(self, tokens: int) -> float:
        """Norms run in 32 bits, whatever the precision: five operations and four bytes per entry."""
        entries = tokens * self.shape.hidden_size
        return max(self._arithmetic_seconds(5 * entries), self._transfer_seconds(4 * entries))

    def _arithmetic_seconds(self, operations: float) -> float:
        peak = self.device.float32_tflops if self.precision.is_float32 else self.device.half_tflops
        return operations / (peak * 1e12 * self.flops_efficiency)

    def _transfer_seconds(self, num_bytes: float) -> float:
        return num_bytes / (self.device.bandwidth * 1e9 * self.bandwidth_efficiency)
