"""Questions for recipes that answer them as they train: from the hub, from local files, or sums of two digits."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..data import PROMPT_FORMATS, PromptSettings, TokenReport, prepare_prompts, set_chat_template, sums_of_digits
from .arguments import BackboneArguments
from .checks import prepare_training
from .instructions import RowArguments, open_rows
from .rewards import RewardFunction, load_reward_functions, try_reward_functions
from .stream_config import StreamGRPOConfig
from .unused_options import GRPO, refuse_unused_options


_REWARD_OF_SUMS = f"{__package__}.rewards.exact_number"
_NUM_TRIED_ROWS = 2


@dataclass
class PromptArguments(RowArguments):
    """Questions, and what rewards the answers to them."""

    embedded_name: ClassVar[str] = "sums of two digits"
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub dataset, or local file, glob or folder (see docs/data.md). Without one, sums of two digits with "
            "--prompt_format text."
        },
    )
    prompt_format: str = field(
        default="chat",
        metadata={
            "help": "'chat' shows questions in the chat template, 'text' as they are, for backbones that know no chat.",
            "choices": list(PROMPT_FORMATS),
        },
    )
    max_prompt_length: int = field(
        default=512, metadata={"help": "Tokens of a question; longer ones are left out, which is told."}
    )
    reward_functions: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Python functions that reward answers, as package.module.function or path/to/file.py:function; see "
            "parscale_adapt/training/rewards.py. Without data of your own, the exact checker of sums."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.dataset_name is None:
            if self.prompt_format != "text":
                raise ValueError(
                    f"`prompt_format` must be 'text' for the embedded sums, got {self.prompt_format!r}: name data with "
                    "--dataset_name, or say --prompt_format text."
                )
            self.reward_functions = self.reward_functions or [_REWARD_OF_SUMS]
        self.settings()

    def settings(self) -> PromptSettings:
        """How questions are read."""
        return PromptSettings(self.max_prompt_length, self.prompt_field, self.prompt_format)


def prepare_rollout_training(training: StreamGRPOConfig, backbone: BackboneArguments, data: PromptArguments) -> None:
    """Set what GRPO needs in TRL's arguments.

    Raises:
        ValueError: an option was given that would have no effect, or there are not as many weights as rewards.
    """
    refuse_unused_options(training, GRPO)
    weights = training.reward_weights
    if weights is not None and len(weights) != len(data.reward_functions):
        raise ValueError(
            f"`reward_weights` has {len(weights)} weights for {len(data.reward_functions)} reward functions: give one for each."
        )
    if training.use_transformers_continuous_batching and training.device.type == "cpu":
        training.transformers_continuous_batching_config = training.transformers_continuous_batching_config or (
            _room_for_answers(training, data.max_prompt_length)
        )
    prepare_training(training, backbone)
    training.model_init_kwargs = None  # the model comes as an object


def _room_for_answers(training: StreamGRPOConfig, max_prompt_length: int) -> dict[str, int]:
    """A cache for all answers that are sampled at once; by default it would take half of the machine's memory."""
    num_answers = training.per_device_train_batch_size * training.steps_per_generation
    page_size = 32
    num_pages = math.ceil((max_prompt_length + training.max_completion_length) / page_size)
    return {"page_size": page_size, "num_blocks": num_answers * num_pages, "max_batch_tokens": max(num_answers, 256)}


def load_prompts(
    data: PromptArguments, tokenizer: PreTrainedTokenizerBase, backbone: BackboneArguments
) -> tuple[Dataset, Dataset | None, list[RewardFunction], TokenReport]:
    """Training and held-out questions, the functions that reward answers to them, and what was read and left out.

    The tokenizer gets a chat template where questions are shown in one.

    Args:
        data: where the questions are, and what rewards answers.
        tokenizer: of the backbone.
        backbone: tells whether an adapter goes on, which may have learned ChatML.

    Raises:
        ValueError: a question can't be read, there is no chat template, or a reward function can't be used.
    """
    functions = load_reward_functions(data.reward_functions)
    if data.prompt_format == "chat":
        if tokenizer.chat_template is None and data.chat_template is None and backbone.adapter_name_or_path is None:
            raise ValueError(
                f"The tokenizer of {backbone.model_name_or_path} has no chat template, so that its model knows no chat to "
                "answer in: start from an adapter of sft.py (--adapter_name_or_path), name a --chat_template that it was "
                "trained with, or show questions as they are with --prompt_format text."
            )
        set_chat_template(tokenizer, data.chat_template)
    elif data.chat_template is not None:
        raise ValueError("`chat_template` has no effect with `prompt_format='text'`: leave one of them out.")
    train, train_name, heldout, heldout_name = open_rows(data, sums_of_digits)
    prompts, report = prepare_prompts(train, tokenizer, data.settings(), train_name)
    try_reward_functions(functions, [prompts[row] for row in range(min(len(prompts), _NUM_TRIED_ROWS))])
    if heldout is None:
        return prompts, None, functions, report
    heldout = heldout.select(range(min(len(heldout), data.max_heldout_rows)))
    return (
        prompts,
        prepare_prompts(heldout, tokenizer, data.settings(), f"held out: {heldout_name}")[0],
        functions,
        report,
    )
