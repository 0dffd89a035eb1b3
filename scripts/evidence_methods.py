"""The ways of training that the evidence runs compare, each as a module that gives logits and an optimizer's groups."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from parscale_adapt import ParScaleConfig, parameter_groups
from parscale_adapt.core.prefix import ReparameterizedPrefix, StreamPrefix


BACKBONE, PREFIX_TUNING, LORA, PARSCALE, FULL = "backbone", "prefix_tuning", "lora", "parscale", "full"
METHODS = (BACKBONE, PREFIX_TUNING, LORA, PARSCALE, FULL)
SHARED_LORA_RANK = 8
STREAM_LORA_RANK = 2  # with P=4, about as many parameters as 48 prefix tokens per stream


@dataclass(frozen=True)
class Rates:
    """Peak learning rate of each part; None where there is no such part."""

    prefix: float | None = None
    aggregator: float | None = None
    lora: float | None = None
    backbone: float | None = None

    def given(self) -> dict[str, float]:
        """Those that are set."""
        return {name: rate for name, rate in dataclasses.asdict(self).items() if rate is not None}


@dataclass(frozen=True)
class Experiment:
    """One way of training SmolLM2; a row of the table is an experiment with a seed.

    Attributes:
        name: of the experiment, unique in the table.
        method: one of [`METHODS`]. `prefix_tuning` has one stream with the prefix tokens of all `num_streams`.
        num_streams: P.
        transforms: what makes the streams differ.
        start: of the prefixes.
        smoothing: of the aggregator.
        lora_rank: of a LoRA on all linear layers (shared by the streams, if there are any); 0 for none.
        diversity_weight: of the decorrelation between streams.
        rates: peak learning rates.
        steps: optimizer steps.
    """

    name: str
    method: str
    num_streams: int = 1
    transforms: tuple[str, ...] = ("prefix",)
    start: str = "tokens"
    smoothing: float = 0.1
    lora_rank: int = 0
    diversity_weight: float = 0.0
    rates: Rates = field(default_factory=Rates)
    steps: int = 64

    @property
    def is_sweep(self) -> bool:
        """Whether it only helps to choose a learning rate."""
        return self.name.startswith("sweep/")


def build(experiment: Experiment, backbone: PreTrainedModel) -> nn.Module:
    """What is trained, from a backbone of its own, which it changes."""
    if experiment.method == BACKBONE or (experiment.method == FULL and experiment.num_streams == 1):
        return backbone
    if experiment.method == LORA:
        return get_peft_model(backbone, shared_lora(experiment.lora_rank))
    if experiment.method == PREFIX_TUNING:
        streams = get_peft_model(backbone, _stream_config(dataclasses.replace(experiment, lora_rank=0)))
        return PrefixTuning(streams, experiment.lora_rank)
    return get_peft_model(backbone, _stream_config(experiment))


def shared_lora(rank: int) -> LoraConfig:
    """LoRA on all linear layers with alpha = 2 * rank, the usual choice."""
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def _stream_config(experiment: Experiment) -> ParScaleConfig:
    fields: dict[str, Any] = {"stream_transform": list(experiment.transforms)}
    if len(experiment.transforms) == 1:
        fields["stream_transform"] = experiment.transforms[0]
    if "prefix" in experiment.transforms:
        fields["init_weights"] = experiment.start
    if "lora" in experiment.transforms:
        fields |= {"stream_lora_rank": STREAM_LORA_RANK, "stream_lora_alpha": 2.0 * STREAM_LORA_RANK}
    if experiment.lora_rank:
        fields["lora"] = shared_lora(experiment.lora_rank)
    return ParScaleConfig(
        num_streams=experiment.num_streams,
        aggregator_smoothing=experiment.smoothing,
        train_backbone=experiment.method == FULL,
        **fields,
    )


def optimizer_groups(experiment: Experiment, model: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups of the experiment's rates; nothing decays."""
    rates = experiment.rates
    if experiment.method == PREFIX_TUNING:
        parts = [(nn.ParameterList([*model.keys, *model.values]), rates.prefix), (model.lora, rates.lora)]
        return [{"params": list(part), "lr": rate} for part, rate in parts if len(part)]
    if experiment.method in (LORA, FULL) and experiment.num_streams == 1:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [{"params": trained, "lr": rates.lora or rates.backbone}]
    return parameter_groups(
        model,
        learning_rate=rates.backbone or rates.prefix,
        prefix_learning_rate=rates.prefix,
        aggregator_learning_rate=rates.aggregator,
        lora_learning_rate=rates.lora,
    )


class PrefixTuning(nn.Module):
    """Prefix tuning (Li and Liang, 2021) with one stream that holds the prefix tokens of all streams of `model`.

    So it has as many prefix parameters as P streams and starts from the same tensors. The prefix goes through the
    backbone's cache, as in PEFT; positions are those of the streams, at which the prefix takes no place.

    Args:
        model: a backbone in streams, which it takes apart.
        lora_rank: of a LoRA beside the prefix; 0 for none.
    """

    def __init__(self, model: nn.Module, lora_rank: int = 0):
        super().__init__()
        prefixes = [module for module in model.modules() if isinstance(module, StreamPrefix | ReparameterizedPrefix)]
        with torch.no_grad():
            tensors = [_as_one_stream(module(torch.float32)) for module in prefixes]
        self.backbone = [model.unload()]  # a list hides it from `parameters`
        self.keys = nn.ParameterList(tensors[0::2])
        self.values = nn.ParameterList(tensors[1::2])
        self.lora = nn.ParameterList()
        if lora_rank:
            adapted = get_peft_model(self.backbone[0], shared_lora(lora_rank))
            self.backbone = [adapted]
            self.lora.extend(parameter for parameter in adapted.parameters() if parameter.requires_grad)

    def forward(self, input_ids: torch.Tensor) -> Any:
        """As a causal LM's, for ids `[batch, seq_len]` without a cache."""
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(self.keys, self.values)):
            rows = (len(input_ids), -1, -1, -1)
            cache.update(keys.expand(rows), values.expand(rows), layer)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        return self.backbone[0](input_ids=input_ids, past_key_values=cache, position_ids=positions)


def _as_one_stream(prefix: torch.Tensor) -> torch.Tensor:
    """`[P, heads, n, size]` to `[1, heads, P * n, size]`."""
    return prefix.transpose(0, 1).flatten(1, 2)[None].contiguous()
