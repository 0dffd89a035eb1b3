"""Learning rates of their own for streams, aggregator and shared LoRA, as parameter groups of a torch optimizer."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import get_parameter_names

from ..core.aggregator import Aggregator
from ..core.prefix import ReparameterizedPrefix, StreamPrefix
from ..core.transforms import StreamBias, StreamLora
from ..models.qwen2_parscale import Qwen2ParScaleAttention


PREFIX, AGGREGATOR, LORA, BACKBONE = "prefix", "aggregator", "lora", "backbone"
RATE_OPTIONS = tuple(f"{part}_learning_rate" for part in (PREFIX, AGGREGATOR, LORA))  # fields of `StreamConfig`
# What trained best in the sweeps of docs/evidence.md; what streams differ by has one for each kind.
ADVISED_RATES = {AGGREGATOR: 3e-4, LORA: 1e-3, BACKBONE: 3e-5}
_ADVISED_FOR_PREFIXES = 1e-2
_ADVISED_BESIDE_OTHERS = 3e-3  # prefixes beside any LoRA, and reparameterized ones
_ADVISED_FOR_LOW_RANK = 2e-3  # each stream's own LoRA, or biases
_LOOKED_FOR = {
    PREFIX: "prefix, LoRA or bias of a stream",
    AGGREGATOR: "aggregator with parameters",
    LORA: "shared LoRA",
}
_NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]  # as in transformers


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    prefix_learning_rate: float | None = None,
    aggregator_learning_rate: float | None = None,
    lora_learning_rate: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimizer, with a learning rate for each part of a model in streams.

        optimizer = torch.optim.AdamW(parameter_groups(model, learning_rate=1e-3, prefix_learning_rate=1e-2))
        trainer = DPOTrainer(model, ..., optimizers=(optimizer, None))

    Schedulers multiply the rate of every group by the same factor, so that their ratios stay. Biases and norms have no
    weight decay, as in transformers. Every group names its `part`, which the optimizer keeps and saves: `prefix`,
    `aggregator`, `lora` or `backbone`.

    Args:
        model: with at least one parameter that is trained; only those get into a group.
        learning_rate: of all that has no rate of its own.
        prefix_learning_rate: of what the streams differ by: their prefixes, or each one's own LoRA or biases.
        aggregator_learning_rate: of the aggregator.
        lora_learning_rate: of the LoRA that all streams share.
        weight_decay: as in [`torch.optim.AdamW`].

    Raises:
        ValueError: a rate isn't positive and finite, or there is nothing that it could train.
    """
    check_rate("learning_rate", learning_rate)
    rates = given_rates(prefix_learning_rate, aggregator_learning_rate, lora_learning_rate)
    decaying = set(get_parameter_names(model, [nn.LayerNorm], _NO_DECAY))
    groups = [
        {
            "params": [p for name, p in model.named_parameters() if p.requires_grad and (name in decaying) == decays],
            "lr": learning_rate,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for decays in (True, False)
    ]
    return split_by_part(groups, model, rates)


def given_rates(prefix: float | None, aggregator: float | None, lora: float | None) -> dict[str, float]:
    """The rate of each part that was given one.

    Raises:
        ValueError: one isn't positive and finite.
    """
    rates = {
        part: rate for part, rate in ((PREFIX, prefix), (AGGREGATOR, aggregator), (LORA, lora)) if rate is not None
    }
    for part, rate in rates.items():
        check_rate(f"{part}_learning_rate", rate)
    return rates


def advised_rates(model: nn.Module) -> dict[str, float]:
    """The rate of each part of `model` that is trained, by the sweeps of docs/evidence.md on SmolLM2-135M.

    They were measured with a frozen backbone, started from tokens, and with the whole backbone in one stream. Biases
    were not: they have the rate of a stream's own LoRA.
    """
    owners = _parts(model)
    trained = {owners.get(id(p), BACKBONE) for p in model.parameters() if p.requires_grad}
    return {part: ADVISED_RATES[part] if part != PREFIX else _advised_for_streams(model) for part in sorted(trained)}


def _advised_for_streams(model: nn.Module) -> float:
    modules = list(model.modules())
    has_prefixes = any(isinstance(module, StreamPrefix | Qwen2ParScaleAttention) for module in modules)
    has_reparameterized = any(isinstance(module, ReparameterizedPrefix) for module in modules)
    if not has_prefixes and not has_reparameterized:
        return _ADVISED_FOR_LOW_RANK
    if has_reparameterized or any(isinstance(module, StreamLora | StreamBias | LoraLayer) for module in modules):
        return _ADVISED_BESIDE_OTHERS
    return _ADVISED_FOR_PREFIXES


def check_rate(name: str, rate: float) -> None:
    """Raise ValueError unless a learning rate is positive and finite."""
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
        raise ValueError(f"`{name}` must be a positive, finite number, got {rate!r}.")


def refuse_idle_rates(model: nn.Module, rates: Mapping[str, float]) -> None:
    """Refuse the rate of a part that isn't trained.

    Raises:
        ValueError: the model has no such part, or it is frozen.
    """
    owners = _parts(model)
    trained = {owners.get(id(p), BACKBONE) for p in model.parameters() if p.requires_grad}
    for part, rate in rates.items():
        if part not in trained:
            raise ValueError(
                f"`{part}_learning_rate` is {rate}, but no {_LOOKED_FOR[part]} is trained in this model, only "
                f"{', '.join(sorted(trained)) or 'nothing'}: leave it out."
            )


def split_by_part(
    groups: Iterable[Mapping[str, Any]], model: nn.Module, rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Split each group of an optimizer by the parts of the model, and give the parts in `rates` theirs.

    The groups of parts without a rate of their own come first: what trainers log as `learning_rate` is that of the first.

    Raises:
        ValueError: a rate is given for a part that isn't trained.
    """
    refuse_idle_rates(model, rates)
    owners = _parts(model)
    split = []
    for group in groups:
        by_part: dict[str, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_part.setdefault(owners.get(id(parameter), BACKBONE), []).append(parameter)
        for part, parameters in by_part.items():
            own_rate = {"lr": rates[part]} if part in rates else {}
            split.append({**group, "params": parameters, "part": part, **own_rate})
    return sorted(split, key=lambda group: group["part"] in rates)


def set_rates(optimizer: torch.optim.Optimizer, model: nn.Module, rates: Mapping[str, float]) -> None:
    """Split the groups of an optimizer that has not begun.

    Raises:
        ValueError: a rate is given for a part that isn't trained, or the optimizer can't hold several rates.
    """
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    groups = split_by_part(optimizer.param_groups, model, rates)
    if held == trained:
        optimizer.param_groups[:] = groups
    if [group.get("part") for group in optimizer.param_groups] != [group["part"] for group in groups]:
        raise ValueError(
            f"{type(optimizer).__name__} holds its parameters in a way of its own and can't give "
            f"{', '.join(f'`{part}_learning_rate`' for part in rates)} to a part of them: choose another --optim."
        )


def rates_by_part(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The current rate of each part, by the names that the log has; nothing where the groups name no part."""
    groups = [group for group in optimizer.param_groups if "part" in group]
    return {f"learning_rate/{group['part']}": float(group["lr"]) for group in groups}


class LearningRatesCallback(TrainerCallback):
    """Adds `learning_rate/<part>`, the rates of the latest step, to the training log of groups that name their parts."""

    def __init__(self) -> None:
        self._rates: dict[str, float] = {}

    @classmethod
    def add_to(cls, trainer: Trainer) -> None:
        """Put a new callback in front of all others of `trainer`, so that trackers see what it logs."""
        trainer.callback_handler.callbacks.insert(0, cls())

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._rates = rates_by_part(kwargs["optimizer"])

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is not None and "loss" in logs:
            logs.update(self._rates)
            state.log_history[-1].update(self._rates)


def _parts(model: nn.Module) -> dict[int, str]:
    """The part of each parameter, by its identity; what is missing belongs to the backbone."""
    return {id(parameter): part for part, parameter in _owned_parameters(model)}


def _owned_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for module in model.modules():
        if isinstance(module, Aggregator):
            yield from ((AGGREGATOR, parameter) for parameter in module.parameters())
        elif isinstance(module, StreamPrefix | ReparameterizedPrefix | StreamLora | StreamBias):
            yield from ((PREFIX, parameter) for parameter in module.parameters())
        elif isinstance(module, Qwen2ParScaleAttention):
            yield from ((PREFIX, parameter) for parameter in (module.prefix_k, module.prefix_v))
        elif isinstance(module, LoraLayer):
            containers = (getattr(module, name) for name in module.adapter_layer_names if hasattr(module, name))
            yield from ((LORA, parameter) for container in containers for parameter in container.parameters())
