"""TRL's training arguments with what streams add."""

import math
from dataclasses import dataclass, field

from trl import SFTConfig

from .learning_rates import check_rate, given_rates


@dataclass
class StreamConfig(SFTConfig):
    """[`trl.SFTConfig`] with what [`StreamTrainer`] adds; the recipes' arguments.

    Raises:
        ValueError: a learning rate isn't positive and finite, or the weight of the diversity term is negative.
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

    diversity_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the mean squared correlation between the streams' final hidden states, which is added to "
            "the training loss; the held-out loss is without it."
        },
    )

    def __post_init__(self):
        check_rate("learning_rate", self.learning_rate)
        given_rates(self.prefix_learning_rate, self.aggregator_learning_rate, self.lora_learning_rate)
        if not 0 <= self.diversity_weight < math.inf:
            raise ValueError(
                f"`diversity_weight` must be a finite number of at least 0, got {self.diversity_weight!r}."
            )
        super().__post_init__()
