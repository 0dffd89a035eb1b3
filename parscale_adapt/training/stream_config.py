"""TRL's training arguments with what streams add."""

import math
from dataclasses import dataclass, field, fields

from trl import DistillationConfig, DPOConfig, GRPOConfig, RewardConfig, SFTConfig

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


@dataclass
class StreamGRPOConfig(StreamOptions, GRPOConfig):
    """[`trl.GRPOConfig`] with what [`StreamTraining`] adds; arguments of `grpo.py`.

    Raises:
        ValueError: vLLM is to sample answers, too few answers are asked for, or as TRL's.
    """

    def __post_init__(self):
        refuse_vllm(self)
        if self.num_generations is None or self.num_generations < 2:  # TRL divides by it before it looks
            raise ValueError(
                f"`num_generations` must be at least 2 answers to each question, which are compared, got {self.num_generations!r}."
            )
        super().__post_init__()


@dataclass
class StreamDistillationConfig(StreamOptions, DistillationConfig):
    """[`trl.DistillationConfig`] with what [`StreamTraining`] adds; arguments of `distill.py`.

    Raises:
        ValueError: vLLM is to sample answers, or a setting is out of range.
    """

    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "The ParScale adapter that teaches, trained on the same frozen backbone. Without one, on the embedded "
            "backbone, four streams are trained once on its docstrings and kept in --embedded_dir."
        },
    )
    train_on_data: bool = field(
        default=False,
        metadata={
            "help": "Compare teacher and student on the answers of the data, and not on answers that the student samples."
        },
    )
    max_length: int = field(
        default=1024,
        metadata={"help": "Tokens of a question with its answer in the data; longer rows lose their end."},
    )

    def __post_init__(self):
        refuse_vllm(self)
        super().__post_init__()

    @property
    def samples_answers(self) -> bool:
        """Whether the student's own answers are compared."""
        return not self.train_on_data


def refuse_vllm(training: GRPOConfig | DistillationConfig) -> None:
    """Refuse what would fail once an engine is up, what only such an engine reads, and answers without a token.

    Raises:
        ValueError: vLLM is to sample answers, an option of it was given, or answers have no room.
    """
    if training.use_vllm:
        raise ValueError(
            "`use_vllm` can't sample answers in streams, since TRL would merge the adapter into the backbone for it: leave it "
            "out, or use `--use_transformers_continuous_batching true` in grpo.py."
        )
    for option in fields(training):
        if option.name.startswith("vllm_") and getattr(training, option.name) != option.default:
            raise ValueError(f"`{option.name}` has no effect, since vLLM samples no answers in streams: leave it out.")
    if training.max_completion_length is None or training.max_completion_length < 1:
        raise ValueError(f"`max_completion_length` must be at least 1 token, got {training.max_completion_length!r}.")


RecipeConfig = SFTConfig | DPOConfig | RewardConfig | GRPOConfig | DistillationConfig
"""The arguments of TRL's trainers that recipes share."""
