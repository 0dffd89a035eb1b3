"""TRL's training arguments with what streams add."""

import math
from dataclasses import dataclass, field

from trl import DPOConfig, RewardConfig, SFTConfig

from .learning_rates import ADVISED_RATES, BACKBONE, check_rate, given_rates


@dataclass
class StreamOptions:
    """What [`StreamTraining`] adds to the arguments of a trainer; stands before one of TRL's configurations.

    Raises:
        ValueError: a learning rate isn't positive and finite.
    """

    prefix_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of what the streams differ by, prefixes or each one's own LoRA or biases; by default "
            "--learning_rate."
        },
    )
    aggregator_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the aggregator; by default --learning_rate."}
    )
    lora_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the LoRA that all streams share; by default --learning_rate."},
    )
    restart_optimizer: bool = field(
        default=False,
        metadata={
            "help": "With --resume_from_checkpoint: go on from the weights and the step of a checkpoint with a new optimizer "
            "and new random numbers, where its own are lost or not wanted."
        },
    )

    def __post_init__(self):
        check_rate("learning_rate", self.learning_rate)  # type: ignore[attr-defined]
        given_rates(self.prefix_learning_rate, self.aggregator_learning_rate, self.lora_learning_rate)
        super().__post_init__()  # type: ignore[misc]


@dataclass
class StreamConfig(StreamOptions, SFTConfig):
    """[`trl.SFTConfig`] with what [`StreamTrainer`] adds; arguments of `cpt.py` and `sft.py`.

    Attributes:
        advises_rates: whether no `learning_rate` was given, so that each part without a rate has that of `advised_rates`.

    Raises:
        ValueError: a learning rate isn't positive and finite, or the weight of the diversity term is negative.
    """

    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Peak learning rate of every part without one of its own; without it, each part has the one that "
            "docs/training.md advises for it."
        },
    )
    advises_rates: bool = field(default=False, init=False)
    diversity_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the mean squared correlation between the streams' final hidden states, which is added to "
            "the training loss; the held-out loss is without it."
        },
    )

    def __post_init__(self):
        if not 0 <= self.diversity_weight < math.inf:
            raise ValueError(
                f"`diversity_weight` must be a finite number of at least 0, got {self.diversity_weight!r}."
            )
        self.advises_rates = self.learning_rate is None
        if self.advises_rates:
            self.learning_rate = ADVISED_RATES[BACKBONE]
        super().__post_init__()


@dataclass
class StreamDPOConfig(StreamOptions, DPOConfig):
    """[`trl.DPOConfig`] with what [`StreamTraining`] adds; arguments of `dpo.py`."""


@dataclass
class StreamRewardConfig(StreamOptions, RewardConfig):
    """[`trl.RewardConfig`] with what [`StreamTraining`] adds; arguments of `reward.py`."""


RecipeConfig = SFTConfig | DPOConfig | RewardConfig
"""The arguments of TRL's trainers that recipes share."""
